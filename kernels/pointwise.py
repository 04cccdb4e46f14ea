"""The unfolded network's maps on flat arrays: shrinkage in latent space and the data-consistency step, A = I."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.launch import on_device_of
from flowkern.layout import check_alike, in_order_of

BLOCK = 2048
COLUMNS = 1024  # partial sums that the second kernel reads at a time


@triton.jit
def _shrink_kernel(z, lam, result, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = 1.0 / (1.0 + tl.load(lam))
    tl.store(result + i, tl.load(z + i, mask=i < size) * keep, mask=i < size)


@triton.jit
def _shrink_vjp_kernel(z, g, lam, dz, partial, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = 1.0 / (1.0 + tl.load(lam))
    d = tl.load(g + i, mask=i < size, other=0.0) * keep
    tl.store(dz + i, d, mask=i < size)
    tl.store(partial + tl.program_id(0), -keep * tl.sum(d * tl.load(z + i, mask=i < size, other=0.0), axis=0))


@triton.jit
def _consistency_kernel(x, y, mu, result, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + i, mask=i < size)
    tl.store(result + i, b_x - tl.load(mu) * (b_x - tl.load(y + i, mask=i < size)), mask=i < size)


@triton.jit
def _consistency_vjp_kernel(x, y, g, mu, dx, dy, partial, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(g + i, mask=i < size, other=0.0)
    step = tl.load(mu)
    tl.store(dx + i, (1.0 - step) * b_g, mask=i < size)
    tl.store(dy + i, step * b_g, mask=i < size)
    gap = tl.load(x + i, mask=i < size, other=0.0) - tl.load(y + i, mask=i < size, other=0.0)
    tl.store(partial + tl.program_id(0), -tl.sum(b_g * gap, axis=0))


@triton.jit
def _sum_kernel(partial, result, count, COLUMNS: tl.constexpr):
    """The sum of the programs' partial ones, in a fixed order."""
    total = tl.zeros((COLUMNS,), tl.float32)
    first = 0
    while first < count:
        i = first + tl.arange(0, COLUMNS)
        total += tl.load(partial + i, mask=i < count, other=0.0)
        first += COLUMNS
    tl.store(result, tl.sum(total, axis=0))


def _launch(kernel, *arguments, like: Tensor, total: Tensor | None = None) -> None:
    """Run an elementwise kernel, and with `total` add up the partial sums that it takes as one more argument."""
    programs = triton.cdiv(like.numel(), BLOCK)
    partial = () if total is None else (like.new_empty(programs),)
    with on_device_of(like):
        if programs:
            kernel[(programs,)](*arguments, *partial, like.numel(), BLOCK=BLOCK)
        if total is not None:
            _sum_kernel[(1,)](*partial, total, programs, COLUMNS=COLUMNS)


def shrink(z: Tensor, lam: Tensor) -> Tensor:
    check_alike("shrink", z, lam)
    result = torch.empty_like(z)
    _launch(_shrink_kernel, in_order_of(z, result), lam, result, like=result)
    return result


def shrink_vjp(z: Tensor, g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    check_alike("shrink_vjp", z, g, lam)
    dz, dlam = torch.empty_like(z), torch.empty_like(lam)
    _launch(_shrink_vjp_kernel, in_order_of(z, dz), in_order_of(g, dz), lam, dz, like=dz, total=dlam)
    return dz, dlam


def data_consistency(x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    check_alike("data_consistency", x, y, mu)
    result = torch.empty_like(x)
    _launch(_consistency_kernel, in_order_of(x, result), in_order_of(y, result), mu, result, like=result)
    return result


def data_consistency_vjp(x: Tensor, y: Tensor, g: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("data_consistency_vjp", x, y, g, mu)
    dx, dy, dmu = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mu)
    _launch(
        _consistency_vjp_kernel, *(in_order_of(t, dx) for t in (x, y, g)), mu, dx, dy, like=dx, total=dmu
    )  # fmt: skip
    return dx, dy, dmu


def cases() -> Iterator[Case]:
    for kernel in (_shrink_kernel, _shrink_vjp_kernel, _consistency_kernel, _consistency_vjp_kernel):
        tensors = [name for name in kernel.arg_names if name not in ("size", "BLOCK")]
        signature = dict.fromkeys(tensors, "*fp32") | {"size": "i32"}
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        yield Case(name, kernel, signature, {"BLOCK": BLOCK}, integers={"size": 4096})
        yield Case(f"{name}, any size", kernel, signature, {"BLOCK": BLOCK})
    signature = {"partial": "*fp32", "result": "*fp32", "count": "i32"}
    yield Case("partial sums, flat", _sum_kernel, signature, {"COLUMNS": COLUMNS})
