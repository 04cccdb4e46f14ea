"""The coupling network in one pass over pixels, its hidden activations kept on the chip.

A program takes a block of pixels: the 3x3 convolution of their gathered neighbours, whole, into shared memory; then, a
few hidden units at a time, the 1x1 convolution and at once its contribution to the taps of the last 3x3, which stay in
registers until the end. The taps of neighbouring pixels are added up afterwards (`sum_taps`), as in the separate form:
to compute the hidden units of a halo of neighbours again instead would cost half as much arithmetic once more, where
arithmetic already bounds the time.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.convolution import MULTIPROCESSORS, PRECISIONS, read_pixels, read_weight, usual
from flowkern.kernels.formulas import rectified
from flowkern.kernels.launch import cover, on_device_of
from flowkern.kernels.rounding import product, products_of, rounded

WARPS = 8
STAGES = 2  # a third would take the shared memory in which the hidden activations lie


@triton.jit(do_not_specialize=["pixels"])
def _fused_kernel(
    a,  # (pixels, FEW_IN), pixels `stride` apart
    weight1,  # (HIDDEN, 9, FEW_IN)
    bias1,
    weight2,  # (HIDDEN, HIDDEN)
    bias2,
    weight3,  # (FEW_OUT, 9, HIDDEN)
    hidden1,  # (pixels, HIDDEN), written if KEEP
    hidden2,
    planes,  # (9, pixels, FEW_OUT)
    pixels,
    height,
    width,
    stride,
    FEW_IN: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEW_OUT: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    dtype: tl.constexpr = weight1.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)[:, None]
    inside = first + i < pixels
    k = tl.arange(0, BLOCK_A)
    b_a = rounded(read_pixels(a, first, i, k[None, :], pixels, height, width, stride, 9 * FEW_IN, FEW_IN, False), dtype)
    activations = ()
    for start in tl.static_range(0, HIDDEN, BLOCK_1):
        n = start + tl.arange(0, BLOCK_1)
        b_w1 = read_weight(weight1, k[None, :], n[:, None], 9 * FEW_IN, HIDDEN, False, 0)
        # Transposed, because Triton leaves the result of one product in registers if it can be the left operand of the
        # next, and all of these together would take more than there are.
        part = product(b_w1, tl.trans(b_a), tl.zeros((BLOCK_1, BLOCK_M), tl.float32), dtype, PRECISION)
        part += tl.load(bias1 + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[:, None]
        part = tl.trans(rounded(rectified(part), dtype))
        if KEEP:
            tl.store(hidden1 + first * HIDDEN + (i * HIDDEN + n[None, :]), part, mask=inside & (n < HIDDEN)[None, :])
        activations += (part,)
    t = tl.arange(0, BLOCK_T)[None, :]
    taps = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    for start in range(0, HIDDEN, BLOCK_2):
        k2 = start + tl.arange(0, BLOCK_2)
        total = tl.zeros((BLOCK_M, BLOCK_2), tl.float32)
        for j in tl.static_range((HIDDEN + BLOCK_1 - 1) // BLOCK_1):
            k1 = j * BLOCK_1 + tl.arange(0, BLOCK_1)
            b_w2 = read_weight(weight2, k1[:, None], k2[None, :], HIDDEN, HIDDEN, False, 0)
            total = product(activations[j], b_w2, total, dtype, PRECISION)
        total += tl.load(bias2 + k2, mask=k2 < HIDDEN, other=0.0).to(tl.float32)[None, :]
        total = rounded(rectified(total), dtype)
        if KEEP:
            here = hidden2 + first * HIDDEN + (i * HIDDEN + k2[None, :])
            tl.store(here, total, mask=inside & (k2 < HIDDEN)[None, :])
        b_w3 = read_weight(weight3, k2[:, None], t, HIDDEN, 9 * FEW_OUT, False, FEW_OUT)
        taps = product(total, b_w3, taps, dtype, PRECISION)
    planes += first * FEW_OUT + (t // FEW_OUT).to(tl.int64) * pixels * FEW_OUT + (i * FEW_OUT + t % FEW_OUT)
    tl.store(planes, rounded(taps, planes.dtype.element_ty), mask=inside & (t < 9 * FEW_OUT))


def fused_blocks(
    few_in: int, hidden: int, few_out: int, pixels: int, dtype: torch.dtype, products: str, generation: int
) -> dict[str, int] | None:
    """Block sizes of the fused kernel, or None where separate convolutions are predicted to be faster
    (docs/triton-network.md) or it would not fit.
    """
    block_a, block_t = cover(9 * few_in), cover(9 * few_out)
    large = generation == 90 and dtype.itemsize == 2
    most = (512 if block_t <= 128 else 256) if large else 128
    if block_a > 128 or block_t > 256 or hidden > most or not generation or products == "tf32x3":
        return None
    if generation == 80 and dtype.itemsize > 2 and block_t > 128:
        return None
    rows = 128 if large else 64
    if triton.cdiv(pixels, rows) < MULTIPROCESSORS * 3 // 4:
        return None
    narrow = hidden > 256 or block_t > 128 or dtype.itemsize > 2
    return dict(
        BLOCK_M=rows, BLOCK_A=block_a, BLOCK_1=min(cover(hidden), 256 // dtype.itemsize),
        BLOCK_2=min(cover(hidden), 32 if narrow else 64), BLOCK_T=block_t,
    )  # fmt: skip


def fused_trace(
    folded: Sequence[Tensor], a: Tensor, stride: int, kept: Sequence[Tensor], planes: Tensor, blocks: dict[str, int]
) -> None:
    """From a (N, C/2, H, W), pixels `stride` numbers apart, to the taps (9, N, H, W, few) of the last convolution, and
    the two hidden activations if `kept` holds tensors for them.
    """
    w1, b1, w2, b2, w3, _ = folded
    n, few_in, height, width = a.shape
    pixels = n * height * width
    with on_device_of(a):
        _fused_kernel[(triton.cdiv(pixels, blocks["BLOCK_M"]),)](
            a, w1, b1, w2, b2, w3, *(kept or (planes, planes)), planes, pixels, height, width, stride, FEW_IN=few_in,
            HIDDEN=len(w1), FEW_OUT=len(w3), KEEP=bool(kept), PRECISION=products_of(w1.dtype), **blocks,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    shapes = ((6, 512, 12), (12, 512, 12), (12, 256, 24), (6, 128, 12), (12, 128, 24), (1, 5, 1))
    for (precision, (dtype, products, _)), target in itertools.product(PRECISIONS.items(), (80, 90)):
        word = "fp32" if dtype == torch.float32 else precision
        for (few_in, hidden, few_out), keep in itertools.product(shapes, (False, True)):
            sizes = fused_blocks(few_in, hidden, few_out, 65536, dtype, products, target)
            if sizes is None or (precision == "fp16" and hidden != 512):
                continue
            pointers = ("weight1", "bias1", "weight2", "bias2", "weight3", "hidden1", "hidden2")
            yield Case(
                f"network {few_in}-{hidden}-{few_out} {precision}{' keep' if keep else ''} for sm_{target}",
                _fused_kernel,
                dict.fromkeys(pointers, f"*{word}")
                | {"a": "*fp32", "planes": "*bf16" if precision == "bf16" else "*fp32"}
                | dict.fromkeys(("pixels", "height", "width", "stride"), "i32"),
                dict(FEW_IN=few_in, HIDDEN=hidden, FEW_OUT=few_out, KEEP=keep, PRECISION=products) | sizes,
                WARPS,
                STAGES,
                integers=usual("first", 2 * few_in),
                targets=(target,),
            )
