"""Two kernels that differ in where a product's operand is used a second time."""

import triton
import triton.language as tl

from flowkern.kernels.case import Case


@triton.jit
def _together(left, right, out, sums, N: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    total, column = tl.zeros((ROWS, ROWS), tl.float32), tl.zeros((DEPTH, ROWS), tl.float32)
    for step in range(N):
        a = tl.load(left + (step * DEPTH + k[:, None]) * ROWS + i[None, :])
        b = tl.load(right + (step * DEPTH + k[:, None]) * ROWS + i[None, :])
        total = tl.dot(tl.trans(a), b, total)
        column += a.to(tl.float32)
    tl.store(out + i[:, None] * ROWS + i[None, :], total)
    tl.store(sums + i, tl.sum(column, axis=0))


@triton.jit
def _apart(left, right, out, sums, N: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    i, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    total, column = tl.zeros((ROWS, ROWS), tl.float32), tl.zeros((DEPTH, ROWS), tl.float32)
    for step in range(N):
        column += tl.load(left + (step * DEPTH + k[:, None]) * ROWS + i[None, :]).to(tl.float32)
    for step in range(N):
        a = tl.load(left + (step * DEPTH + k[:, None]) * ROWS + i[None, :])
        b = tl.load(right + (step * DEPTH + k[:, None]) * ROWS + i[None, :])
        total = tl.dot(tl.trans(a), b, total)
    tl.store(out + i[:, None] * ROWS + i[None, :], total)
    tl.store(sums + i, tl.sum(column, axis=0))


TOGETHER, APART = (
    Case(
        kernel.__name__,
        kernel,
        {"left": "*bf16", "right": "*bf16", "out": "*fp32", "sums": "*fp32"},
        dict(N=16, ROWS=128, DEPTH=64),
        8,
        3,
    )
    for kernel in (_together, _apart)
)
