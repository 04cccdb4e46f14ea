"""Composition of the channel mixes of all steps of a level, and its derivative: one launch each, in fp64 inside.

A program owns one step and a block of columns. Triangular systems are solved column by column in registers: at position
k of the substitution, the row that is final is read out and its multiples are taken from the rows still open.
The formulas are those of `flowkern.mix`.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern import backend
from flowkern.kernels.case import Case
from flowkern.kernels.launch import on_device_of
from flowkern.kernels.mix import REPRESENTATIVE
from flowkern.layout import check_alike, check_permutation

COLUMNS = 8  # of a matrix in one program
MOST_CHANNELS = 192  # with more, a program's columns no longer fit its registers
SUMMED = 256  # log-determinants added at a time


@triton.jit
def _take(block, rows, k):
    """Row k of a block."""
    return tl.sum(tl.where((rows == k)[:, None], block, 0.0), axis=0)


@triton.jit
def _compose_kernel(
    lower,  # (K, C, C)
    upper,  # (K, C, C)
    log_s,  # (K, C)
    log_scale,  # (K, C)
    bias,  # (K, C)
    sign,  # (K, C)
    permutation,  # (K, C)
    matrix,  # (K, C, C)
    offset,  # (K, C)
    inverse,  # (K, C, C)
    logdet,  # ()
    numbers,  # K C
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    square = step * C * C
    line = step * C
    r = tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = r < C
    column = j < C
    source = tl.load(permutation + line + r, mask=row, other=0).to(tl.int32)
    # (diagonal of U) and exp(log_scale), by row
    diagonal = tl.exp(tl.load(log_s + line + r, mask=row, other=0.0).to(tl.float64))
    diagonal *= tl.load(sign + line + r, mask=row, other=1.0).to(tl.float64)
    stretch = tl.exp(tl.load(log_scale + line + r, mask=row, other=0.0).to(tl.float64))
    stretch_j = tl.exp(tl.load(log_scale + line + j, mask=column, other=0.0).to(tl.float64))

    # matrix[:, j] = P L U[:, j] exp(log_scale[j])
    up = tl.load(
        upper + square + r[:, None] * C + j[None, :], mask=(r[:, None] < j[None, :]) & column[None, :], other=0.0
    )
    up = tl.where(r[:, None] == j[None, :], diagonal[:, None], up.to(tl.float64)) * stretch_j[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float64)
    for k in range(0, C):
        below = tl.load(lower + square + source * C + k, mask=row & (source > k), other=0.0).to(tl.float64)
        product += tl.where(source == k, 1.0, below)[:, None] * _take(up, r, k)[None, :]
    here = square + r[:, None] * C + j[None, :]
    inside = row[:, None] & column[None, :]
    tl.store(matrix + here, product.to(matrix.dtype.element_ty), mask=inside)

    # inverse[:, j] = exp(-log_scale) U^-1 L^-1 e_permutation[j]
    target = tl.load(permutation + line + j, mask=column, other=-1).to(tl.int32)
    x = tl.where(r[:, None] == target[None, :], 1.0, 0.0).to(tl.float64)
    for k in range(0, C):
        below = tl.load(lower + square + r * C + k, mask=row & (r > k), other=0.0).to(tl.float64)
        x -= below[:, None] * _take(x, r, k)[None, :]
    x /= diagonal[:, None]
    for back in range(0, C):
        k = C - 1 - back
        above = tl.load(upper + square + r * C + k, mask=r < k, other=0.0).to(tl.float64) / diagonal
        x -= above[:, None] * _take(x, r, k)[None, :]
    tl.store(inverse + here, (x / stretch[:, None]).to(inverse.dtype.element_ty), mask=inside)

    if tl.program_id(1) == 0:
        # offset = P L (U exp(log_scale) bias)
        b = tl.load(bias + line + r, mask=row, other=0.0).to(tl.float64) * stretch
        v = diagonal * b
        for k in range(0, C):
            above = tl.load(upper + square + r * C + k, mask=r < k, other=0.0).to(tl.float64)
            v += above * tl.sum(tl.where(r == k, b, 0.0), axis=0)
        m = tl.zeros((ROWS,), tl.float64)
        for k in range(0, C):
            below = tl.load(lower + square + source * C + k, mask=row & (source > k), other=0.0).to(tl.float64)
            m += tl.where(source == k, 1.0, below) * tl.sum(tl.where(r == k, v, 0.0), axis=0)
        tl.store(offset + line + r, m.to(offset.dtype.element_ty), mask=row)
        if tl.program_id(0) == 0:
            total = tl.zeros((SUMMED,), tl.float64)
            first = 0
            while first < numbers:
                i = first + tl.arange(0, SUMMED)
                total += tl.load(log_s + i, mask=i < numbers, other=0.0).to(tl.float64)
                total += tl.load(log_scale + i, mask=i < numbers, other=0.0).to(tl.float64)
                first += SUMMED
            tl.store(logdet, tl.sum(total, axis=0).to(logdet.dtype.element_ty))


@triton.jit
def _compose_vjp_kernel(
    lower,
    upper,
    log_s,
    log_scale,
    bias,
    sign,
    permutation,
    dmatrix,  # (K, C, C)
    doffset,  # (K, C)
    dlogdet,  # ()
    dlower,
    dupper,
    dlog_s,
    dlog_scale,
    dbias,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    square = step * C * C
    line = step * C
    r = tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = r < C
    column = j < C
    source = tl.load(permutation + line + r, mask=row, other=0).to(tl.int32)
    d_m = tl.load(doffset + line + r, mask=row, other=0.0).to(tl.float64)
    diagonal_j = tl.exp(tl.load(log_s + line + j, mask=column, other=0.0).to(tl.float64))
    diagonal_j *= tl.load(sign + line + j, mask=column, other=1.0).to(tl.float64)
    stretch_j = tl.exp(tl.load(log_scale + line + j, mask=column, other=0.0).to(tl.float64))
    bias_j = tl.load(bias + line + j, mask=column, other=0.0).to(tl.float64)
    here = square + r[:, None] * C + j[None, :]
    inside = row[:, None] & column[None, :]
    total = tl.load(dlogdet).to(tl.float64)

    # With D = dmatrix + doffset bias^T, through M = P L (U exp(log_scale)): dU exp(log_scale) = L^T P^T D, and
    # likewise q = L^T P^T doffset for the bias. Row i of P^T D stands at permutation[i].
    d = tl.load(dmatrix + here, mask=inside, other=0.0).to(tl.float64) + d_m[:, None] * bias_j[None, :]
    dscaled = tl.zeros((ROWS, COLUMNS), tl.float64)
    q = tl.zeros((ROWS,), tl.float64)
    for i in range(0, C):
        at = tl.load(permutation + line + i).to(tl.int32)
        left = tl.load(lower + square + at * C + r, mask=r < at, other=0.0).to(tl.float64)
        left = tl.where(r == at, 1.0, left)
        dscaled += left[:, None] * _take(d, r, i)[None, :]
        q += left * tl.load(doffset + line + i).to(tl.float64)
    above = r[:, None] < j[None, :]
    on = r[:, None] == j[None, :]
    up = tl.load(upper + here, mask=above & column[None, :], other=0.0).to(tl.float64)
    up = tl.where(on, diagonal_j[None, :], up)
    d_up = dscaled * stretch_j[None, :]
    tl.store(dupper + here, tl.where(above, d_up, 0.0).to(dupper.dtype.element_ty), mask=inside)
    d_log_scale = tl.sum(d_up * up, axis=0) + total
    tl.store(dlog_scale + line + j, d_log_scale.to(dlog_scale.dtype.element_ty), mask=column)
    d_log_s = tl.sum(tl.where(on, d_up * up, 0.0), axis=0) + total
    tl.store(dlog_s + line + j, d_log_s.to(dlog_s.dtype.element_ty), mask=column)
    d_bias = tl.sum(up * q[:, None], axis=0) * stretch_j
    tl.store(dbias + line + j, d_bias.to(dbias.dtype.element_ty), mask=column)

    # dL[:, j] = P^T D (U exp(log_scale))^T, below the diagonal
    d_low = tl.zeros((ROWS, COLUMNS), tl.float64)
    for k in range(0, C):
        bias_k = tl.load(bias + line + k).to(tl.float64)
        stretch = tl.exp(tl.load(log_scale + line + k).to(tl.float64))
        diagonal = tl.exp(tl.load(log_s + line + k).to(tl.float64)) * tl.load(sign + line + k).to(tl.float64)
        d_k = tl.load(dmatrix + square + r * C + k, mask=row, other=0.0).to(tl.float64) + d_m * bias_k
        up_k = tl.load(upper + square + j * C + k, mask=j < k, other=0.0).to(tl.float64)
        up_k = tl.where(j == k, diagonal, up_k) * stretch
        d_low += d_k[:, None] * up_k[None, :]
    below = source[:, None] > j[None, :]
    there = square + source[:, None] * C + j[None, :]
    tl.store(dlower + there, tl.where(below, d_low, 0.0).to(dlower.dtype.element_ty), mask=inside)


def _dense(op: str, permutation: Tensor, *parameters: Tensor) -> list[Tensor]:
    """What the kernels read by its address: the parameters and the permutation, row after row."""
    check_alike(op, *parameters)
    check_permutation(op, permutation, parameters[0])
    return [t.contiguous() for t in (*parameters, permutation)]


def _grid(lower: Tensor) -> tuple[int, int, int]:
    """Programs along steps and columns, and the rows of a block."""
    steps, channels, _ = lower.shape
    return steps, triton.cdiv(channels, COLUMNS), max(2, triton.next_power_of_2(channels))


def warps(channels: int) -> int:
    """One while the substitution's reductions can stay inside a warp."""
    return 1 if channels <= 64 else 4


