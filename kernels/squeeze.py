"""The first channel mix of a level, read from the image that the level squeezes: the squeezed image is never made.

Nor is a half that a split keeps, or an image in another memory order, copied first: the 2x2 blocks come as a view.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.launch import cover, on_device_of, shared_memory
from flowkern.kernels.mix import (
    DEPTH,
    REPRESENTATIVE,
    block_pixels,
    channel_mix,
    columns,
    fits,
    usual,
    warps,
)
from flowkern.layout import check_alike


@triton.jit
def _squeeze_mix_kernel(
    blocks,  # (N, C / 4, 2, 2, H, W), any strides
    matrix,  # (C, C), any strides
    offset,  # (C,)
    y,  # (N, H, W, C)
    pixels,
    height,
    width,
    of_sample,
    of_channel,
    of_block_row,
    of_block_column,
    of_row,
    of_column,
    row,
    column,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    out = tl.arange(0, OUT)
    inside = (p < pixels)[:, None]
    sample = p // (width * height)
    place = sample * of_sample + (p // width) % height * of_row + p % width * of_column
    total = tl.zeros((PIXELS, OUT), tl.float32)
    for first in range(0, C, DEPTH):
        c = first + tl.arange(0, DEPTH)
        # Channel c of the state is channel c // 4 of the image, at row (c // 2) % 2 and column c % 2 of the block.
        there = (c // 4).to(tl.int64) * of_channel + (c // 2) % 2 * of_block_row + c % 2 * of_block_column
        b_x = tl.load(blocks + place[:, None] + there[None, :], mask=inside & (c < C)[None, :], other=0.0)
        total = tl.dot(b_x, columns(matrix, out, c, row, column, C), total, input_precision="ieee")
    total += tl.load(offset + out, mask=out < C, other=0.0)[None, :]
    tl.store(y + p[:, None] * C + out[None, :], total, mask=inside & (out < C)[None, :])


def squeeze_mix(blocks: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """`matrix @ squeeze(image) + offset`; blocks (N, C/4, 2, 2, H, W) is `flowkern.layers.blocks(image)`.

    Returns (N, C, H, W), channels-last.
    """
    check_alike("squeeze_mix", blocks, matrix, offset)
    n, _, _, _, height, width = blocks.shape
    c = len(offset)
    if not fits(c, shared_memory(blocks.device)):
        return channel_mix(blocks.flatten(1, 3), matrix, offset)
    y = blocks.new_empty((n, height, width, c)).permute(0, 3, 1, 2)
    pixels = n * height * width
    if pixels:
        block = block_pixels(c)
        with on_device_of(blocks):
            _squeeze_mix_kernel[(triton.cdiv(pixels, block),)](
                blocks, matrix, offset.contiguous(), y, pixels, height, width, *blocks.stride(), *matrix.stride(),
                C=c, PIXELS=block, OUT=cover(c), DEPTH=DEPTH, num_warps=warps(c),
            )  # fmt: skip
    return y


def cases() -> Iterator[Case]:
    tensors = dict.fromkeys(("blocks", "matrix", "offset", "y"), "*fp32")
    others = [n for n in _squeeze_mix_kernel.arg_names if n not in (*tensors, "C", "PIXELS", "OUT", "DEPTH")]
    signature = tensors | dict.fromkeys(others, "i32")
    for c in REPRESENTATIVE:
        shape = {"C": c, "PIXELS": block_pixels(c), "OUT": cover(c), "DEPTH": DEPTH}
        last = usual(c) | {"of_channel": 1, "of_block_column": c // 4, "of_column": c // 2}
        first = usual(c) | {"of_block_column": 1, "of_column": 2, "of_block_row": 64, "of_row": 128}
        for order, integers in {"channels-last": last, "channels-first": first, "any order": {}}.items():
            label = f"squeeze_mix C={c}, {order}"
            yield Case(label, _squeeze_mix_kernel, signature, shape, warps(c), integers=integers)
