"""The coupling network's convolutions as matrix products over pixels, with what follows each fused into it.

A 3x3 convolution from few channels to many gathers its nine neighbours while it loads: (pixels, 9 few) @ (9 few, many).
One from many channels to few is a plain product with nine times as many columns, one group per tap, whose results
`sum_taps` adds up over neighbouring pixels: gathering there would read the wide activations nine times. So the wide
activations, where the bytes are, are read once and in order by every kernel. Gradients with respect to inputs are the
same two forms with the roles of few and many exchanged.

Weights are those of PyTorch's channels-last convolutions, (out, tap, in) in memory, in every use: transposed or with
columns taken tap by tap while they are loaded.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.formulas import rectified
from flowkern.kernels.launch import SHARED, cover, on_device_of, shared_memory
from flowkern.kernels.rounding import product, products_of, rounded, small_blocks

KINDS = ("widen", "pointwise", "taps")
MULTIPROCESSORS = 132  # of a large GPU; not asked of the device, so that results are the same bits on every one
SUM_BLOCK = 512  # elements of a program that sums taps


@triton.jit
def position(first, i, pixels, height, width):
    """Row and column in its image of pixel first + i, with a row far outside where there is no such pixel.

    Only `first` takes 64 bits: to divide every pixel's number in 64 bits would cost more than the products.
    """
    into = (first % (height * width)).to(tl.int32) + i
    return tl.where(first + i < pixels, (into // width) % height, -2), into % width


@triton.jit
def neighbour(row, column, tap, height, width, FLIPPED: tl.constexpr):
    """How many pixels on from (row, column) its neighbour of that tap lies, and whether it is inside the image.

    FLIPPED: the taps of the transposed convolution.
    """
    dy = tap // 3 - 1
    dx = tap % 3 - 1
    if FLIPPED:
        dy = -dy
        dx = -dx
    row += dy
    column += dx
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (tap < 9)
    return dy * width + dx, inside


@triton.jit
def read_pixels(
    x, first, i, k, pixels, height, width, stride, K: tl.constexpr, CHANNELS: tl.constexpr, FLIPPED: tl.constexpr
):
    """Block of x (pixels, K) or, with CHANNELS, of the neighbours of pixels `stride` apart, gathered tap by tap.

    Rows are pixels first + i, i (rows, 1), columns k (1, columns). Only `first` is wide: addresses inside a block are
    few bits away from its own, and 64-bit ones for each number cost registers.
    """
    if CHANNELS:
        row, column = position(first, i, pixels, height, width)
        on, inside = neighbour(row, column, k // CHANNELS, height, width, FLIPPED)
        return tl.load(x + first * stride + ((i + on) * stride + k % CHANNELS), mask=inside, other=0.0)
    else:
        return tl.load(x + first * K + (i * K + k), mask=(first + i < pixels) & (k < K), other=0.0)


@triton.jit
def read_weight(weight, k, n, K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, CHANNELS: tl.constexpr):
    """Block (k, n) of a (K, N) matrix. In memory rows are n, or k if TRANSPOSED; with CHANNELS, rows are wanted tap by
    tap and lie channel by channel. k (rows, 1), n (1, cols)."""
    row, column = (k, n) if TRANSPOSED else (n, k)
    if CHANNELS:
        row = (row % CHANNELS) * 9 + row // CHANNELS
    length: tl.constexpr = N if TRANSPOSED else K
    return tl.load(weight + row * length + column, mask=(k < K) & (n < N), other=0.0)


@triton.jit(do_not_specialize=["pixels"])
def _product_kernel(
    x,  # (pixels, K); with CHANNELS, (pixels, CHANNELS), pixels `stride` apart
    weight,  # K N numbers
    bias,  # (N,)
    gate,  # (pixels, N)
    out,  # (pixels, N); with PLANES, (9, pixels, PLANES)
    pixels,
    height,
    width,
    stride,
    K: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLIPPED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    GATED: tl.constexpr,
    PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = (program // across).to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)[:, None]
    n = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_x = read_pixels(x, first, i, k[None, :], pixels, height, width, stride, K, CHANNELS, FLIPPED)
        b_w = read_weight(weight, k[:, None], n, K, N, TRANSPOSED, ROWS)
        total = product(b_x, b_w, total, weight.dtype.element_ty, PRECISION)
    inside = (first + i < pixels) & (n < N)
    if RELU:
        total = rectified(total + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32))
    if GATED:
        total = tl.where(tl.load(gate + first * N + (i * N + n), mask=inside, other=0.0) > 0, total, 0.0)
    if PLANES:
        out += first * PLANES + (n // PLANES).to(tl.int64) * pixels * PLANES + (i * PLANES + n % PLANES)
    else:
        out += first * N + (i * N + n)
    tl.store(out, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _sum_taps_kernel(
    planes,  # (9, pixels, C)
    bias,  # (C,)
    out,  # (pixels, C), pixels `stride` apart
    pixels,
    height,
    width,
    stride,
    C: tl.constexpr,
    FLIPPED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = tl.cast(pixels, tl.int64) * C  # an argument of 1 is a Python integer
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first = start // C
    e = tl.arange(0, BLOCK)
    inside_out = start + e < size
    i = ((start % C).to(tl.int32) + e) // C
    c = ((start % C).to(tl.int32) + e) % C
    here = out + first * stride + (i * stride + c)
    if ADD:
        total = tl.load(here, mask=inside_out, other=0.0).to(tl.float32)
    else:
        total = tl.load(bias + c).to(tl.float32)
    row, column = position(first, i, pixels, height, width)
    for tap in tl.static_range(9):
        on, inside = neighbour(row, column, tap, height, width, FLIPPED)
        total += tl.load(planes + tap * size + start + (e + on * C), mask=inside, other=0.0).to(tl.float32)
    tl.store(here, rounded(total, out.dtype.element_ty), mask=inside_out)


def form(kind: str, backward: bool, few: int, hidden: int) -> dict[str, object]:
    """What the product kernel is told about a convolution: of kind "widen" (few -> hidden, 3x3), "pointwise" (1x1) or
    "taps" (hidden -> few, 3x3, unsummed). Forward it is followed by bias and ReLU, backward by the ReLU's mask.
    """
    ends = kind != "taps"
    return dict(
        K=9 * few if kind == "widen" else hidden,
        N=9 * few if kind == "taps" else hidden,
        CHANNELS=few if kind == "widen" else 0,
        FLIPPED=backward,
        TRANSPOSED=backward,
        # Where `few` are outputs of the convolution, its weights lie channel by channel.
        ROWS=few if kind != "pointwise" and ends == backward else 0,
        RELU=ends and not backward,
        GATED=ends and backward,
        PLANES=0 if ends else few,
    )


def blocks(
    told: dict[str, object], pixels: int, dtype: torch.dtype, products: str, shared: int
) -> tuple[dict, int, int]:
    """Block sizes, warps and stages for a product kernel that is told the above, where a block may have `shared` bytes.

    The largest block that still gives every multiprocessor of a large GPU one: large blocks read their operands less
    often, but a level of few pixels would leave most of the chip idle. None spills: gathering or masking beside 256
    columns would.
    """
    wide = cover(told["N"])
    plain = not told["CHANNELS"] and not told["GATED"]
    if small_blocks(products, shared):
        choices = [(64, 64, 4), (32, 64, 4)]
    else:
        largest = 256 if plain and dtype.itemsize == 2 and shared >= 144 << 10 else 128
        choices = [(128, largest, 8), (64, 128, 4), (32, 64, 4)]
    choices = [(rows, min(columns, wide), warps) for rows, columns, warps in choices]
    enough = (c for c in choices if triton.cdiv(pixels, c[0]) * triton.cdiv(told["N"], c[1]) >= MULTIPROCESSORS)
    rows, columns, warps = next(enough, choices[-1])
    depth = min(cover(told["K"]), 128 // dtype.itemsize)
    return dict(PRECISION=products, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth), warps, 3


def multiply(
    kind: str,
    backward: bool,
    x: Tensor,
    stride: int,
    weight: Tensor,
    ends: Tensor | None,
    out: Tensor,
    few: int,
    hidden: int,
) -> None:
    """One convolution of `form`. x (N, ., H, W) with pixels `stride` numbers apart; ends: the bias forward, the gate
    backward; out: (N, hidden, H, W) channels-last or, for "taps", (9, N, H, W, few).
    """
    n, _, height, width = x.shape
    pixels = n * height * width
    told = form(kind, backward, few, hidden)
    sizes, warps, stages = blocks(told, pixels, weight.dtype, products_of(weight.dtype), shared_memory(x.device))
    grid = (triton.cdiv(pixels, sizes["BLOCK_M"]) * triton.cdiv(told["N"], sizes["BLOCK_N"]),)
    with on_device_of(x):
        _product_kernel[grid](
            x, weight, ends if told["RELU"] else x, ends if told["GATED"] else x, out, pixels, height, width, stride,
            **told, **sizes, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def sum_taps(planes: Tensor, bias: Tensor | None, out: Tensor, stride: int) -> None:
    """Add the taps (9, N, H, W, C) over neighbouring pixels: into out (N, C, H, W), its pixels `stride` numbers apart,
    starting from the bias; without a bias, as the transposed convolution, added to what `out` holds.
    """
    _, n, height, width, channels = planes.shape
    pixels = n * height * width
    with on_device_of(planes):
        _sum_taps_kernel[(triton.cdiv(pixels * channels, SUM_BLOCK),)](
            planes, out if bias is None else bias, out, pixels, height, width, stride,
            C=channels, FLIPPED=bias is None, ADD=bias is None, BLOCK=SUM_BLOCK,
        )  # fmt: skip


SHAPES = {  # level of a Glow: pixels, channels in and out, hidden
    "first": (65536, 6, 12, 512),
    "middle": (4096, 12, 24, 512),
    "last": (1024, 48, 96, 512),
    "narrow": (65536, 6, 12, 128),
    "tiny": (35, 1, 1, 5),
}
PRECISIONS = {  # dtype, how fp32 operands are multiplied, and at which levels that is compiled
    "bf16": (torch.bfloat16, "ieee", ("first", "middle", "last", "narrow", "tiny")),
    "fp16": (torch.float16, "ieee", ("first",)),
    "tf32": (torch.float32, "tf32", ("first", "middle", "last")),
    "tf32x3": (torch.float32, "tf32x3", ("first", "last", "tiny")),
}


def usual(level: str, stride: int) -> dict[str, int]:
    """Integers for which the launcher specialises the kernels of a level."""
    side = {"first": 32, "middle": 16, "last": 4, "narrow": 32, "tiny": 5}[level]
    return {"height": side, "width": side, "stride": stride}


def cases() -> Iterator[Case]:
    for precision, (dtype, products, levels) in PRECISIONS.items():
        word = "fp32" if dtype == torch.float32 else precision
        for level, (pixels, few_in, few_out, hidden) in ((level, SHAPES[level]) for level in levels):
            for backward in (False, True):
                for kind in KINDS:
                    few = few_in if (kind == "taps") == backward else few_out
                    told = form(kind, backward, few, hidden)
                    sizes, warps, stages = blocks(told, pixels, dtype, products, SHARED)
                    of_state = kind == "widen" and not backward
                    wide_taps = kind == "taps" and precision != "bf16"
                    pointers = dict.fromkeys(("weight", "bias", "gate"), f"*{word}")
                    pointers |= {"x": "*fp32" if of_state else f"*{word}", "out": "*fp32" if wide_taps else f"*{word}"}
                    yield Case(
                        f"{kind} {'backward' if backward else 'forward'} {precision} {level}",
                        _product_kernel,
                        pointers | dict.fromkeys(("pixels", "height", "width", "stride"), "i32"),
                        told | sizes,
                        warps,
                        stages,
                        integers=usual(level, few if backward else 2 * few),
                    )
    for level in ("first", "last"):
        few = SHAPES[level][2]
        for backward in (False, True):
            yield Case(
                f"sum_taps {'backward' if backward else 'forward'} {level}",
                _sum_taps_kernel,
                {"planes": "*bf16", "bias": "*bf16", "out": "*fp32" if backward else "*bf16"}
                | dict.fromkeys(("pixels", "height", "width", "stride"), "i32"),
                dict(C=few, FLIPPED=backward, ADD=backward, BLOCK=SUM_BLOCK),
                integers=usual(level, 2 * few if backward else few),
            )
