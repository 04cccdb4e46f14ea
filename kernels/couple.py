"""The affine coupling, its inverse and its reverse-mode derivative, alone: elementwise, bounded by memory."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from flowkern.kernels.case import Case
from flowkern.kernels.formulas import scale_terms
from flowkern.kernels.launch import on_device_of
from flowkern.layout import channels_last, check_alike, empty_channels_last
from flowkern.reference import SCALES

ELEMENTS = 2048  # of one half in a block


@triton.jit
def _places(pixels, tiles, H: tl.constexpr, PIXELS: tl.constexpr, HALF: tl.constexpr):
    """What a program works on: its sample, which elements of the block exist, where they stand in the first half of the
    state, and where in a tensor of half as many channels."""
    program = tl.program_id(0)
    sample = program // tiles
    p = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, HALF)
    inside = (p < pixels)[:, None] & (c < H)[None, :]
    row = sample.to(tl.int64) * pixels + p
    return sample, inside, row[:, None] * (2 * H) + c[None, :], row[:, None] * H + c[None, :]


@triton.jit
def _couple_kernel(
    x,  # (N, pixels, 2 H)
    h,  # (N, pixels, 2 H): raw, t; or (N, pixels, H): t
    y,  # (N, pixels, 2 H)
    logdet,  # (N, tiles)
    pixels,
    tiles,
    alpha,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    PIXELS: tl.constexpr,
    HALF: tl.constexpr,
):
    sample, inside, state, shift = _places(pixels, tiles, H, PIXELS, HALF)
    tl.store(y + state, tl.load(x + state, mask=inside), mask=inside)
    b = tl.load(x + state + H, mask=inside)
    if SCALE == "additive":
        t = tl.load(h + shift, mask=inside).to(tl.float32)
        b = b - t if INVERSE else b + t
        total = 0.0
    else:
        raw = tl.load(h + state, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(h + state + H, mask=inside).to(tl.float32)
        log_s, s, inverse_s, _ = scale_terms(raw, alpha, SCALE)
        b = b * inverse_s - t if INVERSE else (b + t) * s
        total = tl.sum(tl.sum(tl.where(inside, log_s, 0.0), axis=1), axis=0)
        total = -total if INVERSE else total
    tl.store(y + state + H, b, mask=inside)
    tl.store(logdet + tl.program_id(0), total)


@triton.jit
def _unscaled(x, s, inverse_s, SCALE: tl.constexpr):
    """x / s. The sigmoid's 1 / s may overflow where x / s does not."""
    return x / s if SCALE == "sigmoid" else x * inverse_s


@triton.jit
def _couple_vjp_kernel(
    v,  # (N, pixels, 2 H)
    g,  # (N, pixels, 2 H)
    h,
    glogdet,  # (N,)
    rebuilt,  # (N, pixels, 2 H), not touched with GIVEN_INPUT
    dv,  # (N, pixels, 2 H)
    dh,
    pixels,
    tiles,
    alpha,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    GIVEN_INPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    HALF: tl.constexpr,
):
    sample, inside, state, shift = _places(pixels, tiles, H, PIXELS, HALF)
    tl.store(dv + state, tl.load(g + state, mask=inside), mask=inside)
    b = tl.load(v + state + H, mask=inside)
    gb = tl.load(g + state + H, mask=inside)
    if SCALE == "additive":
        t = tl.load(h + shift, mask=inside).to(tl.float32)
        before = b + t if INVERSE else b - t
        db = gb
        tl.store(dh + shift, (-gb if INVERSE else gb).to(dh.dtype.element_ty), mask=inside)
    else:
        raw = tl.load(h + state, mask=inside).to(tl.float32)
        t = tl.load(h + state + H, mask=inside).to(tl.float32)
        gl = tl.load(glogdet + sample)
        _, s, inverse_s, slope = scale_terms(raw, alpha, SCALE)
        if INVERSE:
            # The map is before -> before / s - t.
            quotient = _unscaled(b, s, inverse_s, SCALE) if GIVEN_INPUT else b + t
            before = quotient * s
            db = _unscaled(gb, s, inverse_s, SCALE)
            dt = -gb
            dlog_s = -(gb * quotient + gl)
        else:
            # The map is before -> (before + t) s.
            after = (b + t) * s if GIVEN_INPUT else b
            before = _unscaled(b, s, inverse_s, SCALE) - t
            db = gb * s
            dt = db
            dlog_s = gb * after + gl
        tl.store(dh + state, (dlog_s * slope).to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + state + H, dt.to(dh.dtype.element_ty), mask=inside)
    tl.store(dv + state + H, db, mask=inside)
    if not GIVEN_INPUT:
        tl.store(rebuilt + state, tl.load(v + state, mask=inside), mask=inside)
        tl.store(rebuilt + state + H, before, mask=inside)


