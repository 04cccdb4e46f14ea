"""The pixel ops: torch.library schemas, fake kernels, dispatch by backend name, and their differentiable forms.

`flowkern.ops.couple(...)` and its siblings are the public, differentiable functions. Each runs a raw operator
(`torch.ops.flowkern.couple`), opaque to torch.compile, which looks up the backend's implementation by name. A raw
operator has no gradient and says so instead of returning none. Semantics: the functions of the same name in
`flowkern.reference`, which run themselves where a raw operator is opaque to what differentiates or batches it.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import Function

from flowkern import backend as backends
from flowkern import reference, transforms
from flowkern.checks import choice
from flowkern.layout import channels_last, empty_channels_last, in_order_of

LIBRARY = torch.library.Library("flowkern", "DEF")
_RESULTS = {1: "Tensor", 2: "(Tensor, Tensor)", 3: "(Tensor, Tensor, Tensor)", 4: "(Tensor, Tensor, Tensor, Tensor)"}


def define(schema: str, run, fake) -> None:
    """Register one raw operator on every device: its schema, its body and its fake kernel."""
    name = schema.split("(")[0]

    def body(*args):
        if torch.is_grad_enabled() and any(_needs_grad(a) for a in args):
            raise RuntimeError(
                f"torch.ops.flowkern.{name} is a raw operator without a gradient; "
                f"call the differentiable form in flowkern.ops, or detach its inputs"
            )
        return run(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowkern::{name}", fake, lib=LIBRARY)


def _needs_grad(value) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_needs_grad(v) for v in value)


def without_autocast(backward):
    """Backward may be called inside an autocast region; the precision was settled in forward."""

    @functools.wraps(backward)
    def run(ctx, *gradients):
        defined = [g for g in gradients if g is not None]
        if not defined:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(defined[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return run


def wants_graph() -> bool:
    """Whether backward runs under create_graph=True."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def wants_formulas() -> bool:
    """Whether backward has to be plain PyTorch: under create_graph=True, or for a batch of gradients (vmap)."""
    return wants_graph() or transforms.batched_or_forward()


def no_graph(where: str, instead: str) -> RuntimeError:
    """What is raised by a backward that would have to be plain PyTorch and has kept no graph for that."""
    wanted, by = ("second derivative", " (create_graph=True)") if wants_graph() else ("batch of gradients", "")
    return RuntimeError(f"a {wanted} was asked for{by} {where}, which keeps no graph to differentiate; use {instead}")


def _run(name: str, backend: str, *operands):
    """A pixel op in backward."""
    return getattr(reference, name)(*operands) if wants_formulas() else getattr(raw, name)(*operands, backend)


def _define_pixel_op(name: str, arguments: str, results: int, fake, check=None) -> None:
    has_logdet = name in ("couple", "couple_mix", "mix_couple")

    def run(*args):
        *operands, backend = args
        if check is not None:
            check(*operands)
        out = getattr(backends.table(operands[0].device, backend, operands[0].dtype), name)(*operands)
        return (out[0], out[1].sum(dim=1)) if has_logdet and out[1].dim() == 2 else out

    define(f"{name}({arguments}, str backend) -> {_RESULTS[results]}", run, lambda *args: fake(*args[:-1]))


def _logdet(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0])


def _rebuilt(v: Tensor, given_input: bool) -> Tensor:
    return v.new_empty(0) if given_input else empty_channels_last(v)


_COUPLING = "str scale, float alpha"
_define_pixel_op(
    "channel_mix",
    "Tensor x, Tensor matrix, Tensor offset, bool inverse",
    1,
    lambda x, matrix, offset, inverse: empty_channels_last(x),
    lambda x, matrix, offset, inverse: _check_mix(x, matrix, offset),
)
_define_pixel_op(
    "couple",
    f"Tensor x, Tensor h, {_COUPLING}, bool inverse",
    2,
    lambda x, h, scale, alpha, inverse: (empty_channels_last(x), _logdet(x)),
    lambda x, h, scale, alpha, inverse: check_coupling(x, h, scale),
)
for _fused in ("couple_mix", "mix_couple"):
    _define_pixel_op(
        _fused,
        f"Tensor x, Tensor h, Tensor matrix, Tensor offset, {_COUPLING}",
        2,
        lambda x, h, matrix, offset, scale, alpha: (empty_channels_last(x), _logdet(x)),
        lambda x, h, matrix, offset, scale, alpha: (_check_mix(x, matrix, offset), check_coupling(x, h, scale)),
    )
