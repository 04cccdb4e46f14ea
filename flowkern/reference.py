"""The specification of flowkern in plain PyTorch.

Everything here is an ordinary differentiable function of tensors, in any floating dtype, on any device: autograd does
the rest. The first half states the pixel ops that every backend implements, the second half states the model (Glow,
Kingma and Dhariwal 2018, arXiv:1807.03039) as one reads it in the paper. Nothing here is fast, and nothing optional is
imported.

Shapes: an image or state is (N, C, H, W), in channels-last memory where the pixel ops produce it; log-determinants are
(N,), in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkern.layout import channels_last_outside_vmap as channels_last
from flowkern.layout import in_order_of

SCALES = ("softclamp", "sigmoid", "additive")


# ---------------------------------------------------------------------------------------------------------------------
# Pixel ops: the contract of every backend
# ---------------------------------------------------------------------------------------------------------------------


def log_scale(raw: Tensor, scale: str, alpha: float) -> Tensor:
    """log s of the coupling. "softclamp": alpha tanh(raw / alpha), bounded both ways; "sigmoid": Glow's log
    sigmoid(raw + 2).
    """
    if scale == "softclamp":
        return alpha * torch.tanh(raw / alpha)
    return F.logsigmoid(raw + 2)


def log_scale_slope(raw: Tensor, scale: str, alpha: float) -> Tensor:
    """d log s / d raw."""
    if scale == "softclamp":
        return 1 - torch.tanh(raw / alpha) ** 2
    return torch.sigmoid(-(raw + 2))


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, inverse: bool = False) -> Tensor:
    """`matrix @ x + offset` at every pixel; with `inverse`, `matrix @ (x - offset)`, where `matrix` is the inverse mix.

    x (N, C, H, W), matrix (C, C), offset (C,) -> (N, C, H, W).
    """
    # Autocast, which meta tensors know nothing of, would lower the state's precision.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return channel_mix(x, matrix, offset, inverse)
    pixels = x.permute(0, 2, 3, 1)
    pixels = F.linear(pixels - offset, matrix) if inverse else F.linear(pixels, matrix, offset)
    return channels_last(pixels.permute(0, 3, 1, 2))


def couple(x: Tensor, h: Tensor, scale: str, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Affine coupling: with halves a, b of x and raw, t of h, `b <- (b + t) s(raw)`; the inverse is `b <- b /
    s(raw) - t`.

    x (N, C, H, W); h (N, C, H, W), or (N, C/2, H, W) holding t alone with scale="additive"; h may be of lower
    precision. Returns the new state and log|det| per sample (N,), of the direction that was computed.
    """
    a, b = x.chunk(2, dim=1)
    if scale == "additive":
        t = h.to(x.dtype)
        b = b - t if inverse else b + t
        logdet = x.new_zeros(x.shape[0])
    else:
        raw, t = h.to(x.dtype).chunk(2, dim=1)
        log_s = log_scale(raw, scale, alpha)
        b = b * torch.exp(-log_s) - t if inverse else (b + t) * torch.exp(log_s)
        logdet = log_s.sum(dim=(1, 2, 3))
        logdet = -logdet if inverse else logdet
    return channels_last(torch.cat([a, b], dim=1)), logdet