def _blocks(pixels: int, half: int) -> tuple[int, int, int]:
    """Pixels and channels of a block, and the blocks of a sample."""
    width = triton.next_power_of_2(half)
    height = min(max(1, ELEMENTS // width), triton.next_power_of_2(max(1, pixels)))
    return height, width, triton.cdiv(pixels, height)


def couple(x: Tensor, h: Tensor, scale: str, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    check_alike("couple", x, h=h)
    n, c, height, width = x.shape
    pixels = height * width
    block, half, tiles = _blocks(pixels, c // 2)
    x, h, y = channels_last(x), channels_last(h), empty_channels_last(x)
    logdet = x.new_empty((n, tiles))
    if n * tiles:
        with on_device_of(x):
            _couple_kernel[(n * tiles,)](
                x, h, y, logdet, pixels, tiles, alpha,
                H=c // 2, SCALE=scale, INVERSE=inverse, PIXELS=block, HALF=half,
            )  # fmt: skip
    return y, logdet


def couple_vjp(
    v: Tensor,
    g: Tensor,
    h: Tensor,
    glogdet: Tensor,
    scale: str,
    alpha: float,
    inverse: bool = False,
    given_input: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("couple_vjp", v, g, glogdet, h=h)
    n, c, height, width = v.shape
    pixels = height * width
    block, half, tiles = _blocks(pixels, c // 2)
    v, g, h, glogdet = channels_last(v), channels_last(g), channels_last(h), glogdet.contiguous()
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    dv, dh = empty_channels_last(v), empty_channels_last(h)
    if n * tiles:
        with on_device_of(v):
            _couple_vjp_kernel[(n * tiles,)](
                v, g, h, glogdet, rebuilt, dv, dh, pixels, tiles, alpha,
                H=c // 2, SCALE=scale, INVERSE=inverse, GIVEN_INPUT=given_input, PIXELS=block, HALF=half,
            )  # fmt: skip
    return rebuilt, dv, dh


NETWORK_TYPES = ("fp32", "bf16", "fp16")


def cases() -> Iterator[Case]:
    numbers = {"pixels": "i32", "tiles": "i32", "alpha": "fp32"}
    forward = dict.fromkeys(("x", "y", "logdet"), "*fp32") | numbers
    backward = dict.fromkeys(("v", "g", "glogdet", "rebuilt", "dv"), "*fp32") | numbers
    kinds = [(12, s, t) for s in SCALES for t in NETWORK_TYPES] + [(96, "softclamp", t) for t in NETWORK_TYPES]
    for c, scale, kind in kinds:
        block, half, _ = _blocks(1 << 20, c // 2)
        shape = {"H": c // 2, "SCALE": scale, "PIXELS": block, "HALF": half}
        for inverse in (False, True):
            name = f"C={c} {scale} {kind}{', inverse' if inverse else ''}"
            flags = shape | {"INVERSE": inverse}
            sizes = {"pixels": 1024}
            yield Case(f"couple {name}", _couple_kernel, forward | {"h": f"*{kind}"}, flags, integers=sizes)
            signature = backward | {"h": f"*{kind}", "dh": f"*{kind}"}
            for given in (False, True):
                label = f"couple_vjp {name}{', given input' if given else ''}"
                flags = flags | {"GIVEN_INPUT": given}
                yield Case(label, _couple_vjp_kernel, signature, flags, integers=sizes)
