"""What the operators share: their interface, the checks of what they are given, and exact data consistency."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkern.checks import per_image

# By class name, filled by the package. A subclass of one's own that is added here is saved and loaded like the others.
OPERATORS: dict[str, type["Operator"]] = {}


def check_operator(operator, name: str = "operator") -> None:
    """Raises TypeError for what is no operator: an object with the methods `forward` and `adjoint`."""
    if not (callable(getattr(operator, "forward", None)) and callable(getattr(operator, "adjoint", None))):
        raise TypeError(f"{name} must have the methods forward and adjoint, got {type(operator).__name__}")


def is_exact(operator) -> bool:
    """Whether an operator has what exact data consistency takes, `normal_inverse` or `prox`."""
    return any(callable(getattr(operator, name, None)) for name in ("normal_inverse", "prox"))


def check_exact(operator) -> None:
    """Raises TypeError for an operator without exact data consistency."""
    if not is_exact(operator):
        raise TypeError(
            f"exact consistency needs an operator with normal_inverse or prox, not {type(operator).__name__}"
        )


class Operator(nn.Module):
    """A linear map A on images. Subclasses define `forward` and `adjoint`, and `config` if they can be saved.

    Masks, kernels, signs and indices are buffers: `.to()` moves them and the state_dict has them. They are cast to the
    dtype of the images they meet, so that an operator serves fp32 and fp64 alike.

    Where `(A^T A + rho I) x = b` has an exact and cheap solution the operator has the method
    `normal_inverse(b, rho)`: b and the result (N, C, H, W), rho a positive number, or a tensor of one positive number
    (shape ()) or one an image (N,); differentiable in both. Elsewhere there is no such attribute. One that knows the
    image v that minimises `||A v - y||^2 + rho ||v - x||^2` without it, or more exactly where rho is small, has the
    method `prox(x, y, rho)`, with rho a number or a tensor that broadcasts with x.
    """

    size: tuple[int, int, int] | None = None  # of the images, (C, H, W), where the operator is made for one size
    images = 1  # how many images have a mask or kernel of their own; 1: the same for all

    @property
    def config(self) -> dict:
        """What `from_config` needs to make this operator again, as JSON; its tensors are in the state_dict. Classes
        that are not in OPERATORS don't have it.
        """
        kind = type(self).__name__
        if OPERATORS.get(kind) is not type(self):
            raise AttributeError(f"{kind} is not in OPERATORS")
        return {"kind": kind}

    @classmethod
    def from_config(cls, config: dict) -> "Operator":
        """The operator described by `config`, its tensors still to be loaded from a state_dict."""
        return cls(**{name: value for name, value in config.items() if name != "kind"})

    @torch.no_grad()
    def norm(self, size: Sequence[int] | None = None) -> float:
        """The spectral norm ||A||, the largest over the images that have parameters of their own.

        size: (C, H, W) of the images; by default the operator's own, or else one near (1, 64, 64), on which the norm
        hardly depends. By power iteration, which approaches it from below; exact in the operators that say so.
        """
        size = checked_size((self.size or (1, 64, 64)) if size is None else size)
        tensors = [*self.parameters(), *self.buffers()]
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
        # Positive, because where A has no negative entries its first singular vector has none either.
        x = torch.rand(self.images, *size, generator=torch.Generator().manual_seed(0), device="cpu")
        x = x.to(tensors[0].device if tensors else "cpu", dtype)
        for _ in range(100):
            x = x / x.flatten(1).norm(dim=1).clamp_min(torch.finfo(dtype).tiny)[:, None, None, None]
            x = self.adjoint(self.forward(x))
        return math.sqrt(x.flatten(1).norm(dim=1).max().item())


def from_config(config: dict) -> Operator:
    """The operator that `Operator.config` describes, its tensors still to be loaded: `load_state_dict` fills them.

    Raises ValueError for an unknown kind or a configuration that does not fit it.
    """
    kind = config.get("kind") if isinstance(config, dict) else config
    if not isinstance(kind, str) or kind not in OPERATORS:
        raise ValueError(f"an operator's configuration has a 'kind' among {', '.join(OPERATORS)}, got {kind!r}")
    try:
        return OPERATORS[kind].from_config(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the configuration of {kind}: {error}") from error


def exact_consistency(operator, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
    """The image v that minimises `||A v - y||^2 + rho ||v - x||^2`, which is `(A^T A + rho I)^-1 (A^T y + rho x)`.

    operator: one with `prox` or `normal_inverse`; of a class's and its subclass's, the subclass's serves. x: images
    (N, C, H, W). y: their measurements.
    rho: as in `normal_inverse`. The result (N, C, H, W) is differentiable in x, y and rho.

    Raises TypeError for an operator with neither, ValueError for a rho that is not positive.
    """
    check_exact(operator)
    factor = per_image_rho(rho, x)
    if _by_prox(operator):
        return operator.prox(x, y, factor)
    # From the residual: (A^T A + rho I)^-1 (A^T y + rho x), which is the same, divides what cancels by a small rho.
    return x + operator.normal_inverse(operator.adjoint(residual(operator, x, y)), rho)


def _by_prox(operator) -> bool:
    """Whether its `prox` is to be asked rather than its `normal_inverse`: one that was not written for less than it."""
    if not callable(getattr(operator, "prox", None)):
        return False
    for owner in type(operator).__mro__:
        if "prox" in vars(owner):
            return True
        if "normal_inverse" in vars(owner):
            return False
    return not callable(getattr(operator, "normal_inverse", None))


def residual(operator, x: Tensor, y: Tensor) -> Tensor:
    """y - A x. Raises ValueError where y is no measurement of images like x."""
    measured = operator.forward(x)
    if measured.shape != y.shape:
        raise ValueError(f"expected y of shape {tuple(measured.shape)} by its operator, got {tuple(y.shape)}")
    return y - measured


def per_image_rho(rho: float | Tensor, b: Tensor) -> float | Tensor:
    """rho as a factor of the images b, once it is known to be positive and of a shape that fits."""
    rho = per_image(rho, "rho", len(b), positive=True)
    if not isinstance(rho, Tensor):
        return rho
    return rho.to(b).reshape([rho.numel()] + [1] * (b.ndim - 1))


def checked_size(size) -> tuple[int, int, int]:
    """size as a tuple. Raises ValueError for anything but three positive integers."""
    whole = isinstance(size, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) for s in size)
    if not whole or len(size) != 3 or min(size) < 1:
        raise ValueError(f"size must be three positive integers (C, H, W), got {size!r}")
    return tuple(size)


def check_images(x: Tensor, owner: str) -> None:
    """Raises TypeError for what is no floating-point tensor, ValueError for one that is not (N, C, H, W)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{owner} wants floating-point images (N, C, H, W), got {given}")
    if x.ndim != 4:
        raise ValueError(f"{owner} wants images (N, C, H, W), got {tuple(x.shape)}")


def for_batch(parameter: Tensor, x: Tensor, what: str) -> Tensor:
    """A mask or kernel (1 or N, ...) for the images x, in their dtype; an empty batch takes none of it."""
    if len(parameter) == 1:
        return parameter.to(x.dtype)
    if len(x) not in (0, len(parameter)):
        raise ValueError(f"there are {len(parameter)} {what}s, one an image, and {len(x)} images")
    return parameter[: len(x)].to(x.dtype)