def couple_mix(x: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The coupling of one step followed by the channel mix of the next. Returns the state and the coupling's
    logdet (N,).
    """
    y, logdet = couple(x, h, scale, alpha)
    return channel_mix(y, matrix, offset), logdet


def mix_couple(y: Tensor, h: Tensor, matrix: Tensor, offset: Tensor, scale: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The inverse of one step: undo the coupling, then the channel mix (`matrix` is the inverse mix). Returns
    state, logdet (N,).
    """
    x, logdet = couple(y, h, scale, alpha, inverse=True)
    return channel_mix(x, matrix, offset, inverse=True), logdet


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
    """Reverse-mode derivative of `couple` in one pass.

    v is the op's output, or its input with `given_input`; g (N, C, H, W) and glogdet (N,) are the cotangents of its two
    results. Returns the rebuilt input (an empty tensor with `given_input`), its gradient (without the part that flows
    through the coupling network) and the gradient of h, in h's dtype.
    """
    va, vb = v.chunk(2, dim=1)
    ga, gb = g.chunk(2, dim=1)
    rebuilt = v.new_empty(0)
    if scale == "additive":
        sign = -1 if inverse else 1
        if not given_input:
            rebuilt = channels_last(torch.cat([va, vb - sign * h.to(v.dtype)], dim=1))
        return rebuilt, channels_last(g).clone(), channels_last((sign * gb).to(h.dtype))
    raw, t = h.to(v.dtype).chunk(2, dim=1)
    s = torch.exp(log_scale(raw, scale, alpha))
    gl = glogdet[:, None, None, None]
    if inverse:
        # The map is input = b', output = b = b' / s - t.
        b_plus_t = vb / s if given_input else vb + t
        if not given_input:
            rebuilt = torch.cat([va, b_plus_t * s], dim=1)
        dv, dt, dlog_s = gb / s, -gb, -(gb * b_plus_t + gl)
    else:
        # The map is input = b, output = b' = (b + t) s.
        out = (vb + t) * s if given_input else vb
        if not given_input:
            rebuilt = torch.cat([va, vb / s - t], dim=1)
        dv, dt, dlog_s = gb * s, gb * s, gb * out + gl
    draw = dlog_s * log_scale_slope(raw, scale, alpha)
    dh = torch.cat([draw, dt], dim=1).to(h.dtype)
    rebuilt = rebuilt if given_input else channels_last(rebuilt)
    return rebuilt, channels_last(torch.cat([ga, dv], dim=1)), channels_last(dh)


def mix_vjp(
    v: Tensor,
    g: Tensor,
    matrix: Tensor,
    inverse_matrix: Tensor,
    offset: Tensor,
    inverse: bool = False,
    given_input: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reverse-mode derivative of the channel mix in one pass, always with respect to the forward mix (M, m).

    Forward, y = M x + m: v is y (or x with `given_input`), g the cotangent of y; returns the rebuilt x, M^T g,
    dM = sum g x^T and dm = sum g. Inverse, x = M^-1 (y - m): v is x (or y with `given_input`), g the cotangent of x;
    returns the rebuilt y, dy = M^-T g, dM = -sum dy x^T and dm = -sum dy. With `given_input` the rebuilt is empty.
    `into` is a pair of tensors that receives dM and dm.
    """
    rebuilt = v.new_empty(0)
    if inverse:
        x = channel_mix(v, inverse_matrix, offset, inverse=True) if given_input else v
        rebuilt = rebuilt if given_input else channel_mix(v, matrix, offset)
        d = channel_mix(g, inverse_matrix.T, torch.zeros_like(offset))
        weight = -d
    else:
        x = v if given_input else channel_mix(v, inverse_matrix, offset, inverse=True)
        rebuilt = rebuilt if given_input else x
        d = channel_mix(g, matrix.T, torch.zeros_like(offset))
        weight = g
    rows = weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
    dmatrix = rows.T @ x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    doffset = rows.sum(dim=0)
    if into is not None:
        dmatrix, doffset = into[0].copy_(dmatrix), into[1].copy_(doffset)
    return rebuilt, d, dmatrix, doffset


def shrink(z: Tensor, lam: Tensor) -> Tensor:
    """The proximal step in latent space, z / (1 + lam) (Wei et al., equation 9). z of any shape, lam a scalar
    tensor.
    """
    return z / (1 + lam)


def shrink_vjp(z: Tensor, g: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `shrink` with respect to z and lam (a scalar)."""
    dz = in_order_of(g, z) / (1 + lam)
    return dz, -(dz * z).sum() / (1 + lam)


def data_consistency(x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    """A gradient step towards the measurement, x - mu (x - y), for A = I (Wei et al., equation 7, with the
    gradient's sign).
    """
    return x - mu * (x - y)


def data_consistency_vjp(x: Tensor, y: Tensor, g: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `data_consistency` with respect to x, y and mu (a scalar)."""
    g = in_order_of(g, x)
    return (1 - mu) * g, mu * g, -(g * (x - y)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The model, read from the parameters of flowkern's own modules
# ---------------------------------------------------------------------------------------------------------------------


def squeeze(x: Tensor) -> Tensor:
    """Trade space for channels: (N, C, H, W) -> (N, 4C, H/2, W/2); channel 4c + 2i + j holds pixel (2y + i, 2x + j)."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    return F.pixel_shuffle(x, 2)


def actnorm(x: Tensor, norm, inverse: bool = False) -> Tensor:
    """exp(log_scale) (x + bias) per channel, with the parameters of a `flowkern.layers.ActNorm`."""
    log_scale_, bias = (p[None, :, None, None] for p in (norm.log_scale, norm.bias))
    return x * torch.exp(-log_scale_) - bias if inverse else torch.exp(log_scale_) * (x + bias)


def conv1x1_weight(conv) -> Tensor:
    """W = P L (U + diag(sign exp(log_s))) of a `flowkern.layers.InvertibleConv1x1`, (C, C); L is unit lower
    triangular.
    """
    lower = torch.tril(conv.lower, -1) + torch.eye(len(conv.log_s), dtype=conv.lower.dtype, device=conv.lower.device)
    upper = torch.triu(conv.upper, 1) + torch.diag(conv.sign * torch.exp(conv.log_s))
    return (lower @ upper)[conv.permutation]


def coupling_network(a: Tensor, net) -> Tensor:
    """Glow's network: 3x3 -> ActNorm -> ReLU -> 1x1 -> ActNorm -> ReLU -> 3x3 times exp(3 logs)."""
    h = F.relu(actnorm(F.conv2d(a, net.weight1, padding=1), net.norm1))
    h = F.relu(actnorm(F.conv2d(h, net.weight2), net.norm2))
    return F.conv2d(h, net.weight3, net.bias3, padding=1) * torch.exp(3 * net.logs)[None, :, None, None]


def step_of_flow(x: Tensor, step, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """One step: ActNorm, invertible 1x1 convolution, coupling. Returns the state and log|det| (N,)."""
    coupling = step.coupling
    pixels = x.shape[2] * x.shape[3]
    logdet = pixels * (step.actnorm.log_scale.sum() + step.conv.log_s.sum())
    zero = torch.zeros_like(step.actnorm.bias)
    if inverse:
        h = _evaluate(coupling.net, x[:, : x.shape[1] // 2])
        x, coupled = couple(x, h, coupling.scale, coupling.alpha, inverse=True)
        x = channel_mix(x, torch.linalg.inv(conv1x1_weight(step.conv)), zero, inverse=True)
        return actnorm(x, step.actnorm, inverse=True), coupled - logdet
    x = channel_mix(actnorm(x, step.actnorm), conv1x1_weight(step.conv), zero)
    h = _evaluate(coupling.net, x[:, : x.shape[1] // 2])
    x, coupled = couple(x, h, coupling.scale, coupling.alpha)
    return x, coupled + logdet


def _evaluate(net, a: Tensor) -> Tensor:
    return coupling_network(a, net) if getattr(net, "written_out", False) else net(a)


def split_prior(x: Tensor, split) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of the emitted half given the one that stays (Glow's conditional Gaussian)."""
    h = F.conv2d(x, split.weight, split.bias, padding=1) * torch.exp(3 * split.logs)[None, :, None, None]
    return h.chunk(2, dim=1)


def glow_forward(glow, x: Tensor) -> tuple[Tensor, Tensor]:
    """Image to latent. x (N, C, H, W) -> z (N, C*H*W) and log|det| (N,), with the parameters of a `flowkern.Glow`.

    A level's part of z is flattened pixel by pixel (channels fastest). Raises ValueError for options beyond these.
    """
    _check_options(glow)
    x = x - glow.shift
    logdet = x.new_zeros(x.shape[0])
    emitted = []
    for level in glow.levels:
        x = squeeze(x)
        for step in level.steps:
            x, d = step_of_flow(x, step)
            logdet = logdet + d
        if level.split is not None:
            x, z = x.chunk(2, dim=1)
            if level.split.learned:
                mean, log_std = split_prior(x, level.split)
                z = (z - mean) * torch.exp(-log_std)
                logdet = logdet - log_std.sum(dim=(1, 2, 3))
            emitted.append(z)
    emitted.append(x)
    return torch.cat([z.permute(0, 2, 3, 1).flatten(1) for z in emitted], dim=1), logdet


def glow_inverse(glow, z: Tensor) -> tuple[Tensor, Tensor]:
    """Latent to image: the inverse of `glow_forward`. Returns x (N, C, H, W) and the log|det| of this direction
    (N,).
    """
    _check_options(glow)
    *emitted, x = glow.split_latent(z)
    logdet = z.new_zeros(z.shape[0])
    for level in reversed(glow.levels):
        if level.split is not None:
            part = emitted.pop()
            if level.split.learned:
                mean, log_std = split_prior(x, level.split)
                part = part * torch.exp(log_std) + mean
                logdet = logdet + log_std.sum(dim=(1, 2, 3))
            x = torch.cat([x, part], dim=1)
        for step in reversed(level.steps):
            x, d = step_of_flow(x, step, inverse=True)
            logdet = logdet + d
        x = unsqueeze(x)
    return x + glow.shift, logdet


def _check_options(glow) -> None:
    beyond = {name: glow.config[name] for name in ("variant", "context_channels") if glow.config[name]}
    if glow.config["top_prior"] == "learned":
        beyond["top_prior"] = "learned"
    if beyond:
        raise ValueError(f"the reference states Glow with plain and learned splits alone, this one has {beyond}")
