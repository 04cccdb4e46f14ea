"""The channel mix y = M x + m and its inverse."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern import reference
from flowkern.kernels.case import Case
from flowkern.kernels.launch import cover, on_device_of, shared_memory
from flowkern.layout import channels_last, check_alike, empty_channels_last

DEPTH = 16  # channels of one partial product: longer ones spill, because fp32 products keep their operands in registers


@triton.jit
def columns(matrix, out, c, row, column, C: tl.constexpr):
    """Columns c of a (C, C) matrix as a (len(c), len(out)) block of its transpose, zero beyond C."""
    inside = (out < C)[None, :] & (c < C)[:, None]
    return tl.load(matrix + out[None, :] * row + c[:, None] * column, mask=inside, other=0.0)


@triton.jit
def _mix_kernel(
    x,  # (pixels, C)
    matrix,  # (C, C), any strides
    offset,  # (C,)
    y,  # (pixels, C)
    pixels,
    row,
    column,
    C: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    out = tl.arange(0, OUT)
    inside = (p < pixels)[:, None]
    total = tl.zeros((PIXELS, OUT), tl.float32)
    for first in range(0, C, DEPTH):
        c = first + tl.arange(0, DEPTH)
        b_x = tl.load(x + p[:, None] * C + c[None, :], mask=inside & (c < C)[None, :], other=0.0)
        if INVERSE and HAS_OFFSET:
            b_x -= tl.load(offset + c, mask=c < C, other=0.0)[None, :]
        total = tl.dot(b_x, columns(matrix, out, c, row, column, C), total, input_precision="ieee")
    if HAS_OFFSET and not INVERSE:
        total += tl.load(offset + out, mask=out < C, other=0.0)[None, :]
    tl.store(y + p[:, None] * C + out[None, :], total, mask=inside & (out < C)[None, :])


def block_pixels(channels: int) -> int:
    """Pixels of a block: as many as leave a program's accumulators some 16 registers a thread, and spill nothing."""
    return 16 if channels > 64 else 4096 // cover(channels)


def warps(channels: int) -> int:
    return 4 if 64 < channels <= 128 else 8 if channels <= 256 else 16


def fits(channels: int, shared: int, products: int = 1) -> bool:
    """Whether a block of all output channels fits into `shared` bytes: of every product that a turn of the loop adds,
    two buffers of DEPTH columns of the matrix, and at most 6 KiB of the 16 pixels that are left beyond 64 channels.
    """
    return products * (2 * DEPTH * cover(channels) * 4 + (6 << 10)) <= shared


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor | None, inverse: bool = False) -> Tensor:
    """As the reference; without an offset, the product alone."""
    check_alike("channel_mix", x, matrix, *(() if offset is None else (offset,)))
    n, c, height, width = x.shape
    if not fits(c, shared_memory(x.device)):
        return reference.channel_mix(x, matrix, matrix.new_zeros(c) if offset is None else offset, inverse)
    x, y = channels_last(x), empty_channels_last(x)
    pixels = n * height * width
    if pixels:
        block = block_pixels(c)
        with on_device_of(x):
            _mix_kernel[(triton.cdiv(pixels, block),)](
                x, matrix, matrix if offset is None else offset.contiguous(), y, pixels, *matrix.stride(),
                C=c, INVERSE=inverse, HAS_OFFSET=offset is not None, PIXELS=block, OUT=cover(c), DEPTH=DEPTH,
                num_warps=warps(c),
            )  # fmt: skip
    return y


REPRESENTATIVE = (4, 12, 24, 48, 96, 192, 384)  # channels: one for every shape of block, and Glow's own


def usual(c: int) -> dict[str, int]:
    """Integers of an ordinary call: a number of pixels divisible by 16, a dense matrix."""
    return {"pixels": 1024, "row": c, "column": 1, "inverse_row": c, "inverse_column": 1}


def cases() -> Iterator[Case]:
    signature = dict.fromkeys(("x", "matrix", "offset", "y"), "*fp32")
    signature |= dict.fromkeys(("pixels", "row", "column"), "i32")
    kinds = {
        "": (False, True, usual),
        ", inverse": (True, True, usual),
        ", transposed": (False, False, lambda c: usual(c) | {"row": 1, "column": c}),
        ", any sizes": (True, True, lambda c: {}),
    }
    for c in REPRESENTATIVE:
        for kind, (inverse, has_offset, integers) in kinds.items():
            shape = {"C": c, "PIXELS": block_pixels(c), "OUT": cover(c), "DEPTH": DEPTH}
            constexprs = {"INVERSE": inverse, "HAS_OFFSET": has_offset, **shape}
            yield Case(
                f"channel_mix C={c}{kind}", _mix_kernel, signature, constexprs, warps(c), integers=integers(c)
            )  # fmt: skip
