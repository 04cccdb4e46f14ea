"""The reverse-mode derivative of the channel mix: rebuilt state, its gradient, and the reductions dM and dm.

Few channels: one kernel reads each state once. Many: the products are compute-bound anyway, so the two mixes and the
outer products are kernels of their own. Both leave partial sums of dM and dm per program, in an order that depends on
the shapes alone, which a second kernel adds up.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.launch import cover, on_device_of
from flowkern.kernels.mix import DEPTH, channel_mix, columns, usual
from flowkern.layout import channels_last, check_alike, empty_channels_last, sums_of_mix

FUSED_CHANNELS = 64  # up to which one program holds all of dM
EDGE = 64  # of a block of dM in the separate kernel
SEPARATE_PIXELS = 32
MOST_PARTS = 2048  # a fourth of them fills a large GPU four times over
MOST_NUMBERS = 1 << 22  # of all parts together: 16 MiB


@triton.jit
def _fused_kernel(
    v,  # (pixels, C)
    g,  # (pixels, C)
    matrix,
    inverse_matrix,
    offset,
    rebuilt,
    dv,
    partial,  # (programs, C * C + C)
    pixels,
    row,
    column,
    inverse_row,
    inverse_column,
    C: tl.constexpr,
    INVERSE: tl.constexpr,
    GIVEN_INPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    out = tl.arange(0, OUT)
    channel = (out < C)[None, :]
    dmatrix = tl.zeros((OUT, OUT), tl.float32)
    doffset = tl.zeros((OUT,), tl.float32)
    for i in range(RUN):
        p = (program * RUN + i) * PIXELS + tl.arange(0, PIXELS)[:, None]
        inside = p < pixels
        here = p * C + out[None, :]
        other = tl.zeros((PIXELS, OUT), tl.float32)
        d = tl.zeros((PIXELS, OUT), tl.float32)
        for first in range(0, C, DEPTH):
            c = first + tl.arange(0, DEPTH)
            part = p * C + c[None, :]
            mask = inside & (c < C)[None, :]
            b_g = tl.load(g + part, mask=mask, other=0.0)
            if INVERSE:
                b_m = columns(inverse_matrix, out, c, inverse_column, inverse_row, C)
                d = tl.dot(b_g, b_m, d, input_precision="ieee")
            else:
                d = tl.dot(b_g, columns(matrix, out, c, column, row, C), d, input_precision="ieee")
            if INVERSE or not GIVEN_INPUT:
                b_v = tl.load(v + part, mask=mask, other=0.0)
                if INVERSE and not GIVEN_INPUT:
                    other = tl.dot(b_v, columns(matrix, out, c, row, column, C), other, input_precision="ieee")
                else:
                    b_v -= tl.load(offset + c, mask=c < C, other=0.0)[None, :]
                    b_m = columns(inverse_matrix, out, c, inverse_row, inverse_column, C)
                    other = tl.dot(tl.where(mask, b_v, 0.0), b_m, other, input_precision="ieee")
        if INVERSE and not GIVEN_INPUT:
            other += tl.load(offset + out, mask=out < C, other=0.0)[None, :]
        tl.store(dv + here, d, mask=inside & channel)
        if not GIVEN_INPUT:
            tl.store(rebuilt + here, other, mask=inside & channel)
        # x is what the forward mix reads, weight the gradient of what it returns.
        if INVERSE == GIVEN_INPUT:
            x = other
        else:
            x = tl.load(v + here, mask=inside & channel, other=0.0)
        weight = -d if INVERSE else tl.load(g + here, mask=inside & channel, other=0.0)
        dmatrix = tl.dot(tl.trans(weight), x, dmatrix, input_precision="ieee")
        doffset += tl.sum(weight, axis=0)
    partial += program * (C * C + C)
    tl.store(partial + out[:, None] * C + out[None, :], dmatrix, mask=(out < C)[:, None] & channel)
    tl.store(partial + C * C + out, doffset, mask=out < C)


@triton.jit
def _outer_kernel(
    weight,  # (pixels, C)
    x,  # (pixels, C)
    partial,  # (programs, C * C + C)
    pixels,
    C: tl.constexpr,
    NEGATE: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    EDGE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * EDGE + tl.arange(0, EDGE)
    j = tl.program_id(2) * EDGE + tl.arange(0, EDGE)
    dmatrix = tl.zeros((EDGE, EDGE), tl.float32)
    doffset = tl.zeros((EDGE,), tl.float32)
    for k in range(RUN):
        p = (program * RUN + k) * PIXELS + tl.arange(0, PIXELS)[:, None]
        b_w = tl.load(weight + p * C + i[None, :], mask=(p < pixels) & (i < C)[None, :], other=0.0)
        b_x = tl.load(x + p * C + j[None, :], mask=(p < pixels) & (j < C)[None, :], other=0.0)
        dmatrix = tl.dot(tl.trans(b_w), b_x, dmatrix, input_precision="ieee")
        doffset += tl.sum(b_w, axis=0)
    if NEGATE:
        dmatrix = -dmatrix
        doffset = -doffset
    partial += program * (C * C + C)
    tl.store(partial + i[:, None] * C + j[None, :], dmatrix, mask=(i < C)[:, None] & (j < C)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial + C * C + i, doffset, mask=i < C)


@triton.jit
def _total_kernel(partial, dmatrix, doffset, programs, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dmatrix and doffset as the sums of the programs' partial ones."""
    size: tl.constexpr = C * C + C
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0
    while first < programs:
        r = first + tl.arange(0, ROWS)
        mask = (r < programs)[:, None] & (c < size)[None, :]
        total += tl.load(partial + r[:, None].to(tl.int64) * size + c[None, :], mask=mask, other=0.0)
        first += ROWS
    total = tl.sum(total, axis=0)
    tl.store(dmatrix + c, total, mask=c < C * C)
    tl.store(doffset + c - C * C, total, mask=(c >= C * C) & (c < size))


