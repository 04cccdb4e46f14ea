"""Between the coupling network's nine parameters and its three plain convolutions, in one launch each way.

`fold` multiplies normalisation and scale into the weights, casts them and lays them out channels-last; `unfold` adds up
the parts of the folded weights' gradients and carries them back to the parameters. Either kernel has a range of
programs for each of the three convolutions.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.launch import on_device_of
from flowkern.kernels.rounding import rounded

FOLD_BLOCK = 1024
UNFOLD_BLOCK = 8192  # parts included
UNFOLD_WARPS = 8


@triton.jit
def _fold_one(
    program, weight, scale, bias, out, out_bias, so, si, st, OUT: tl.constexpr, IN: tl.constexpr, TAPS: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers `program` * BLOCK and on of the folded weight (OUT, TAPS, IN), then of the folded bias (OUT,)."""
    e = program * BLOCK + tl.arange(0, BLOCK)
    o = e // (TAPS * IN)
    inside = o < OUT
    b_w = tl.load(weight + o * so + e % IN * si + e // IN % TAPS * st, mask=inside, other=0.0).to(tl.float32)
    b_s = tl.load(scale + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + e, rounded(b_w * tl.exp(FACTOR * b_s), out.dtype.element_ty), mask=inside)
    first = e - OUT * TAPS * IN
    inside = (first >= 0) & (first < OUT)
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
    OUT: tl.constexpr, IN: tl.constexpr, TAPS: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr,
    FACTOR: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of row o of a weight w exp(FACTOR s), of its scale s and of its bias b in b exp(FACTOR s).

    partial holds OUT IN TAPS numbers a part, at strides po, pi, pt; sums holds SUMS, those of the bias from FIRST on.
    """
    e = tl.exp(FACTOR * tl.load(scale + o).to(tl.float32))
    part = tl.arange(0, PARTS).to(tl.int64)
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, IN * TAPS, BLOCK):
        r = start + tl.arange(0, BLOCK)
        inside = r < IN * TAPS
        i = r % IN
        t = r // IN
        here = partial + part[:, None] * (OUT * IN * TAPS) + (o * po + i * pi + t * pt)[None, :]
        total = tl.sum(tl.load(here, mask=(part < parts)[:, None] & inside[None, :], other=0.0), axis=0)
        there = o * so + i * si + t * st
        along += total * tl.load(weight + there, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight + there, rounded(total * e, dweight.dtype.element_ty), mask=inside)
    d = tl.sum(tl.load(sums + part * SUMS + FIRST + o, mask=part < parts, other=0.0), axis=0)
    of_scale = FACTOR * e * (tl.sum(along, axis=0) + d * tl.load(bias + o).to(tl.float32))
    tl.store(dscale + o, rounded(of_scale, dscale.dtype.element_ty))
    tl.store(dbias + o, rounded(d * e, dbias.dtype.element_ty))


@triton.jit
def _unfold_kernel(
    weight1, scale1, bias1, weight2, scale2, bias2, weight3, bias3, logs,
    partial1, sums1, partial2, sums2, partial3, sums3,
    dweight1, dscale1, dbias1, dweight2, dscale2, dbias2, dweight3, dbias3, dlogs,
    so1, si1, st1, so2, si2, so3, si3, st3, parts1, parts2, parts3,
    FEW_IN: tl.constexpr, HIDDEN: tl.constexpr, FEW_OUT: tl.constexpr,
    NEED1: tl.constexpr, NEED2: tl.constexpr, NEED3: tl.constexpr,
    PARTS1: tl.constexpr, PARTS2: tl.constexpr, PARTS3: tl.constexpr,
    BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, BLOCK3: tl.constexpr,
):  # fmt: skip
    first: tl.constexpr = HIDDEN if NEED1 else 0
    second: tl.constexpr = HIDDEN if NEED2 else 0
    program = tl.program_id(0)
    if program < first:
        _unfold_one(
            program, weight1, scale1, bias1, partial1, sums1, dweight1, dscale1, dbias1, so1, si1, st1, parts1,
            9 * FEW_IN, 1, FEW_IN, HIDDEN, FEW_IN, 9, HIDDEN, 0, 1.0, PARTS1, BLOCK1,
        )  # fmt: skip
    elif program < first + second:
        _unfold_one(
            program - first, weight2, scale2, bias2, partial2, sums2, dweight2, dscale2, dbias2, so2, si2, 0, parts2,
            HIDDEN, 1, 0, HIDDEN, HIDDEN, 1, HIDDEN, 0, 1.0, PARTS2, BLOCK2,
        )  # fmt: skip
    elif NEED3:
        # Its parts are (tap, out, in), and its bias has the sums of the middle tap.
        _unfold_one(
            program - first - second, weight3, logs, bias3, partial3, sums3, dweight3, dlogs, dbias3, so3, si3, st3,
            parts3, HIDDEN, 1, FEW_OUT * HIDDEN, FEW_OUT, HIDDEN, 9, 9 * FEW_OUT, 4 * FEW_OUT, 3.0, PARTS3, BLOCK3,
        )  # fmt: skip


def _strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of a convolution's weight over outputs, inputs and taps."""
    so, si, sy, sx = weight.stride()
    if weight.shape[2] > 1 and sy != weight.shape[3] * sx:
        raise ValueError(f"convolution weights want their taps evenly spaced in memory, got strides {weight.stride()}")
    return so, si, sx


def _dense(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters as the kernels read and write them: vectors without gaps, weights in a layout that a new tensor of
    theirs has too.
    """
    return [p if p.is_contiguous() or _is_dense(p) else p.contiguous() for p in parameters]


def _is_dense(p: Tensor) -> bool:
    return torch.empty_like(p, device="meta").stride() == p.stride()


def fold(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As `flowkern.network.fold`, the weights in channels-last memory: (out, tap, in)."""
    w1, s1, b1, w2, s2, b2, w3, b3, logs = parameters = _dense(parameters)
    hidden, few_in = w1.shape[:2]
    few_out = len(w3)
    folded = tuple(
        torch.empty(p.shape, dtype=dtype, device=p.device, memory_format=torch.channels_last if p.dim() == 4 else None)
        for p in (w1, b1, w2, b2, w3, b3)
    )
    sizes = hidden * (9 * few_in + 1), hidden * (hidden + 1), few_out * (9 * hidden + 1)
    with on_device_of(w1):
        _fold_kernel[(sum(triton.cdiv(size, FOLD_BLOCK) for size in sizes),)](
            w1, s1, b1, w2, s2, b2, w3, b3, logs, *folded, *_strides(w1), *_strides(w2)[:2], *_strides(w3),
            FEW_IN=few_in, HIDDEN=hidden, FEW_OUT=few_out, BLOCK=FOLD_BLOCK,
        )  # fmt: skip
    return folded


def unfold(parameters: Sequence[Tensor], parts: Sequence[tuple[Tensor, Tensor] | None]) -> list[Tensor | None]:
    """Gradients of the nine parameters, in their dtypes and memory layouts, from what `weight_gradient` left of each
    convolution: (parts, hidden, 9 in), (parts, hidden, hidden), (parts, 9 out, hidden) and the sums beside them. None
    for a convolution whose gradients nobody wants.
    """
    w1, s1, b1, w2, s2, b2, w3, b3, logs = parameters = _dense(parameters)
    hidden, few_in = w1.shape[:2]
    few_out = len(w3)
    need = [p is not None for p in parts]
    gradients = [torch.empty_like(p) if need[i // 3] else None for i, p in enumerate(parameters)]
    programs = sum(n * needed for n, needed in zip((hidden, hidden, few_out), need, strict=True))
    if not programs:
        return gradients
    told = {}
    for i, (part, length) in enumerate(zip(parts, (9 * few_in, hidden, 9 * hidden), strict=True), 1):
        padded = triton.next_power_of_2(len(part[0])) if part else 1
        told |= {f"PARTS{i}": padded, f"BLOCK{i}": unfold_block(length, padded), f"NEED{i}": need[i - 1]}
    pairs = [t for part in parts for t in (part or (w1, w1))]
    with on_device_of(w1):
        _unfold_kernel[(programs,)](
            w1, s1, b1, w2, s2, b2, w3, b3, logs, *pairs, *(w1 if g is None else g for g in gradients),
            *_strides(w1), *_strides(w2)[:2], *_strides(w3), *(len(part[0]) if part else 0 for part in parts),
            FEW_IN=few_in, HIDDEN=hidden, FEW_OUT=few_out, **told, num_warps=UNFOLD_WARPS,
        )  # fmt: skip
    return gradients


def unfold_block(length: int, parts: int) -> int:
    """Numbers of a row that a program takes at a time, times `parts` of them at once."""
    return min(triton.next_power_of_2(length), max(16, UNFOLD_BLOCK // parts))


def cases() -> Iterator[Case]:
    strides = [f"{name}{i}" for i in (1, 2, 3) for name in ("so", "si", "st") if (name, i) != ("st", 2)]
    parameters = "weight1 scale1 bias1 weight2 scale2 bias2 weight3 bias3 logs".split()
    for few_in, few_out, hidden, parts in ((6, 12, 512, (32, 8, 32)), (48, 96, 512, (8, 2, 4)), (1, 1, 5, (1, 1, 1))):
        shape = dict(FEW_IN=few_in, HIDDEN=hidden, FEW_OUT=few_out)
        label = f"{few_in} channels, hidden {hidden}"
        for word in ("bf16", "fp32"):
            outputs = [f"out{kind}{i}" for i in (1, 2, 3) for kind in ("", "_bias")]
            yield Case(
                f"fold {word} {label}",
                _fold_kernel,
                dict.fromkeys(parameters, "*fp32") | dict.fromkeys(outputs, f"*{word}") | dict.fromkeys(strides, "i32"),
                shape | {"BLOCK": FOLD_BLOCK},
            )
        lengths = 9 * few_in, hidden, 9 * hidden
        told = {f"PARTS{i}": n for i, n in enumerate(parts, 1)} | {f"NEED{i}": True for i in (1, 2, 3)}
        told |= {f"BLOCK{i}": unfold_block(n, p) for i, (n, p) in enumerate(zip(lengths, parts, strict=True), 1)}
        found = [f"{name}{i}" for i in (1, 2, 3) for name in ("partial", "sums")]
        yield Case(
            f"unfold {label}",
            _unfold_kernel,
            dict.fromkeys([*parameters, *found, *(f"d{name}" for name in parameters)], "*fp32")
            | dict.fromkeys([*strides, "parts1", "parts2", "parts3"], "i32"),
            shape | told,
            UNFOLD_WARPS,
        )