_define_pixel_op(
    "couple_vjp",
    f"Tensor v, Tensor g, Tensor h, Tensor glogdet, {_COUPLING}, bool inverse, bool given_input",
    3,
    lambda v, g, h, glogdet, scale, alpha, inverse, given_input: (
        _rebuilt(v, given_input), empty_channels_last(v), empty_channels_last(h)
    ),
    lambda v, g, h, glogdet, scale, *_: (_check_gradient(v, g, glogdet), check_coupling(v, h, scale)),
)
_define_pixel_op(
    "mix_vjp",
    "Tensor v, Tensor g, Tensor matrix, Tensor inverse_matrix, Tensor offset, bool inverse, bool given_input",
    4,
    lambda v, g, matrix, inverse_matrix, offset, inverse, given_input: (
        _rebuilt(v, given_input),
        empty_channels_last(v),
        matrix.new_empty(matrix.shape),
        offset.new_empty(offset.shape),
    ),
    lambda v, g, matrix, inverse_matrix, offset, *_: (
        _check_gradient(v, g), _check_mix(v, matrix, offset), _check_mix(v, inverse_matrix, offset)
    ),
)
_define_pixel_op("shrink", "Tensor z, Tensor lam", 1, lambda z, lam: torch.empty_like(z))
_define_pixel_op(
    "shrink_vjp",
    "Tensor z, Tensor g, Tensor lam",
    2,
    lambda z, g, lam: (torch.empty_like(z), torch.empty_like(lam)),
    lambda z, g, lam: _check_gradient(z, g),
)
_define_pixel_op("data_consistency", "Tensor x, Tensor y, Tensor mu", 1, lambda x, y, mu: torch.empty_like(x))
_define_pixel_op(
    "data_consistency_vjp",
    "Tensor x, Tensor y, Tensor g, Tensor mu",
    3,
    lambda x, y, g, mu: (torch.empty_like(x), torch.empty_like(x), torch.empty_like(mu)),
    lambda x, y, g, mu: (_check_gradient(x, y), _check_gradient(x, g)),
)
raw = torch.ops.flowkern