def compose(lower, upper, log_s, log_scale, bias, sign, permutation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `flowkern.mix.mixes`: M (K, C, C), m (K, C), M^-1 (K, C, C) and the sum of log|det M_k|; above 192
    channels that itself.
    """
    if log_s.shape[1] > MOST_CHANNELS:
        return backend.default("compose")(lower, upper, log_s, log_scale, bias, sign, permutation)
    parameters = _dense("compose", permutation, lower, upper, log_s, log_scale, bias, sign)
    steps, blocks, rows = _grid(lower)
    matrix, inverse, offset, logdet = (lower.new_empty(s) for s in (lower.shape, lower.shape, log_s.shape, ()))
    with on_device_of(lower):
        _compose_kernel[(steps, blocks)](
            *parameters, matrix, offset, inverse, logdet, log_s.numel(),
            C=lower.shape[1], ROWS=rows, COLUMNS=COLUMNS, SUMMED=SUMMED, num_warps=warps(lower.shape[1]),
        )  # fmt: skip
    return matrix, offset, inverse, logdet


def compose_vjp(
    lower, upper, log_s, log_scale, bias, sign, permutation, dmatrix, doffset, dlogdet
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `flowkern.mix.mixes_vjp`: gradients of lower, upper, log_s, log_scale and bias."""
    if log_s.shape[1] > MOST_CHANNELS:
        default = backend.default("compose_vjp")
        return default(lower, upper, log_s, log_scale, bias, sign, permutation, dmatrix, doffset, dlogdet)
    parameters = _dense("compose_vjp", permutation, lower, upper, log_s, log_scale, bias, sign)
    check_alike("compose_vjp", lower, dmatrix, doffset, dlogdet)
    steps, blocks, rows = _grid(lower)
    found = tuple(p.new_empty(p.shape) for p in (lower, upper, log_s, log_scale, bias))
    with on_device_of(lower):
        _compose_vjp_kernel[(steps, blocks)](
            *parameters, dmatrix.contiguous(), doffset.contiguous(), dlogdet, *found,
            C=lower.shape[1], ROWS=rows, COLUMNS=COLUMNS, num_warps=warps(lower.shape[1]),
        )  # fmt: skip
    return found


def cases() -> Iterator[Case]:
    for kernel, label in ((_compose_kernel, "compose"), (_compose_vjp_kernel, "compose_vjp")):
        sizes = ("C", "ROWS", "COLUMNS", "SUMMED", "numbers")
        signature = {name: "*fp32" for name in kernel.arg_names if name not in sizes}
        signature |= {"numbers": "i32"} if "numbers" in kernel.arg_names else {}
        signature["permutation"] = "*i64"
        for c in (c for c in REPRESENTATIVE if c <= MOST_CHANNELS):
            rows = max(2, triton.next_power_of_2(c))
            constexprs = {"C": c, "ROWS": rows, "COLUMNS": COLUMNS, "SUMMED": SUMMED}
            constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
            yield Case(f"{label} C={c}", kernel, signature, constexprs, num_warps=warps(c))
