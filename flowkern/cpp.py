"""The `cpp` backend: the pixel ops and the coupling network by the native extension, on the CPU.

Functions have the reference's names, arguments and results. States are fp32 or fp64 (beside fp32, h may be bf16 or
fp16); a tensor in another memory layout than its op needs is copied into it, and small operands may have any strides.
Tensors elsewhere or of unsuitable dtypes raise ValueError.
"""

import functools
import os
import sys
import warnings
from array import array
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES

import torch
from torch import Tensor

from flowkern import backend, network
from flowkern.backend import OPS, Backend, register
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
    """None where the extension runs, else one sentence that says why it doesn't. Loads it once."""
    try:
        from flowkern import _C
    except ImportError as error:
        return _why_not_built() or f"the native extension does not load: {error}"
    if isa := os.environ.get("FLOWKERN_CPU_ISA"):
        try:
            _C.select_isa(isa)
        except ValueError as error:
            warnings.warn(f"FLOWKERN_CPU_ISA: {error}; native kernels are off", stacklevel=2)
            return f"FLOWKERN_CPU_ISA: {error}"
    return None


def build_config() -> dict:
    """What was compiled: version, compiler, OpenMP, and the instruction sets compiled, supported here, and in use."""
    if (why := probe()) is not None:
        raise RuntimeError(why)
    return _native().build_config()


def kept_scratch(afresh: bool = False) -> int:
    """Bytes of scratch memory that threads have used and keep for their next calls, at most 4 MiB each.

    afresh: have the next call tell what is used from now on.
    """
    if probe() is not None:
        return 0
    found = _native().kept_scratch()
    if afresh:
        _native().count_scratch_afresh()
    return found


def _why_not_built() -> str | None:
    folder = os.path.dirname(__file__)
    if any(os.path.exists(os.path.join(folder, f"_C{suffix}")) for suffix in EXTENSION_SUFFIXES):
        return None
    reason = os.path.join(folder, "_build_error.txt")
    if os.path.exists(reason):
        with open(reason) as file:
            return f"the native extension was not built: {file.read().strip()}"
    return "the native extension was not built: flowkern is not installed (pip install -e .)"


@functools.cache
def _native():
    from flowkern import _C

    return _C


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool = False) -> Tensor:
    check_alike("channel_mix", x, matrix, offset)
    n, c, height, width = x.shape
    x, offset, y = channels_last(x), offset.contiguous(), empty_channels_last(x)
    _native().mix(torch.get_num_threads(), _TYPES[x.dtype], n * height * width, c, inverse, x.data_ptr(),
                  matrix.data_ptr(), *matrix.stride(), offset.data_ptr(), y.data_ptr())
    return y


