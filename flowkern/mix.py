"""Composition of ActNorm and the invertible 1x1 convolution into one channel mix per step, for all steps at once.

y = W exp(log_scale) (x + bias) is the affine map y = M x + m with M = W diag(exp(log_scale)), m = M bias and
W = P L (U + diag(sign exp(log_s))). M, m, M^-1 and log|det M| of all K steps of a level come from a handful of batched
operations on the tiny parameters: triangular solves, no determinant, no general inverse. Their gradient is written out,
so that nothing but the parameters is kept for it.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from flowkern import backend as backends
from flowkern import ops, stored

PER_STEP = 5  # lower, upper, log_s, log_scale, bias


def compose(steps, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixes of K `StepOfFlow`s of C channels: M (K, C, C), m (K, C), M^-1 (K, C, C) and sum_k log|det M_k|
    (scalar).

    Differentiable, M^-1 excepted: gradients of the inverse direction are expressed through M and m too.
    """
    parameters, (sign, permutation) = _parameters(steps), _fixed(steps)
    name = backends.resolve(sign.device, backend)
    # Without gradients the Function is left out: torch.compile binds the arguments of a variadic one wrongly there.
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return _Compose.apply(sign, permutation, name, *parameters)
    return ops.raw.compose(*stacked(parameters), sign, permutation, name)


def factors(steps) -> list[Tensor]:
    """The arguments of `mixes`: what K steps store, stacked. Raises ValueError where a parameter is pruned."""
    return [*stacked(_parameters(steps)), *_fixed(steps)]


def _parameters(steps) -> list[Tensor]:
    return [p for step in steps for p in (*stored.parameters(step.conv, "lower", "upper", "log_s"),
                                          *stored.parameters(step.actnorm, "log_scale", "bias"))]


def _fixed(steps) -> list[Tensor]:
    return [torch.stack([getattr(step.conv, name) for step in steps]) for name in ("sign", "permutation")]


def stacked(parameters) -> list[Tensor]:
    """Per-step parameters, five a step, as five tensors over steps."""
    return [torch.stack(parameters[i::PER_STEP]) for i in range(PER_STEP)]


