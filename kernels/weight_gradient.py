"""Gradients of the coupling network's weights and biases: products over all pixels, split over programs.

Each program adds up a run of pixels and leaves its partial sums, in an order that depends on the shapes alone; the
kernel that carries gradients back to the parameters adds up the parts (`flowkern.kernels.folding`).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.convolution import MULTIPROCESSORS, PRECISIONS, SHAPES, read_pixels, usual
from flowkern.kernels.launch import cover, on_device_of
from flowkern.kernels.rounding import product, products_of, small_blocks


@triton.jit(do_not_specialize=["pixels"])
def _weight_gradient_kernel(
    left,  # (pixels, M); with LEFT, (pixels, LEFT), pixels `stride` apart, gathered as for a transposed convolution
    right,  # (pixels, N); with RIGHT, (pixels, RIGHT), pixels `stride` apart, gathered
    partial,  # (parts, M, N), fp32
    sums,  # (parts, M), fp32: of the left operand over pixels
    pixels,
    height,
    width,
    stride,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    i = tl.arange(0, BLOCK_K)[:, None]
    for k in range(RUN):
        first = (part * RUN + k) * BLOCK_K
        b_left = read_pixels(left, first, i, m[None, :], pixels, height, width, stride, M, LEFT, True)
        b_right = read_pixels(right, first, i, n[None, :], pixels, height, width, stride, N, RIGHT, False)
        total = product(tl.trans(b_left), b_right, total, left.dtype.element_ty, PRECISION)
        if tile % across == 0:
            # Number by number: summing over pixels here would make the threads wait for each other at every block.
            column += b_left.to(tl.float32)
    here = (part * M + m[:, None]) * N + n[None, :]
    tl.store(partial + here, total, mask=(m < M)[:, None] & (n < N)[None, :])
    if tile % across == 0:
        tl.store(sums + part * M + m, tl.sum(column, axis=0), mask=m < M)


def blocks(m: int, n: int, gathered: str | None, dtype: torch.dtype, products: str) -> tuple[int, int, int, int]:
    """Rows, columns and depth of a block, and warps. Gathering costs more instructions and registers than the products
    that follow: where the left operand is gathered, few of its rows meet many columns.
    """
    most = 64 if small_blocks(products) else 128
    rows, columns = min(cover(m), 64 if gathered == "left" else most), min(cover(n), most)
    return rows, columns, 128 // dtype.itemsize, 8 if rows * columns >= 128 * 64 else 4


def runs(pixels: int, tiles: int, block: int) -> tuple[int, int]:
    """How many blocks of pixels one program adds up, and into how many parts that splits the sum: about as many
    programs as a large GPU has multiprocessors. Rounded up to a few sizes, each of which is compiled once.
    """
    wanted = triton.cdiv(triton.cdiv(pixels, block), max(1, MULTIPROCESSORS // tiles))
    step = 1 << max(0, wanted.bit_length() - 3)
    run = triton.cdiv(wanted, step) * step
    return run, triton.cdiv(pixels, run * block)


def weight_gradient(
    left: Tensor, right: Tensor, m: int, n: int, gathered: str | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Partial sums over pixels of left^T right, (parts, m, n), and of left, (parts, m), in fp32.

    left (N, ., H, W) and right (N, ., H, W); the `gathered` one ("left" or "right") has pixels `stride` numbers apart
    and stands for its nine neighbours, tap by tap.
    """
    images, _, height, width = left.shape
    pixels = images * height * width
    products = products_of(left.dtype)
    block_m, block_n, block_k, warps = blocks(m, n, gathered, left.dtype, products)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    run, parts = runs(pixels, tiles, block_k)
    partial, sums = (torch.empty(s, dtype=torch.float32, device=left.device) for s in ((parts, m, n), (parts, m)))
    with on_device_of(left):
        _weight_gradient_kernel[(tiles, parts)](
            left, right, partial, sums, pixels, height, width, stride, M=m, N=n,
            LEFT=m // 9 if gathered == "left" else 0, RIGHT=n // 9 if gathered == "right" else 0,
            PRECISION=products, RUN=run, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
    return partial, sums


def cases() -> Iterator[Case]:
    for precision, (dtype, products, levels) in PRECISIONS.items():
        word = "fp32" if dtype == torch.float32 else precision
        for level, (pixels, few_in, few_out, hidden) in ((level, SHAPES[level]) for level in levels):
            convolutions = ((hidden, 9 * few_in, "right"), (hidden, hidden, None), (9 * few_out, hidden, "left"))
            for i, (m, n, gathered) in enumerate(convolutions, 1):
                rows, columns, depth, warps = blocks(m, n, gathered, dtype, products)
                run, _ = runs(pixels, triton.cdiv(m, rows) * triton.cdiv(n, columns), depth)
                yield Case(
                    f"weight_gradient {i} {precision} {level}",
                    _weight_gradient_kernel,
                    {"left": f"*{word}", "right": "*fp32" if gathered == "right" else f"*{word}"}
                    | dict.fromkeys(("partial", "sums"), "*fp32")
                    | dict.fromkeys(("pixels", "height", "width", "stride"), "i32"),
                    dict(
                        M=m, N=n, LEFT=few_out if gathered == "left" else 0, RIGHT=few_in if gathered == "right" else 0,
                        PRECISION=products, RUN=run, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth,
                    ),
                    warps,
                    integers=usual(level, few_out if gathered == "left" else 2 * few_in),
                )  # fmt: skip
