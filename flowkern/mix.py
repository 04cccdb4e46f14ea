"""Composition of ActNorm and the invertible 1x1 convolution into one channel mix per step, for all steps at once.

y = W exp(log_scale) (x + bias) is the affine map y = M x + m with M = W diag(exp(log_scale)), m = M bias and
W = P L (U + diag(sign exp(log_s))). M, m, M^-1 and log|det M| of all K steps of a level come from a handful of batched
operations on the tiny parameters: triangular solves, no determinant, no general inverse. Their gradient is written out,
so that nothing but the parameters is kept for it.
"""

import torch
from torch import Tensor
from torch.autograd import Function

PER_STEP = 5  # lower, upper, log_s, log_scale, bias


def compose(steps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixes of K `StepOfFlow`s of C channels: M (K, C, C), m (K, C), M^-1 (K, C, C) and sum_k log|det M_k|
    (scalar).

    Differentiable, M^-1 excepted: gradients of the inverse direction are expressed through M and m too.
    """
    permutation = torch.stack([s.conv.permutation for s in steps])
    sign = torch.stack([s.conv.sign for s in steps])
    parameters = [
        p for s in steps for p in (s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)
    ]
    # Without gradients the Function is left out: torch.compile binds the arguments of a variadic one wrongly there.
    needed = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return (_Compose.apply if needed else _compose)(permutation, sign, *parameters)


class _Compose(Function):
    @staticmethod
    def forward(permutation, sign, *parameters):
        return _compose(permutation, sign, *parameters)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[2])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dmatrix, doffset, _, dlogdet):
        # Ordinary tensor operations on the saved parameters, so that a second derivative is autograd's business.
        permutation, sign, *parameters = ctx.saved_tensors
        lower, upper, scale, bias, log_s, _ = _factors(sign, parameters)
        dtype, wide = parameters[0].dtype, lower.dtype
        dmatrix, doffset, dlogdet = dmatrix.to(wide), doffset.to(wide), dlogdet.to(wide)
        scaled = upper * scale[:, None, :]
        matrix = (lower @ scaled).gather(1, permutation[:, :, None].expand_as(lower))
        dmatrix = dmatrix + doffset[:, :, None] * bias[:, None, :]
        dbias = (matrix.mT @ doffset[:, :, None])[:, :, 0]
        inverse_permutation = permutation.argsort(dim=1)[:, :, None].expand_as(lower)
        dproduct = dmatrix.gather(1, inverse_permutation)
        dlower = (dproduct @ scaled.mT).tril(-1)
        dscaled = lower.mT @ dproduct
        dlog_scale = (dscaled * scaled).sum(dim=1) + dlogdet
        dupper = dscaled * scale[:, None, :]
        dlog_s = (dupper * upper).diagonal(dim1=1, dim2=2) + dlogdet
        stacked = (dlower, dupper.triu(1), dlog_s, dlog_scale, dbias)
        per_step = zip(*(d.to(dtype).unbind(0) for d in stacked), strict=True)
        return None, None, *(d for step in per_step for d in step)


def _compose(permutation, sign, *parameters):
    lower, upper, scale, bias, log_s, log_scale = _factors(sign, parameters)
    rows = permutation[:, :, None].expand_as(lower)
    matrix = (lower @ (upper * scale[:, None, :])).gather(1, rows)
    eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse_upper = torch.linalg.solve_triangular(upper, eye, upper=True)
    inverse_lower = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    inverse = ((inverse_upper / scale[:, :, None]) @ inverse_lower).gather(2, permutation[:, None, :].expand_as(lower))
    offset = (matrix @ bias[:, :, None])[:, :, 0]
    dtype = parameters[0].dtype
    # gather over columns leaves dense, row-major results; solve_triangular's own are transposed.
    return (
        matrix.to(dtype).contiguous(),
        offset.to(dtype),
        inverse.to(dtype).contiguous(),
        (log_s.sum() + log_scale.sum()).to(dtype),
    )


def _factors(sign: Tensor, parameters):
    """L, U with its diagonal, exp(log_scale), bias, log_s, log_scale: stacked over steps, in fp64 where the device
    has it.

    fp64 because these are tiny, and because the error of M^-1 M - I is the drift of the whole chain.
    """
    wide = parameters[0].dtype if parameters[0].device.type == "mps" else torch.float64
    lower, upper, log_s, log_scale, bias = (torch.stack(parameters[i::PER_STEP]).to(wide) for i in range(PER_STEP))
    eye = torch.eye(lower.shape[1], dtype=wide, device=lower.device)
    upper = upper.triu(1) + torch.diag_embed(sign.to(wide) * log_s.exp())
    return lower.tril(-1) + eye, upper, log_scale.exp(), bias, log_s, log_scale
