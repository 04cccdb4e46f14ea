"""Gradients of the coupling network's weights and biases: products over all pixels, split over programs.

Each program adds up a run of pixels and leaves its partial sums, in an order that depends on the shapes alone; the
kernel that carries gradients back to the parameters adds up the parts (`flowkern.kernels.folding`).
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.convolution import MULTIPROCESSORS, PRECISIONS, SHAPES, read_pixels, usual
from flowkern.kernels.launch import SHARED, cover, generation, on_device_of, shared_memory
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
    i = tl.arange(0, BLOCK_K)[:, None]
    # A loop of its own: a product's operand with a second use gets no buffer to spare (`flowkern.kernels.overwritten`).
    if tile % across == 0:
        # Number by number: summing over pixels here would make the threads wait for each other at every block.
        column = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for k in range(RUN):
            first = (part * RUN + k) * BLOCK_K
            block = read_pixels(left, first, i, m[None, :], pixels, height, width, stride, M, LEFT, True)
            column += block.to(tl.float32)
        tl.store(sums + part * M + m, tl.sum(column, axis=0), mask=m < M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(RUN):
        first = (part * RUN + k) * BLOCK_K
        b_left = read_pixels(left, first, i, m[None, :], pixels, height, width, stride, M, LEFT, True)
        b_right = read_pixels(right, first, i, n[None, :], pixels, height, width, stride, N, RIGHT, False)
        total = product(tl.trans(b_left), b_right, total, left.dtype.element_ty, PRECISION)
    here = (part * M + m[:, None]) * N + n[None, :]
    tl.store(partial + here, total, mask=(m < M)[:, None] & (n < N)[None, :])


def blocks(
    m: int, n: int, gathered: str | None, dtype: torch.dtype, products: str, generation: int, shared: int
) -> tuple[dict, int, int]:
    """Block sizes, warps and stages.

    In 16 bits on sm_90 as an H200 was fastest (docs/triton-network.md): where the right operand is gathered, deep
    blocks of which fewer are under way; where the left one is, all of its rows. Elsewhere gathering on the left costs
    registers, so that few of its rows meet many columns. Twice as many columns where nothing is gathered were faster by
    a quarter when the left operand had a buffer too few, which made them wrong; as it is now they have not been timed.
    """
    most = 64 if small_blocks(products, shared) else 128
    tuned = generation == 90 and dtype.itemsize == 2
    rows = min(cover(m), 64 if gathered == "left" and not tuned else most)
    columns = min(cover(n), most)
    depth, stages = (256, 2) if tuned and gathered == "right" else (128, 3)
    warps = 8 if rows * columns >= 128 * 64 else 4
    return dict(BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth // dtype.itemsize), warps, stages


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
    device = left.device
    sizes, warps, stages = blocks(m, n, gathered, left.dtype, products, generation(device), shared_memory(device))
    tiles = triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"])
    run, parts = runs(pixels, tiles, sizes["BLOCK_K"])
    partial, sums = (torch.empty(s, dtype=torch.float32, device=left.device) for s in ((parts, m, n), (parts, m)))
    with on_device_of(left):
        _weight_gradient_kernel[(tiles, parts)](
            left, right, partial, sums, pixels, height, width, stride, M=m, N=n,
            LEFT=m // 9 if gathered == "left" else 0, RIGHT=n // 9 if gathered == "right" else 0,
            PRECISION=products, RUN=run, **sizes, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partial, sums


def cases() -> Iterator[Case]:
    for precision, (dtype, products, levels) in PRECISIONS.items():
        word = "fp32" if dtype == torch.float32 else precision
        differ = dtype.itemsize == 2
        for level, target in itertools.product(levels, (80, 90) if differ else (0,)):
            pixels, few_in, few_out, hidden = SHAPES[level]
            convolutions = ((hidden, 9 * few_in, "right"), (hidden, hidden, None), (9 * few_out, hidden, "left"))
            for i, (m, n, gathered) in enumerate(convolutions, 1):
                sizes, warps, stages = blocks(m, n, gathered, dtype, products, target, SHARED)
                tiles = triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"])
                run, _ = runs(pixels, tiles, sizes["BLOCK_K"])
                yield Case(
                    f"weight_gradient {i} {precision} {level}{f' for sm_{target}' if differ else ''}",
                    _weight_gradient_kernel,
                    {"left": f"*{word}", "right": "*fp32" if gathered == "right" else f"*{word}"}
                    | dict.fromkeys(("partial", "sums"), "*fp32")
                    | dict.fromkeys(("pixels", "height", "width", "stride"), "i32"),
                    dict(
                        M=m, N=n, LEFT=few_out if gathered == "left" else 0, RIGHT=few_in if gathered == "right" else 0,
                        PRECISION=products, RUN=run, **sizes,
                    ),
                    warps,
                    stages,
                    integers=usual(level, few_out if gathered == "left" else 2 * few_in),
                    **({"targets": (target,)} if differ else {}),
                )  # fmt: skip