def mixes(lower, upper, log_s, log_scale, bias, sign, permutation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compose` of parameters stacked over steps, in plain PyTorch."""
    low, up, scale = _factors(lower, upper, log_s, log_scale, sign)
    rows = permutation[:, :, None].expand_as(low)
    matrix = (low @ (up * scale[:, None, :])).gather(1, rows)
    eye = torch.eye(low.shape[1], dtype=low.dtype, device=low.device).expand_as(low)
    inverse_up = torch.linalg.solve_triangular(up, eye, upper=True)
    inverse_low = torch.linalg.solve_triangular(low, eye, upper=False, unitriangular=True)
    inverse = ((inverse_up / scale[:, :, None]) @ inverse_low).gather(2, permutation[:, None, :].expand_as(low))
    offset = (matrix @ bias.to(low.dtype)[:, :, None])[:, :, 0]
    dtype = lower.dtype
    # gather over columns leaves dense, row-major results; solve_triangular's own are transposed.
    return (
        matrix.to(dtype).contiguous(),
        offset.to(dtype),
        inverse.to(dtype).contiguous(),
        (log_s.to(low.dtype).sum() + log_scale.to(low.dtype).sum()).to(dtype),
    )


def mixes_vjp(lower, upper, log_s, log_scale, bias, sign, permutation, dmatrix, doffset, dlogdet) -> tuple[Tensor, ...]:
    """Gradients of `mixes` with respect to lower, upper, log_s, log_scale and bias. Differentiable itself."""
    low, up, scale = _factors(lower, upper, log_s, log_scale, sign)
    wide = low.dtype
    dmatrix, doffset, dlogdet, bias = (t.to(wide) for t in (dmatrix, doffset, dlogdet, bias))
    scaled = up * scale[:, None, :]
    matrix = (low @ scaled).gather(1, permutation[:, :, None].expand_as(low))
    dmatrix = dmatrix + doffset[:, :, None] * bias[:, None, :]
    dbias = (matrix.mT @ doffset[:, :, None])[:, :, 0]
    dproduct = dmatrix.gather(1, permutation.argsort(dim=1)[:, :, None].expand_as(low))
    dlower = (dproduct @ scaled.mT).tril(-1)
    dscaled = low.mT @ dproduct
    dlog_scale = (dscaled * scaled).sum(dim=1) + dlogdet
    dupper = dscaled * scale[:, None, :]
    dlog_s = (dupper * up).diagonal(dim1=1, dim2=2) + dlogdet
    return tuple(d.to(lower.dtype) for d in (dlower, dupper.triu(1), dlog_s, dlog_scale, dbias))


def _factors(lower, upper, log_s, log_scale, sign) -> tuple[Tensor, Tensor, Tensor]:
    """L, U with its diagonal and exp(log_scale), in fp64 where the device has it.

    fp64 because these are tiny, and because the error of M^-1 M - I is the drift of the whole chain.
    """
    wide = lower.dtype if lower.device.type == "mps" else torch.float64
    eye = torch.eye(lower.shape[1], dtype=wide, device=lower.device)
    upper = upper.to(wide).triu(1) + torch.diag_embed(sign.to(wide) * log_s.to(wide).exp())
    return lower.to(wide).tril(-1) + eye, upper, log_scale.to(wide).exp()


backends.register_defaults(compose=mixes, compose_vjp=mixes_vjp)


def _check_shapes(lower: Tensor, upper: Tensor, *rows: Tensor) -> None:
    """Raises ValueError for factors that don't fit each other: kernels know memory by the sizes of one of them."""
    wide = rows[0].shape
    if lower.shape != (*wide, wide[-1]) or upper.shape != lower.shape or any(t.shape != wide for t in rows):
        given = ", ".join(str(tuple(t.shape)) for t in (lower, upper, *rows))
        raise ValueError(
            f"the mixes of {wide[0]} steps want lower and upper (K, C, C), and log_s, log_scale, bias, sign and "
            f"permutation (K, C), got {given}"
        )


def _run(name: str):
    def run(lower, *rest):
        *rest, backend = rest
        _check_shapes(lower, *rest[:6])
        return getattr(backends.table(lower.device, backend, lower.dtype), name)(lower, *rest)

    return run


_PARAMETERS = "Tensor lower, Tensor upper, Tensor log_s, Tensor log_scale, Tensor bias, Tensor sign, Tensor permutation"
ops.define(
    f"compose({_PARAMETERS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run("compose"),
    lambda lower, upper, log_s, *_: (
        *(p.new_empty(p.shape) for p in (lower, log_s, lower)), lower.new_empty(())
    ),
)
ops.define(
    f"compose_vjp({_PARAMETERS}, Tensor dmatrix, Tensor doffset, Tensor dlogdet, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run("compose_vjp"),
    lambda *args: tuple(p.new_empty(p.shape) for p in args[:5]),
)


class _Compose(Function):
    """Keeps the parameters themselves, which exist anyway, and stacks them again in backward."""

    @staticmethod
    def forward(sign, permutation, backend, *parameters):
        return ops.raw.compose(*stacked(parameters), sign, permutation, backend)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        sign, permutation, ctx.backend, *parameters = inputs
        ctx.mark_non_differentiable(outputs[2])
        ctx.save_for_backward(sign, permutation, *parameters)

    @staticmethod
    def backward(ctx, dmatrix, doffset, _, dlogdet):
        sign, permutation, *parameters = ctx.saved_tensors
        tensors = (*stacked(parameters), sign, permutation, dmatrix.contiguous(), doffset.contiguous(), dlogdet)
        found = mixes_vjp(*tensors) if ops.wants_formulas() else ops.raw.compose_vjp(*tensors, ctx.backend)
        per_step = zip(*(d.unbind(0) for d in found), strict=True)
        return None, None, None, *(d for step in per_step for d in step)
