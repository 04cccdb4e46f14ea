"""How eager PyTorch would write the pixel ops; the fastest of these forms is what ours are compared with.

A mix's products come from a convolution, from `linear` on pixels, `matmul` on planes, or einsum; a coupling joins its
halves by `cat`, or writes into the result; both in channels-last and in PyTorch's default memory, without conversion.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import Case
from flowkern import reference


def eager_forms(case: Case) -> dict[str, Callable]:
    """Name -> a call, for each way of writing the op."""
    arguments = case.arguments()
    contiguous = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
    forms = {"reference": lambda: getattr(reference, case.op)(*arguments)}
    for layout, given in (("channels-last", arguments), ("contiguous", contiguous)):
        for name, form in _FORMS[case.op].items():
            if layout in form.layouts:
                forms[f"{name}, {layout}"] = lambda f=form.call, a=given: f(*a)
    return forms


def _conv(x, matrix, offset):
    return F.conv2d(x, matrix[:, :, None, None], offset)


def _linear(x, matrix, offset):
    return F.linear(x.permute(0, 2, 3, 1), matrix, offset).permute(0, 3, 1, 2)


def _matmul(x, matrix, offset):
    planes = x.flatten(2)
    return torch.baddbmm(offset[None, :, None], matrix.expand(len(x), -1, -1), planes).view_as(x)


def _einsum(x, matrix, offset):
    return torch.einsum("oc,nchw->nohw", matrix, x) + offset[:, None, None]


def _shift(matrix, offset):
    """M (x - m) = M x + this."""
    return -(matrix @ offset)


def _scaled(raw, scale, alpha):
    """s, log s and d log s / d raw, each function evaluated once."""
    if scale == "softclamp":
        bounded = torch.tanh(raw / alpha)
        log_s = alpha * bounded
        return torch.exp(log_s), log_s, lambda: 1 - bounded * bounded
    s = torch.sigmoid(raw + 2)
    return s, torch.log(s), lambda: 1 - s


def _couple_cat(x, h, scale, alpha, inverse=False):
    a, b = x.chunk(2, dim=1)
    raw, t = h.chunk(2, dim=1)
    s, log_s, _ = _scaled(raw, scale, alpha)
    b = b / s - t if inverse else (b + t) * s
    logdet = log_s.sum(dim=(1, 2, 3))
    return torch.cat([a, b], dim=1), -logdet if inverse else logdet


def _couple_into(x, h, scale, alpha, inverse=False):
    half = x.shape[1] // 2
    raw, t = h.chunk(2, dim=1)
    s, log_s, _ = _scaled(raw, scale, alpha)
    y = x.clone()
    if inverse:
        y[:, half:].div_(s).sub_(t)
    else:
        y[:, half:].add_(t).mul_(s)
    logdet = log_s.sum(dim=(1, 2, 3))
    return y, -logdet if inverse else logdet


def _couple_vjp_cat(v, g, h, glogdet, scale, alpha):
    va, vb = v.chunk(2, dim=1)
    ga, gb = g.chunk(2, dim=1)
    raw, t = h.chunk(2, dim=1)
    s, _, slope = _scaled(raw, scale, alpha)
    dv = gb * s
    draw = torch.addcmul(glogdet[:, None, None, None], gb, vb) * slope()
    return torch.cat([va, vb / s - t], dim=1), torch.cat([ga, dv], dim=1), torch.cat([draw, dv], dim=1)


def _couple_vjp_into(v, g, h, glogdet, scale, alpha):
    half = v.shape[1] // 2
    raw, t = h.chunk(2, dim=1)
    gb, vb = g[:, half:], v[:, half:]
    s, _, slope = _scaled(raw, scale, alpha)
    rebuilt, dv, dh = v.clone(), g.clone(), torch.empty_like(h)
    rebuilt[:, half:].div_(s).sub_(t)
    dv[:, half:].mul_(s)
    torch.mul(torch.addcmul(glogdet[:, None, None, None], gb, vb), slope(), out=dh[:, :half])
    dh[:, half:] = dv[:, half:]
    return rebuilt, dv, dh


def _mix_vjp(product, outer):
    def form(v, g, matrix, inverse_matrix, offset):
        x = product(v, inverse_matrix, _shift(inverse_matrix, offset))
        return x, product(g, matrix.T, torch.zeros_like(offset)), outer(g, x), g.sum(dim=(0, 2, 3))

    return form


def _outer_rows(g, x):
    rows = (a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]) for a in (g, x))
    return next(rows).T @ next(rows)


def _outer_planes(g, x):
    return (g.flatten(2) @ x.flatten(2).mT).sum(dim=0)


@dataclass(frozen=True)
class _Form:
    call: Callable
    layouts: tuple[str, ...] = ("channels-last", "contiguous")


_MIXES = {"conv2d": _Form(_conv), "linear": _Form(_linear, ("channels-last",)),
          "matmul": _Form(_matmul, ("contiguous",)), "einsum": _Form(_einsum)}
_COUPLINGS = {"cat": _couple_cat, "into": _couple_into}


def _joint(combine: Callable) -> dict[str, _Form]:
    """Every coupling with every mix, by `combine(coupling, mix)`."""
    return {f"{c} + {m}": _Form(combine(_COUPLINGS[c], form.call), form.layouts)
            for c in _COUPLINGS for m, form in _MIXES.items() if m != "einsum"}


def _couple_mix(couple, mix):
    def form(x, h, matrix, offset, scale, alpha):
        y, logdet = couple(x, h, scale, alpha)
        return mix(y, matrix, offset), logdet

    return form


def _mix_couple(couple, mix):
    def form(y, h, matrix, offset, scale, alpha):
        x, logdet = couple(y, h, scale, alpha, inverse=True)
        return mix(x, matrix, _shift(matrix, offset)), logdet

    return form


_FORMS: dict[str, dict[str, _Form]] = {
    "shrink": {"reciprocal": _Form(lambda z, lam: z * (1 / (1 + lam)))},
    "data_consistency": {"lerp": _Form(torch.lerp), "add": _Form(lambda x, y, mu: x + mu * (y - x))},
    "channel_mix": _MIXES,
    "couple": {name: _Form(call) for name, call in _COUPLINGS.items()},
    "couple_mix": _joint(_couple_mix),
    "mix_couple": _joint(_mix_couple),
    "couple_vjp": {"cat": _Form(_couple_vjp_cat), "into": _Form(_couple_vjp_into)},
    "mix_vjp": {
        "linear": _Form(_mix_vjp(_linear, _outer_rows), ("channels-last",)),
        "conv2d": _Form(_mix_vjp(_conv, _outer_rows), ("channels-last",)),
        "conv2d + planes": _Form(_mix_vjp(_conv, _outer_planes), ("contiguous",)),
        "matmul": _Form(_mix_vjp(_matmul, _outer_planes), ("contiguous",)),
    },
}