def squeeze_mix(blocks: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """The mix of the image whose blocks (N, C, 2, 2, H, W), a view, these are, squeezed."""
    return channel_mix(_as_state(blocks), matrix, offset)


def _as_state(x: Tensor) -> Tensor:
    """As `flowkern.chain.as_state`, in one copy."""
    if x.dim() != 6:
        return channels_last(x)
    check_alike("squeeze_mix", x)
    n, c, _, _, height, width = x.shape
    y = x.new_empty((n, height, width, 4 * c)).permute(0, 3, 1, 2)
    _native().squeeze(torch.get_num_threads(), _TYPES[x.dtype], n, c, height, width, x.stride(), x.data_ptr(),
                      y.data_ptr())
    return y


def couple(x: Tensor, h: Tensor, scale: str, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return _couple(x, h, scale, alpha, inverse, (0, 0, 0, 0))


def couple_mix(x: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    check_alike("couple_mix", x, matrix, offset)
    offset = offset.contiguous()
    return _couple(x, h, scale, alpha, False, (matrix.data_ptr(), *matrix.stride(), offset.data_ptr()))


def mix_couple(y: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    check_alike("mix_couple", y, matrix, offset)
    offset = offset.contiguous()
    return _couple(y, h, scale, alpha, True, (matrix.data_ptr(), *matrix.stride(), offset.data_ptr()))


def _couple(x, h, scale, alpha, inverse, mix) -> tuple[Tensor, Tensor]:
    check_alike("couple", x, h=h)
    n, c, height, width = x.shape
    x, h, y, logdet = channels_last(x), channels_last(h), empty_channels_last(x), x.new_empty(n)
    _native().couple(torch.get_num_threads(), _TYPES[x.dtype], _TYPES[h.dtype], n, height * width, c, _SCALES[scale],
                     alpha, inverse, x.data_ptr(), h.data_ptr(), *mix, y.data_ptr(), logdet.data_ptr())
    return y, logdet


def couple_vjp(v: Tensor, g: Tensor, h: Tensor, glogdet: Tensor, scale: str, alpha: float,
               inverse: bool = False, given_input: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("couple_vjp", v, g, glogdet, h=h)
    n, c, height, width = v.shape
    v, g, h, glogdet = channels_last(v), channels_last(g), channels_last(h), glogdet.contiguous()
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    dv, dh = empty_channels_last(v), empty_channels_last(h)
    _native().couple_vjp(torch.get_num_threads(), _TYPES[v.dtype], _TYPES[h.dtype], n, height * width, c,
                         _SCALES[scale], alpha, inverse, given_input, v.data_ptr(), g.data_ptr(), h.data_ptr(),
                         glogdet.data_ptr(), rebuilt.data_ptr(), dv.data_ptr(), dh.data_ptr())
    return rebuilt, dv, dh


def mix_vjp(v: Tensor, g: Tensor, matrix: Tensor, inverse_matrix: Tensor, offset: Tensor,
            inverse: bool = False, given_input: bool = False,
            into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmatrix, doffset = sums_of_mix(v, into)
    check_alike("mix_vjp", v, g, matrix, inverse_matrix, offset, dmatrix, doffset)
    n, c, height, width = v.shape
    v, g, offset = channels_last(v), channels_last(g), offset.contiguous()
    rebuilt = v.new_empty(0) if given_input else empty_channels_last(v)
    dv = empty_channels_last(v)
    _native().mix_vjp(torch.get_num_threads(), _TYPES[v.dtype], n * height * width, c, inverse, given_input,
                      v.data_ptr(), g.data_ptr(), matrix.data_ptr(), *matrix.stride(), inverse_matrix.data_ptr(),
                      *inverse_matrix.stride(), offset.data_ptr(), rebuilt.data_ptr(), dv.data_ptr(),
                      dmatrix.data_ptr(), doffset.data_ptr())
    return rebuilt, dv, dmatrix, doffset


def _shrink(z, g, lam, result, dlam) -> None:
    _native().shrink(torch.get_num_threads(), _TYPES[z.dtype], z.numel(), z.data_ptr(), g, lam.data_ptr(),
                     result.data_ptr(), dlam)


def shrink(z: Tensor, lam: Tensor) -> Tensor:
    check_alike("shrink", z, lam)
    result = torch.empty_like(z)
    _shrink(in_order_of(z, result), 0, lam, result, 0)
    return result


def shrink_vjp(z: Tensor, g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    check_alike("shrink_vjp", z, g, lam)
    dz, dlam = torch.empty_like(z), torch.empty_like(lam)
    z, g = in_order_of(z, dz), in_order_of(g, dz)
    _shrink(z, g.data_ptr(), lam, dz, dlam.data_ptr())
    return dz, dlam


def data_consistency(x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    try:
        return torch.lerp(x, y, mu)  # the same in one pass, of which a loop of our own has nothing to spare
    except RuntimeError:
        check_alike("data_consistency", x, y, mu)  # which takes a tenth of the whole, and PyTorch refuses the same
        raise


def data_consistency_vjp(x: Tensor, y: Tensor, g: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("data_consistency_vjp", x, y, g, mu)
    dx, dy, dmu = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mu)
    x, y, g = in_order_of(x, dx), in_order_of(y, dx), in_order_of(g, dx)
    _native().consistency_vjp(torch.get_num_threads(), _TYPES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(),
                              g.data_ptr(), mu.data_ptr(), dx.data_ptr(), dy.data_ptr(), dmu.data_ptr())
    return dx, dy, dmu


def compose(lower: Tensor, upper: Tensor, log_s: Tensor, log_scale: Tensor, bias: Tensor, sign: Tensor,
            permutation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `flowkern.mix.mixes`, in one call."""
    check_alike("compose", lower, upper, log_s, log_scale, bias, sign)
    check_permutation("compose", permutation, lower)
    operands = [p.contiguous() for p in (lower, upper, log_s, log_scale, bias, sign, permutation)]
    results = [lower.new_empty(shape) for shape in (lower.shape, log_s.shape, lower.shape, ())]
    _native().compose(torch.get_num_threads(), _TYPES[lower.dtype], *log_s.shape,
                      *(t.data_ptr() for t in (*operands, *results)))
    return tuple(results)


def compose_vjp(lower: Tensor, upper: Tensor, log_s: Tensor, log_scale: Tensor, bias: Tensor, sign: Tensor,
                permutation: Tensor, dmatrix: Tensor, doffset: Tensor, dlogdet: Tensor) -> tuple[Tensor, ...]:
    """As `flowkern.mix.mixes_vjp`, in one call."""
    parameters = [lower, upper, log_s, log_scale, bias]
    check_alike("compose_vjp", *parameters, sign, dmatrix, doffset, dlogdet)
    check_permutation("compose_vjp", permutation, lower)
    operands = [t.contiguous() for t in (*parameters, sign, permutation, dmatrix, doffset, dlogdet)]
    results = tuple(p.new_empty(p.shape) for p in parameters)
    _native().compose_vjp(torch.get_num_threads(), _TYPES[lower.dtype], *log_s.shape,
                          *(t.data_ptr() for t in (*operands, *results)))
    return results


def network_tiled(parameters_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the native loops run, whose hidden gradients are a chunk of pixels at a time."""
    return parameters_dtype == torch.float32 and dtype in _TYPES and _native().network_runs(_TYPES[dtype])


def chain(x: Tensor, matrix: Tensor, offset: Tensor, inverse: Tensor, *, parameters: Sequence[Tensor], reverse: bool,
          scale: str, alpha: float, dtype: torch.dtype, memory: str, anchor_every: int, table):
    """A level's steps in one call, as the default in `flowkern.chain`, which serves where there are no native loops."""
    if not _chained([matrix, offset, inverse, *parameters], dtype, x):
        return backend.default("chain")(
            x, matrix, offset, inverse, parameters=parameters, reverse=reverse, scale=scale, alpha=alpha, dtype=dtype,
            memory=memory, anchor_every=anchor_every, table=table)
    check_alike("chain", x, matrix, offset, inverse, *parameters)
    x = _as_state(x)
    n, channels, height, width = x.shape

    def empty(channels: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty((n, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)

    kept = []
    for position in range(len(matrix)):
        k = len(matrix) - 1 - position if reverse else position
        w1, *_, w3, _, _ = parameters[network.PARAMETERS * k : network.PARAMETERS * (k + 1)]
        every = 1 if memory != "recompute" else anchor_every
        states = [empty(channels)] if every and position and position % every == 0 else []
        kept.append(states + [empty(len(w), dtype) for w in (w3, w1, w1) if memory == "store"])
    out, logdet = empty(channels), x.new_empty(n)
    addresses, strides, _owners = _addresses(parameters)
    hidden = [len(w) for w in parameters[:: network.PARAMETERS]]
    settings = _TYPES[dtype], n, height, width, channels, _SCALES[scale], alpha, reverse, memory != "recompute"
    mixes = [t.contiguous() for t in (matrix, offset, inverse)]
    _native().chain(torch.get_num_threads(), settings, hidden, addresses, strides, *(t.data_ptr() for t in mixes),
                    x.data_ptr(), _kept(kept, memory), out.data_ptr(), logdet.data_ptr())
    return out, logdet, kept


def chain_vjp(boundary: Tensor, g: Tensor, glogdet: Tensor, kept: list[list[Tensor]], matrix: Tensor, offset: Tensor,
              inverse: Tensor, *, parameters: Sequence[Tensor], need: Sequence[bool], reverse: bool, scale: str,
              alpha: float, dtype: torch.dtype, memory: str, table):
    """The reverse pass of `chain`, as the default in `flowkern.chain`."""
    if not _chained([matrix, offset, inverse, boundary, *parameters], dtype, g):
        return backend.default("chain_vjp")(
            boundary, g, glogdet, kept, matrix, offset, inverse, parameters=parameters, need=need, reverse=reverse,
            scale=scale, alpha=alpha, dtype=dtype, memory=memory, table=table)
    check_alike("chain_vjp", g, glogdet, boundary, matrix, offset, inverse, *parameters)
    boundary, g, glogdet = channels_last(boundary), channels_last(g), glogdet.contiguous()
    n, channels, height, width = g.shape
    kept = [[channels_last(t) for t in tensors] for tensors in kept]
    gradients = [torch.empty_like(p) if needed else None for p, needed in zip(parameters, need, strict=True)]
    dmatrix, doffset, dx = matrix.new_empty(matrix.shape), offset.new_empty(offset.shape), empty_channels_last(g)
    rebuilt = empty_channels_last(g) if memory == "recompute" else None
    addresses, strides, _owners = _addresses(parameters)
    into, into_strides, _ = _addresses(gradients)
    hidden = [len(w) for w in parameters[:: network.PARAMETERS]]
    settings = _TYPES[dtype], n, height, width, channels, _SCALES[scale], alpha, reverse, memory != "recompute"
    mixes = [t.contiguous() for t in (matrix, offset, inverse)]
    _native().chain_vjp(torch.get_num_threads(), settings, hidden, addresses, strides, into, into_strides,
                        *(t.data_ptr() for t in mixes), boundary.data_ptr(), g.data_ptr(), glogdet.data_ptr(),
                        _kept(kept, memory), dmatrix.data_ptr(), doffset.data_ptr(), dx.data_ptr(),
                        0 if rebuilt is None else rebuilt.data_ptr())
    return dx, dmatrix, doffset, gradients, rebuilt


def _chained(others: Sequence[Tensor], dtype: torch.dtype, x: Tensor) -> bool:
    """Whether the native loop over steps serves: fp32 throughout, loops for the networks, some pixels."""
    single = all(t.dtype == torch.float32 for t in (x, *others))
    return single and x.numel() > 0 and network_tiled(torch.float32, dtype)


def _kept(kept: Sequence[Sequence[Tensor]], memory: str) -> list[int]:
    """What each step keeps as the native loop takes it: addresses of its state, h and two hidden activations, or 0."""
    outputs = 3 * (memory == "store")
    pointers = []
    for tensors in kept:
        addresses = [t.data_ptr() for t in tensors]
        pointers += [0] * (1 + outputs - len(tensors)) + addresses + [0] * (3 - outputs)
    return pointers


def _addresses(parameters: Sequence[Tensor | None]) -> tuple[array, array, list[Tensor | None]]:
    """The addresses of one or several steps' nine parameters, 0 for what is missing, the strides of each step's three
    weights, and what has to live as long as the addresses are used: vectors are copied where they are not dense.
    """
    owners = [p if p is None or p.dim() == 4 else p.contiguous() for p in parameters]
    weights = (p for i, p in enumerate(owners) if i % network.PARAMETERS in (0, 3, 6))
    # Arrays, as a list's integers take 40 bytes each while the loops run, which is where memory peaks.
    strides = array("q", [s for w in weights for s in ((0,) * 4 if w is None else w.stride())])
    return array("q", [0 if p is None else p.data_ptr() for p in owners]), strides, owners


def _is_image(x: Tensor) -> bool:
    """Whether the loops can read x as it is: fp32, and a pixel's channels contiguous."""
    return x.dtype == torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1)


def _image(x: Tensor) -> Tensor:
    """x as the loops read it: itself, or a copy."""
    return x if _is_image(x) else channels_last(x.float())


def _strides(x: Tensor) -> list[int]:
    """Of samples, rows and pixels."""
    return [x.stride(0), x.stride(2), x.stride(3)]


register(Backend("cpp", devices=("cpu",), probe=probe, load=lambda: sys.modules[__name__],
                 preferred={"cpu": (*OPS, "compose", "compose_vjp", "squeeze_mix", "network_tiled", "chain",
                                    "chain_vjp")}))
