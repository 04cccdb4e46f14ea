"""Pieces of a `flowkern.Glow`'s state_dict, made from what other implementations store."""

import torch
from torch import Tensor


def halves_swapped(x: Tensor, dim: int = 0) -> Tensor:
    """The two halves of a dimension exchanged, by which a coupling of the first half becomes one of the second."""
    first, second = x.chunk(2, dim=dim)
    return torch.cat([second, first], dim=dim)


def deinterleaved(x: Tensor, first: int) -> Tensor:
    """Rows first, first + 2, ..., and then the others: (raw, t) from an interleaved output; also (mean, log_std)."""
    return torch.cat([x[first::2], x[1 - first :: 2]])


def actnorm(name: str, log_scale: Tensor, bias: Tensor, initialized: bool = True) -> dict[str, Tensor]:
    """exp(log_scale) (x + bias), each of C numbers in any shape."""
    return {
        f"{name}.log_scale": log_scale.flatten(),
        f"{name}.bias": bias.flatten(),
        f"{name}.initialized": torch.tensor(initialized),
    }


def conv1x1(name: str, weight: Tensor, file=None) -> dict[str, Tensor]:
    """The PLU factors of a whole weight (C, C). A singular one is rejected."""
    p, lower, upper = torch.linalg.lu(weight)
    if file is not None and bool((upper.diagonal() == 0).any()):
        file.reject(f"the 1x1 convolution that becomes {name} is singular")
    return conv1x1_factors(name, p, lower, upper.triu(1), upper.diagonal().abs().log(), upper.diagonal().sign())


def conv1x1_factors(
    name: str, p: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor
) -> dict[str, Tensor]:
    """W = p (lower + I) (upper + diag(sign exp(log_s))), triangular parts taken strictly."""
    return {
        f"{name}.lower": lower.tril(-1),
        f"{name}.upper": upper.triu(1),
        f"{name}.log_s": log_s,
        f"{name}.sign": sign,
        f"{name}.permutation": p.argmax(dim=1),
    }


def network(name: str, first, second, last, edge1: Tensor | None = None, edge3: Tensor | None = None):
    """A coupling network. first, second: (weight, log_scale, bias) of exp(log_scale) (conv + bias); last: (weight,
    bias, logs) of (conv + bias) exp(3 logs).
    """
    state = {f"{name}.weight1": first[0], f"{name}.weight2": second[0], f"{name}.weight3": last[0]}
    state |= actnorm(f"{name}.norm1", *first[1:]) | actnorm(f"{name}.norm2", *second[1:])
    state |= {f"{name}.bias3": last[1].flatten(), f"{name}.logs": last[2].flatten()}
    if edge1 is not None:
        state |= {f"{name}.edge1": edge1, f"{name}.edge3": edge3}
    return state


def prior(name: str, bias: Tensor, logs: Tensor, weight: Tensor | None = None, edge: Tensor | None = None):
    """(mean, log_std) = (conv + bias) exp(3 logs)."""
    state = {f"{name}.bias": bias.flatten(), f"{name}.logs": logs.flatten()}
    return state | {f"{name}.{k}": v for k, v in (("weight", weight), ("edge", edge)) if v is not None}