def runs(pixels: int, block: int, channels: int) -> tuple[int, int]:
    """How many blocks of pixels one program adds up, and into how many parts that splits the sums: not more than keep
    the device filled, nor than fit into 16 MiB. Blocks are a power of four, each of which is compiled once.
    """
    most = max(1, min(MOST_PARTS, MOST_NUMBERS // (channels * (channels + 1))))
    run = 1
    while triton.cdiv(pixels, run * block) > most:
        run *= 4
    return run, triton.cdiv(pixels, run * block)


def mix_vjp(
    v: Tensor,
    g: Tensor,
    matrix: Tensor,
    inverse_matrix: Tensor,
    offset: Tensor,
    inverse: bool = False,
    given_input: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmatrix, doffset = sums_of_mix(v, into)
    check_alike("mix_vjp", v, g, matrix, inverse_matrix, offset, dmatrix, doffset)
    n, c, height, width = v.shape
    pixels = n * height * width
    v, g, offset = channels_last(v), channels_last(g), offset.contiguous()
    block = fused_pixels(c, inverse, given_input) if c <= FUSED_CHANNELS else SEPARATE_PIXELS
    run, programs = runs(pixels, block, c)
    partial = v.new_empty((programs, c * c + c))
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    with on_device_of(v):
        if c <= FUSED_CHANNELS:
            dv = empty_channels_last(v)
            if programs:
                _fused_kernel[(programs,)](
                    v, g, matrix, inverse_matrix, offset, rebuilt, dv, partial, pixels,
                    *matrix.stride(), *inverse_matrix.stride(),
                    C=c, INVERSE=inverse, GIVEN_INPUT=given_input, PIXELS=block, RUN=run, OUT=cover(c), DEPTH=DEPTH,
                    num_warps=8,
                )  # fmt: skip
        else:
            dv, rebuilt, x = _separately(v, g, matrix, inverse_matrix, offset, inverse, given_input)
            if programs:
                edges = triton.cdiv(c, EDGE)
                _outer_kernel[(programs, edges, edges)](
                    dv if inverse else g, x, partial, pixels, C=c, NEGATE=inverse, PIXELS=block, RUN=run, EDGE=EDGE,
                    num_warps=8,
                )  # fmt: skip
        _total_kernel[(triton.cdiv(c * c + c, 64),)](partial, dmatrix, doffset, programs, C=c, ROWS=32, COLUMNS=64)
    return rebuilt, dv, dmatrix, doffset


def _separately(v, g, matrix, inverse_matrix, offset, inverse, given_input) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the rebuilt state (empty with `given_input`) and the state that the forward mix reads."""
    dv = channel_mix(g, (inverse_matrix if inverse else matrix).mT, None)
    if inverse and not given_input:
        return dv, channel_mix(v, matrix, offset), v
    x = channel_mix(v, inverse_matrix, offset, True) if inverse or not given_input else v
    return dv, v.new_empty(0) if given_input else x, x


def fused_pixels(channels: int, inverse: bool, given_input: bool) -> int:
    """Pixels of a block in the fused kernel: as many as do not spill. With both flags, both operands of the outer
    product are results of the same program.
    """
    return 16 if channels > (32 if inverse and given_input else 48) else 32


def cases() -> Iterator[Case]:
    strides = dict.fromkeys(("row", "column", "inverse_row", "inverse_column"), "i32")
    tensors = dict.fromkeys(("v", "g", "matrix", "inverse_matrix", "offset", "rebuilt", "dv", "partial"), "*fp32")
    for c in (4, 12, 24, 48, 64):
        for inverse, given, run in ((False, False, 16), (True, False, 16), (False, True, 16), (True, True, 16),
                                    (False, False, 1)):  # fmt: skip
            shape = {"C": c, "PIXELS": fused_pixels(c, inverse, given), "RUN": run, "OUT": cover(c), "DEPTH": DEPTH}
            label = f"mix_vjp C={c}{', inverse' * inverse}{', given input' * given}, {run} blocks"
            constexprs = {"INVERSE": inverse, "GIVEN_INPUT": given, **shape}
            signature = tensors | strides | {"pixels": "i32"}
            yield Case(label, _fused_kernel, signature, constexprs, 8, integers=usual(c))
            if run == 1:
                yield Case(f"{label}, any sizes", _fused_kernel, signature, constexprs, 8)
    outer = dict.fromkeys(("weight", "x", "partial"), "*fp32") | {"pixels": "i32"}
    for c, negate in ((96, False), (96, True), (192, False)):
        shape = {"C": c, "NEGATE": negate, "PIXELS": SEPARATE_PIXELS, "RUN": 16, "EDGE": EDGE}
        yield Case(f"outer products C={c}{', negated' * negate}", _outer_kernel, outer, shape, 8, integers=usual(c))
    total = dict.fromkeys(("partial", "dmatrix", "doffset"), "*fp32") | {"programs": "i32"}
    for c in (12, 48, 192):
        yield Case(f"partial sums C={c}", _total_kernel, total, {"C": c, "ROWS": 32, "COLUMNS": 64})
