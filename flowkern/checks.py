"""What arguments have to be, each said in one sentence."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern import transforms


def positive_int(value, name: str) -> int:
    """The value. Raises TypeError for what is no int, ValueError for one below 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} wants an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} wants an int >= 1, got {value}")
    return value


def choice(value, name: str, choices: Sequence[str]) -> str:
    """The value. Raises ValueError for one that is not among the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value


def refuse_non_finite(x: Tensor, what: str) -> None:
    """Raises ValueError for NaN and infinities. what: the name of x in the plural. Nothing is looked at where there is
    nothing to see: traced, and on the meta device.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return
    # Where the sum is finite every number is; only where it isn't do they have to be looked at one by one.
    if not math.isfinite(x.detach().sum()) and not bool(torch.isfinite(x).all()):
        raise ValueError(f"the {what} contain NaN or infinite values")


def per_image(value, name: str, n: int, positive: bool = False) -> float | Tensor:
    """A number >= 0 (positive: > 0), or a tensor of one, (), or of one for each of n images, (n,). Raises ValueError
    for another.
    """
    if not isinstance(value, Tensor):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value < math.inf or value == 0 and not positive):
            wanted = "a positive number" if positive else "a number >= 0"
            raise ValueError(f"{name} must be {wanted}, or a tensor of one or of one an image, got {value!r}")
        return value
    value = value[0] if value.shape == (1,) else value
    if tuple(value.shape) not in ((), (n,)):
        raise ValueError(f"{name} must hold one number or one for each of the {n} images, got {tuple(value.shape)}")
    # On a GPU looking at the values would wait for it; traced, there are none yet.
    traced = torch.compiler.is_compiling() or transforms.batched_or_forward()
    if value.device.type == "cpu" and not traced and not bool((value > 0 if positive else value >= 0).all()):
        wanted = "positive" if positive else ">= 0"
        raise ValueError(f"{name} must be {wanted}, got a tensor with a number that is not")
    return value
