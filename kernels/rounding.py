"""Low precision in the same way compiled and interpreted: how operands enter a matrix product and how results leave."""

import torch
import triton
import triton.language as tl

from flowkern.kernels import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest even; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(left, right, total, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """total + left @ right, both operands in `dtype`, summed in fp32; the interpreter can't multiply bf16."""
    left, right = rounded(left, dtype), rounded(right, dtype)
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


def small_blocks(products: str, shared: int) -> bool:
    """Whether blocks have to be small: three tf32 products keep thrice the operands in registers, and blocks of 128 by
    128 take 96 KiB of shared memory, of which AMD's chips have 64.
    """
    return products == "tf32x3" or shared < 96 << 10


def products_of(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: in tf32 where PyTorch allows it for convolutions, else in three tf32 parts."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"  # has no meaning for operands of 16 bits; what AMD's matrix units do anyway
    convolution = getattr(torch.backends.cudnn, "conv", None)  # newer versions of PyTorch; they refuse the old question
    if hasattr(convolution, "fp32_precision"):
        return "tf32" if convolution.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
