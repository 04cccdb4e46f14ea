"""The coupling of one step fused with the channel mix of the next, and their inverses in the other order."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.couple import NETWORK_TYPES, couple
from flowkern.kernels.formulas import scale_terms
from flowkern.kernels.launch import cover, on_device_of, shared_memory
from flowkern.kernels.mix import DEPTH, REPRESENTATIVE, channel_mix, columns, fits, usual
from flowkern.layout import channels_last, check_alike, empty_channels_last
from flowkern.reference import SCALES


@triton.jit
def _couple_mix_kernel(
    x,  # (N, pixels, C)
    h,  # (N, pixels, C): raw, t; or (N, pixels, C / 2): t
    matrix,  # (C, C), any strides
    offset,  # (C,)
    y,  # (N, pixels, C)
    logdet,  # (N, tiles)
    pixels,
    tiles,
    row,
    column,
    alpha,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    H: tl.constexpr = C // 2
    program = tl.program_id(0)
    sample = program // tiles
    p = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    within = (p < pixels)[:, None]
    pixel = (sample.to(tl.int64) * pixels + p)[:, None]
    out = tl.arange(0, OUT)
    total = tl.zeros((PIXELS, OUT), tl.float32)
    log_total = tl.zeros((PIXELS, DEPTH), tl.float32)
    for first in range(0, H, DEPTH):
        c = first + tl.arange(0, DEPTH)
        inside = within & (c < H)[None, :]
        state = pixel * C + c[None, :]
        a = tl.load(x + state, mask=inside, other=0.0)
        b = tl.load(x + state + H, mask=inside, other=0.0)
        if SCALE == "additive":
            t = tl.load(h + pixel * H + c[None, :], mask=inside, other=0.0).to(tl.float32)
            b = b - t if INVERSE else b + t
        else:
            raw = tl.load(h + state, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(h + state + H, mask=inside, other=0.0).to(tl.float32)
            log_s, s, inverse_s, _ = scale_terms(raw, alpha, SCALE)
            b = b * inverse_s - t if INVERSE else (b + t) * s
            log_total += tl.where(inside, log_s, 0.0)
        if INVERSE:
            a -= tl.load(offset + c, mask=c < H, other=0.0)[None, :]
            b -= tl.load(offset + c + H, mask=c < H, other=0.0)[None, :]
        # Beyond the halves the state is zero: raw values there may give an s of infinity.
        b = tl.where(inside, b, 0.0)
        total = tl.dot(a, columns(matrix, out, c, row, column, C), total, input_precision="ieee")
        total = tl.dot(b, columns(matrix, out, c + H, row, column, C), total, input_precision="ieee")
    if not INVERSE:
        total += tl.load(offset + out, mask=out < C, other=0.0)[None, :]
    tl.store(y + pixel * C + out[None, :], total, mask=within & (out < C)[None, :])
    log_sum = tl.sum(tl.sum(log_total, axis=1), axis=0)
    tl.store(logdet + program, -log_sum if INVERSE else log_sum)


PRODUCTS = 2  # that a turn of the loop adds, one for each half of the channels


def _blocks(pixels: int, channels: int) -> tuple[int, int]:
    """Pixels of a block and blocks of a sample."""
    block = min(max(16, 2048 // cover(channels)), cover(pixels))
    return block, triton.cdiv(pixels, block)


def warps(channels: int) -> int:
    return 4 if channels <= 64 else 8


def _run(x: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float, inverse: bool):
    check_alike("mix_couple" if inverse else "couple_mix", x, matrix, offset, h=h)
    n, c, height, width = x.shape
    if not fits(c, shared_memory(x.device), PRODUCTS):
        x, logdet = couple(x, h, scale, alpha, inverse)
        return channel_mix(x, matrix, offset, inverse), logdet
    pixels = height * width
    block, tiles = _blocks(pixels, c)
    x, h, offset, y = channels_last(x), channels_last(h), offset.contiguous(), empty_channels_last(x)
    logdet = x.new_empty((n, tiles))
    if n * tiles:
        with on_device_of(x):
            _couple_mix_kernel[(n * tiles,)](
                x, h, matrix, offset, y, logdet, pixels, tiles, *matrix.stride(), alpha,
                C=c, SCALE=scale, INVERSE=inverse, PIXELS=block, OUT=cover(c), DEPTH=DEPTH, num_warps=warps(c),
            )  # fmt: skip
    return y, logdet


def couple_mix(x: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    return _run(x, h, matrix, offset, scale, alpha, False)


def mix_couple(y: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    return _run(y, h, matrix, offset, scale, alpha, True)


def cases() -> Iterator[Case]:
    signature = dict.fromkeys(("x", "matrix", "offset", "y", "logdet"), "*fp32")
    signature |= dict.fromkeys(("pixels", "tiles", "row", "column"), "i32") | {"alpha": "fp32"}
    kinds = [(12, s, t) for s in SCALES for t in NETWORK_TYPES]
    kinds += [(c, "softclamp", t) for c in REPRESENTATIVE if c != 12 for t in ("fp32", "bf16")]
    for c, scale, kind in kinds:
        few, many = (_blocks(pixels, c)[0] for pixels in (16, 1 << 20))
        calls = [(many, False, True), (many, True, True)]
        calls += [(few, False, True)] * (few < many) + [(many, False, False)] * (kind == "bf16")
        for block, inverse, ordinary in calls:
            shape = {"C": c, "PIXELS": block, "OUT": cover(c), "DEPTH": DEPTH}
            label = f"{'mix_couple' if inverse else 'couple_mix'} C={c} {scale} {kind}, {block} pixels a block"
            yield Case(
                label if ordinary else f"{label}, any sizes", _couple_mix_kernel, signature | {"h": f"*{kind}"},
                {"SCALE": scale, "INVERSE": inverse, **shape}, warps(c), integers=usual(c) if ordinary else {},
            )  # fmt: skip
