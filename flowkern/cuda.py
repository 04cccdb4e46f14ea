"""The `cuda` backend: the pixel ops of `flowkern.reference` by the native extension's CUDA kernels.

Functions have the reference's names, arguments and results, with the liberties that `flowkern.backend` grants. States
are fp32 or fp64 (beside fp32, h may be bf16 or fp16); tensors in another memory layout than their op needs are copied
into it. Work is queued on the tensors' current stream. Tensors on different devices or of unsuitable dtypes raise
ValueError before anything is launched; a launch that fails raises RuntimeError and names the op and its shapes.
"""

import contextlib
import functools
import sys

import torch
from torch import Tensor

from flowkern import backend, cpp, triton  # noqa: F401  registers first: "auto" prefers a later one
from flowkern.layout import (
    channels_last,
    check_alike,
    check_permutation,
    empty_channels_last,
    in_order_of,
    sums_of_mix,
)

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SCALES = {"softclamp": 0, "sigmoid": 1, "additive": 2}


@functools.cache
def probe() -> str | None:
    """None where the kernels can run, else one sentence that says why not."""
    if (why := cpp.probe()) is not None:
        return why
    built = cpp.build_config()
    if built["cuda"] is None:
        return f"the native extension was built without CUDA: {built['cuda_missing']}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    oldest = min(int(arch.rstrip("af")) for arch in built["cuda"].split())
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < oldest:
        return f"the GPU has compute capability {major}.{minor}; the kernels were built for {built['cuda']} and later"
    if why := _native().runtime_error():
        return f"the CUDA runtime that the extension was built with finds no device, though torch's does: {why}"
    return None


@functools.cache
def _native():
    from flowkern import _C

    return _C.cuda


def _device_and_stream(x: Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _guard(x: Tensor):
    return torch.cuda.device(x.device)


@contextlib.contextmanager
def _launching(op: str, *tensors: Tensor):
    """The module and where to queue work; an error inside gets the op's name and the tensors' shapes."""
    with _guard(tensors[0]):
        try:
            yield _native(), _device_and_stream(tensors[0])
        except RuntimeError as error:
            shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
            raise RuntimeError(f"the cuda backend could not launch {op} on {shapes}: {error}") from error


def _rows(x: Tensor) -> Tensor:
    """x with a pixel's channels contiguous, pixel after pixel, and at an address that suits accesses of 16 bytes."""
    x = channels_last(x)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool = False) -> Tensor:
    check_alike("channel_mix", x, matrix, offset)
    n, c, height, width = x.shape
    x, offset, y = _rows(x), offset.contiguous(), empty_channels_last(x)
    with _launching("channel_mix", x, matrix) as (native, where):
        native.mix(*where, _TYPES[x.dtype], n * height * width, c, inverse, x.data_ptr(), matrix.data_ptr(),
                   *matrix.stride(), offset.data_ptr(), y.data_ptr())
    return y


