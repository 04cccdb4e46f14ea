"""Between the coupling network's nine parameters and its three plain convolutions, in one launch each way.

`fold` multiplies normalisation and scale into the weights, casts them and lays them out channels-last; `unfold` adds up
the parts of the folded weights' gradients and carries them back to the parameters. Either kernel has a range of
programs for each of the three convolutions.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.launch import on_device_of
from flowkern.kernels.rounding import rounded

FOLD_BLOCK = 1024
UNFOLD_BLOCK = 512


@triton.jit
def _fold_one(
    program, weight, scale, bias, out, out_bias, so, si, st, O: tl.constexpr, I: tl.constexpr, T: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers `program` * BLOCK and on of the folded weight (O, T, I), then of the folded bias (O,)."""
    e = program * BLOCK + tl.arange(0, BLOCK)
    o = e // (T * I)
    inside = o < O
    b_w = tl.load(weight + o * so + e % I * si + e // I % T * st, mask=inside, other=0.0).to(tl.float32)
    b_s = tl.load(scale + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + e, rounded(b_w * tl.exp(FACTOR * b_s), out.dtype.element_ty), mask=inside)
    first = e - O * T * I
    inside = (first >= 0) & (first < O)
    b_b = tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)
    b_s = tl.load(scale + first, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_bias + first, rounded(b_b * tl.exp(FACTOR * b_s), out.dtype.element_ty), mask=inside)


@triton.jit
def _fold_kernel(
    weight1, scale1, bias1, weight2, scale2, bias2, weight3, bias3, logs,
    out1, out_bias1, out2, out_bias2, out3, out_bias3,
    so1, si1, st1, so2, si2, so3, si3, st3,
    FEW_IN: tl.constexpr, HIDDEN: tl.constexpr, FEW_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first: tl.constexpr = (HIDDEN * (9 * FEW_IN + 1) + BLOCK - 1) // BLOCK
    second: tl.constexpr = (HIDDEN * (HIDDEN + 1) + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < first:
        _fold_one(program, weight1, scale1, bias1, out1, out_bias1, so1, si1, st1, HIDDEN, FEW_IN, 9, 1.0, BLOCK)
    elif program < first + second:
        _fold_one(program - first, weight2, scale2, bias2, out2, out_bias2, so2, si2, 0, HIDDEN, HIDDEN, 1, 1.0, BLOCK)
    else:
        program -= first + second
        _fold_one(program, weight3, logs, bias3, out3, out_bias3, so3, si3, st3, FEW_OUT, HIDDEN, 9, 3.0, BLOCK)


@triton.jit
def _unfold_one(
    o, weight, scale, bias, partial, sums, dweight, dscale, dbias, so, si, st, parts, po, pi, pt,
    O: tl.constexpr, I: tl.constexpr, T: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr, FACTOR: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of row o of a weight w exp(s FACTOR), of its scale s and its bias b exp(s FACTOR).

    sums holds SUMS numbers a part, those of the bias from FIRST on.
    """
    e = tl.exp(FACTOR * tl.load(scale + o).to(tl.float32))
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, I * T, BLOCK):
        r = start + tl.arange(0, BLOCK)
        inside = r < I * T
        i = r % I
        t = r // I
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(PARTS):
            here = partial + part.to(tl.int64) * (O * I * T) + o * po + i * pi + t * pt
            total += tl.load(here, mask=inside & (part < parts), other=0.0)
        there = o * so + i * si + t * st
        along += total * tl.load(weight + there, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight + there, rounded(total * e, dweight.dtype.element_ty), mask=inside)
    part = tl.arange(0, PARTS)
    d = tl.sum(tl.load(sums + part * SUMS + FIRST + o, mask=part < parts, other=0.0), axis=0)
    of_scale = FACTOR * e * (tl.sum(along, axis=0) + d * tl.load(bias + o).to(tl.float32))
    tl.store(dscale + o, rounded(of_scale, dscale.dtype.element_ty))
    tl.store(dbias + o, rounded(d * e, dbias.dtype.element_ty))