class _ChannelMix(Function):
    @staticmethod
    def forward(x, matrix, offset, backend):
        return raw.channel_mix(x, matrix, offset, False, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, matrix, offset, ctx.backend = inputs
        ctx.save_for_backward(x, matrix, offset)

    @staticmethod
    @without_autocast
    def backward(ctx, g):
        x, matrix, offset = ctx.saved_tensors
        _, dx, dmatrix, doffset = _run("mix_vjp", ctx.backend, x, g, matrix, matrix, offset, False, True)
        return dx, dmatrix, doffset, None


class _Couple(Function):
    @staticmethod
    def forward(x, h, scale, alpha, inverse, backend):
        return raw.couple(x, h, scale, alpha, inverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, *ctx.settings = inputs
        ctx.save_for_backward(x, h)

    @staticmethod
    def backward(ctx, g, glogdet):
        x, h = ctx.saved_tensors
        *settings, backend = ctx.settings
        _, dx, dh = _run("couple_vjp", backend, x, g, h, glogdet, *settings, True)
        return dx, dh, None, None, None, None


class _CoupleMix(Function):
    """couple_mix, and with inverse=True mix_couple in the form A (couple^-1(x) + offset / A) used by `mix_couple`
    below.
    """

    @staticmethod
    def forward(x, h, matrix, offset, scale, alpha, inverse, backend):
        op = raw.mix_couple if inverse else raw.couple_mix
        return op(x, h, matrix, offset, scale, alpha, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, matrix, offset, *ctx.settings = inputs
        ctx.save_for_backward(x, h, matrix, offset)

    @staticmethod
    @without_autocast
    def backward(ctx, g, glogdet):
        x, h, matrix, offset = ctx.saved_tensors
        scale, alpha, inverse, backend = ctx.settings
        coupled, _ = _run("couple", backend, x, h, scale, alpha, inverse)
        _, dcoupled, dmatrix, doffset = _run("mix_vjp", backend, coupled, g, matrix, matrix, offset, False, True)
        if inverse:
            # The op is matrix @ (coupled - offset), so the offset enters through the matrix.
            dmatrix = dmatrix - torch.outer(doffset, offset)
            doffset = -(matrix.T @ doffset)
        _, dx, dh = _run("couple_vjp", backend, x, dcoupled, h, glogdet, scale, alpha, inverse, True)
        return dx, dh, dmatrix, doffset, None, None, None, None


class _Shrink(Function):
    @staticmethod
    def forward(z, lam, backend):
        return raw.shrink(z, lam, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, lam, ctx.backend = inputs
        ctx.save_for_backward(z, lam)

    @staticmethod
    def backward(ctx, g):
        z, lam = ctx.saved_tensors
        return *_run("shrink_vjp", ctx.backend, z, g, lam), None


class _DataConsistency(Function):
    @staticmethod
    def forward(x, y, mu, backend):
        return raw.data_consistency(x, y, mu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, mu, ctx.backend = inputs
        ctx.save_for_backward(x, y, mu)

    @staticmethod
    def backward(ctx, g):
        x, y, mu = ctx.saved_tensors
        return *_run("data_consistency_vjp", ctx.backend, x, y, g, mu), None


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool = False, backend: str = "auto") -> Tensor:
    """`matrix @ x + offset` at every pixel; with `inverse`, `matrix @ (x - offset)` (pass the inverse matrix).

    x (N, C, H, W), matrix (C, C), offset (C,) -> (N, C, H, W) in channels-last memory. Differentiable in all three.
    Raises ValueError for shapes that don't fit.
    """
    _check_state(x)
    _check_mix(x, matrix, offset)
    if inverse:
        with torch.autocast(x.device.type, enabled=False):
            offset = -(matrix @ offset)
    if transforms.batched_or_forward():
        return reference.channel_mix(x, matrix, offset)
    return _ChannelMix.apply(channels_last(x), matrix.contiguous(), offset.contiguous(), _resolve(x, backend))


def couple(
    x: Tensor, h: Tensor, scale: str = "softclamp", alpha: float = 1.0, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The affine coupling `b <- (b + t) s(raw)` given h = (raw, t), or its inverse `b <- b / s(raw) - t`.

    x (N, C, H, W) with C even; h (N, C, H, W), or (N, C/2, H, W) for scale="additive". Returns the new state and the
    log-determinant (N,) in nats of the direction computed. Differentiable in x and h. Raises ValueError for shapes that
    don't fit or an unknown scale.
    """
    _check_state(x)
    check_coupling(x, h, scale)
    if transforms.batched_or_forward():
        return reference.couple(x, h, scale, alpha, inverse)
    return _Couple.apply(channels_last(x), channels_last(h), scale, float(alpha), inverse, _resolve(x, backend))


def couple_mix(
    x: Tensor,
    h: Tensor,
    matrix: Tensor,
    offset: Tensor,
    scale: str = "softclamp",
    alpha: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`couple`, then `channel_mix` of the next step, in one pass over memory. Returns state and logdet (N,) of the
    coupling.
    """
    return _couple_mix(x, h, matrix, offset, scale, alpha, False, backend)


def mix_couple(
    y: Tensor,
    h: Tensor,
    matrix: Tensor,
    offset: Tensor,
    scale: str = "softclamp",
    alpha: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The inverse of a step in one pass: undo the coupling, then `matrix @ (. - offset)` with the inverse matrix."""
    return _couple_mix(y, h, matrix, offset, scale, alpha, True, backend)


def _couple_mix(x, h, matrix, offset, scale, alpha, inverse, backend):
    _check_state(x)
    _check_mix(x, matrix, offset)
    check_coupling(x, h, scale)
    if transforms.batched_or_forward():
        op = reference.mix_couple if inverse else reference.couple_mix
        return op(x, h, matrix, offset, scale, alpha)
    return _CoupleMix.apply(
        channels_last(x),
        channels_last(h),
        matrix.contiguous(),
        offset.contiguous(),
        scale,
        float(alpha),
        inverse,
        _resolve(x, backend),
    )


def shrink(z: Tensor, lam: Tensor, backend: str = "auto") -> Tensor:
    """Latent shrinkage z / (1 + lam), the proximal step of Wei et al., equation 9. lam is a scalar tensor, and is taken
    in z's dtype. Differentiable. Raises ValueError for a lam of more than one number.
    """
    lam = _scalar(lam, "lam").to(z.dtype)
    if transforms.batched_or_forward():
        return reference.shrink(z, lam)
    return _Shrink.apply(_dense(z), lam, _resolve(z, backend))


def data_consistency(x: Tensor, y: Tensor, mu: Tensor, backend: str = "auto") -> Tensor:
    """The gradient step x - mu (x - y) of Wei et al., equation 7, for A = I. mu is a scalar tensor. Differentiable.

    The result is of the dtype to which x and y promote. Raises ValueError when x and y differ in shape,
    and for a mu of more than one number.
    """
    if x.shape != y.shape:
        raise ValueError(f"data_consistency: x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y, mu = x.to(dtype), y.to(dtype), _scalar(mu, "mu").to(dtype)
    if transforms.batched_or_forward():
        return reference.data_consistency(x, y, mu)
    x = _dense(x)
    return _DataConsistency.apply(x, in_order_of(y, x), mu, _resolve(x, backend))


def _scalar(weight: Tensor, name: str) -> Tensor:
    if weight.numel() != 1:
        raise ValueError(f"{name} must be a tensor of one number, got {tuple(weight.shape)}")
    return weight.reshape(())


def _dense(x: Tensor) -> Tensor:
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _resolve(x: Tensor, backend: str) -> str:
    return backends.resolve(x.device, backend)


def _check_state(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected a state of shape (N, C, H, W), got {tuple(x.shape)}")


def _check_mix(x: Tensor, matrix: Tensor, offset: Tensor) -> None:
    channels = x.shape[1]
    if matrix.shape != (channels, channels) or offset.shape != (channels,):
        raise ValueError(
            f"a mix of {channels} channels wants matrix {(channels, channels)} and offset {(channels,)}, "
            f"got {tuple(matrix.shape)} and {tuple(offset.shape)}"
        )


def _check_gradient(x: Tensor, g: Tensor, glogdet: Tensor | None = None) -> None:
    if g.shape != x.shape or (glogdet is not None and glogdet.shape != x.shape[:1]):
        beside = "" if glogdet is None else f", and {tuple(glogdet.shape)} for the log-determinant"
        raise ValueError(f"a state {tuple(x.shape)} wants another of its shape beside it, got {tuple(g.shape)}{beside}")


def check_coupling(x: Tensor, h: Tensor, scale: str) -> None:
    """Raises ValueError for an unknown scale map, and an h that does not fit this state."""
    choice(scale, "scale", reference.SCALES)
    n, channels, *size = x.shape
    wanted = (n, channels // 2 if scale == "additive" else channels, *size)
    if channels % 2 or tuple(h.shape) != wanted:
        raise ValueError(
            f"coupling of a state {tuple(x.shape)} wants an even number of channels and h of shape {wanted}, "
            f"got {tuple(h.shape)}"
        )