def couple(x: Tensor, h: Tensor, scale: str, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    check_alike("couple", x, h=h)
    return _couple("couple", x, h, scale, alpha, inverse, (0, 0, 0, 0))


def couple_mix(x: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    check_alike("couple_mix", x, matrix, offset, h=h)
    offset = offset.contiguous()
    mix = (matrix.data_ptr(), *matrix.stride(), offset.data_ptr())
    return _couple("couple_mix", x, h, scale, alpha, False, mix)


def mix_couple(y: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    check_alike("mix_couple", y, matrix, offset, h=h)
    offset = offset.contiguous()
    mix = (matrix.data_ptr(), *matrix.stride(), offset.data_ptr())
    return _couple("mix_couple", y, h, scale, alpha, True, mix)


def _couple(op, x, h, scale, alpha, inverse, mix) -> tuple[Tensor, Tensor]:
    n, c, height, width = x.shape
    parts = _native().couple_parts(n, height * width, c)
    x, h, y, logdet = _rows(x), _rows(h), empty_channels_last(x), x.new_empty((n, parts))
    with _launching(op, x, h) as (native, where):
        native.couple(*where, _TYPES[x.dtype], _TYPES[h.dtype], n, height * width, c, _SCALES[scale], alpha, inverse,
                      x.data_ptr(), h.data_ptr(), *mix, y.data_ptr(), logdet.data_ptr(), parts)
    return y, logdet


def couple_vjp(v: Tensor, g: Tensor, h: Tensor, glogdet: Tensor, scale: str, alpha: float,
               inverse: bool = False, given_input: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("couple_vjp", v, g, glogdet, h=h)
    n, c, height, width = v.shape
    v, g, h, glogdet = _rows(v), _rows(g), _rows(h), glogdet.contiguous()
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    dv, dh = empty_channels_last(v), empty_channels_last(h)
    with _launching("couple_vjp", v, h) as (native, where):
        native.couple_vjp(*where, _TYPES[v.dtype], _TYPES[h.dtype], n, height * width, c, _SCALES[scale], alpha,
                          inverse, given_input, v.data_ptr(), g.data_ptr(), h.data_ptr(), glogdet.data_ptr(),
                          rebuilt.data_ptr(), dv.data_ptr(), dh.data_ptr())
    return rebuilt, dv, dh


def mix_vjp(v: Tensor, g: Tensor, matrix: Tensor, inverse_matrix: Tensor, offset: Tensor,
            inverse: bool = False, given_input: bool = False,
            into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmatrix, doffset = sums_of_mix(v, into)
    check_alike("mix_vjp", v, g, matrix, inverse_matrix, offset, dmatrix, doffset)
    n, c, height, width = v.shape
    v, g, offset = _rows(v), _rows(g), offset.contiguous()
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    dv, kind, pixels = empty_channels_last(v), _TYPES[v.dtype], n * height * width
    scratch = _native().mix_vjp_workspace(kind, pixels, c, inverse, given_input)
    workspace = torch.empty(scratch, dtype=torch.uint8, device=v.device)
    with _launching("mix_vjp", v, matrix) as (native, where):
        native.mix_vjp(*where, kind, pixels, c, inverse, given_input, v.data_ptr(), g.data_ptr(), matrix.data_ptr(),
                       *matrix.stride(), inverse_matrix.data_ptr(), *inverse_matrix.stride(), offset.data_ptr(),
                       rebuilt.data_ptr(), dv.data_ptr(), dmatrix.data_ptr(), doffset.data_ptr(), workspace.data_ptr())
    return rebuilt, dv, dmatrix, doffset


def _partial_sums(x: Tensor) -> Tensor:
    """Scratch memory for the sum over all of x's elements."""
    return torch.empty(_native().pointwise_parts(x.numel()), dtype=torch.float64, device=x.device)


def shrink(z: Tensor, lam: Tensor) -> Tensor:
    check_alike("shrink", z, lam)
    result = torch.empty_like(z)
    z = in_order_of(z, result)
    with _launching("shrink", z) as (native, where):
        native.shrink(*where, _TYPES[z.dtype], z.numel(), z.data_ptr(), 0, lam.data_ptr(), result.data_ptr(), 0, 0)
    return result


def shrink_vjp(z: Tensor, g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    check_alike("shrink_vjp", z, g, lam)
    dz, dlam, sums = torch.empty_like(z), torch.empty_like(lam), _partial_sums(z)
    z, g = in_order_of(z, dz), in_order_of(g, dz)
    with _launching("shrink_vjp", z) as (native, where):
        native.shrink(*where, _TYPES[z.dtype], z.numel(), z.data_ptr(), g.data_ptr(), lam.data_ptr(), dz.data_ptr(),
                      dlam.data_ptr(), sums.data_ptr())
    return dz, dlam


def data_consistency(x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    check_alike("data_consistency", x, y, mu)
    result = torch.empty_like(x)
    x, y = in_order_of(x, result), in_order_of(y, result)
    with _launching("data_consistency", x) as (native, where):
        native.consistency(*where, _TYPES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(), 0, mu.data_ptr(),
                           result.data_ptr(), 0, 0, 0)
    return result


def data_consistency_vjp(x: Tensor, y: Tensor, g: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("data_consistency_vjp", x, y, g, mu)
    dx, dy, dmu, sums = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mu), _partial_sums(x)
    x, y, g = in_order_of(x, dx), in_order_of(y, dx), in_order_of(g, dx)
    with _launching("data_consistency_vjp", x) as (native, where):
        native.consistency(*where, _TYPES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(), g.data_ptr(), mu.data_ptr(),
                           dx.data_ptr(), dy.data_ptr(), dmu.data_ptr(), sums.data_ptr())
    return dx, dy, dmu


def compose(lower: Tensor, upper: Tensor, log_s: Tensor, log_scale: Tensor, bias: Tensor, sign: Tensor,
            permutation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flowkern.mix.mixes` in one launch; above 192 channels, where a warp no longer holds a column, that itself."""
    parameters = (lower, upper, log_s, log_scale, bias, sign)
    steps, channels = log_s.shape
    if channels > _native().COMPOSE_CHANNELS:
        return backend.default("compose")(*parameters, permutation)
    check_alike("compose", *parameters)
    check_permutation("compose", permutation, lower)
    parameters, permutation = [p.contiguous() for p in parameters], permutation.contiguous()
    results = (torch.empty_like(parameters[0]), torch.empty_like(parameters[2]), torch.empty_like(parameters[0]),
               lower.new_empty(()))
    with _launching("compose", lower) as (native, where):
        native.compose(*where, _TYPES[lower.dtype], steps, channels, *(p.data_ptr() for p in parameters),
                       permutation.data_ptr(), *(r.data_ptr() for r in results))
    return results


def compose_vjp(lower: Tensor, upper: Tensor, log_s: Tensor, log_scale: Tensor, bias: Tensor, sign: Tensor,
                permutation: Tensor, dmatrix: Tensor, doffset: Tensor, dlogdet: Tensor) -> tuple[Tensor, ...]:
    """`flowkern.mix.mixes_vjp` in one launch."""
    check_alike("compose_vjp", lower, upper, log_s, log_scale, bias, sign, dmatrix, doffset, dlogdet)
    check_permutation("compose_vjp", permutation, lower)
    parameters = [p.contiguous() for p in (lower, upper, log_s, log_scale, bias)]
    steps, channels = log_s.shape
    operands = [*parameters, *(t.contiguous() for t in (sign, permutation, dmatrix, doffset, dlogdet))]
    results = tuple(torch.empty_like(p) for p in parameters)
    with _launching("compose_vjp", lower) as (native, where):
        native.compose_vjp(*where, _TYPES[lower.dtype], steps, channels, *(t.data_ptr() for t in (*operands, *results)))
    return results


# Measured on an H200 (docs/gpu.md): faster than Triton's wherever channels are mixed, and not slower by much elsewhere.
backend.register(
    backend.Backend("cuda", devices=("cuda",), probe=probe, load=lambda: sys.modules[__name__],
                    preferred={"cuda": (*backend.OPS, "compose", "compose_vjp")})
)
