"""The proximal map of a Glow as one reversible map: `g(f(x) / (1 + lambda))`, of which only the result is kept.

Backward starts from the result. Undoing g, level by level, rebuilds the shrunk latent; times 1 + lambda it is the
latent, from which f is undone. This is for Glows that lose and keep nothing on the way (`is_reversible`).
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd import Function

from flowkern import backend as backends
from flowkern import ops, transforms
from flowkern.chain import has_squeeze_mix, is_standard, network_dtype
from flowkern.checks import refuse_non_finite
from flowkern.glow import Glow
from flowkern.layers import blocks, squeeze, unsqueeze
from flowkern.mix import compose
from flowkern.stored import hooked

_MIXES = 3  # matrix, offset and inverse, before a level's other tensors


def is_reversible(glow: Glow) -> bool:
    """Whether `shrunk` serves this Glow as it is set: "recompute" without more, Glow's own networks, plain splits.

    A subclass or a hook may have its own idea of f, and torch.func's vmap and jvp have theirs of the chain.
    """
    priors = [glow.top, *(level.split for level in glow.levels[:-1])]
    return (
        type(glow) is Glow
        and glow.memory == "recompute"
        and glow.anchor_every is None
        and glow.memory_budget is None
        and glow.context_channels == 0
        and not glow.variant.changed()
        and all(prior.is_standard for prior in priors)
        and is_standard(step.coupling.net for level in glow.levels for step in level.steps)
        and not hooked(glow)
        and not transforms.batched_or_forward()
    )


def shrunk(glow: Glow, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """g(f(x) / (1 + lam)) by a Glow that `is_reversible`. x (N, C, H, W), as `Glow.ready` returns it; lam () or (N,).

    Returns the image (N, C, H, W) and log p(x) (N,) in nats, differentiable once in x, lam and the Glow's parameters.
    Raises ValueError for latents that are not finite, where the Glow looks.
    """
    name = backends.resolve(x.device, glow.backend)
    coupling = glow.levels[0].steps[0].coupling
    dtype = network_dtype(x, glow.compute_dtype) or x.dtype
    # The settings of the chains, and what is not theirs.
    chains = coupling.scale, coupling.alpha, name, dtype, "recompute", 0
    settings = chains, glow.shift, has_squeeze_mix(x.device, x.dtype, name), glow.checks_values(x.device)
    mixes = [compose(level.steps, glow.backend) for level in glow.levels]  # once, for f and g
    nets = [[p for step in level.steps for p in step.coupling.net.flat_parameters()] for level in glow.levels]
    levels = [[*mix[:_MIXES], *parameters] for mix, parameters in zip(mixes, nets, strict=True)]
    counts, tensors = tuple(map(len, levels)), [t for level in levels for t in level]
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, lam, *tensors))
    with torch.autocast(x.device.type, enabled=False):
        # Without gradients the Function is left out: torch.compile binds a variadic one's arguments wrongly there.
        run = _Shrunk.apply if needed else _Shrunk.forward
        out, log_prob = run(x, lam, counts, settings, *tensors)
    pixels = math.prod(x.shape[2:])
    mixed = sum(logdet * (pixels >> 2 * i) for i, (*_, logdet) in enumerate(mixes, start=1))
    return out, log_prob + mixed - 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi)


class _Shrunk(Function):
    """The image, and what of log p(x) depends on the latents and the couplings."""

    @staticmethod
    def forward(x, lam, counts, settings, *tensors):
        chains, shift, reads_blocks, checks = settings
        levels, log_probs = _by_level(tensors, counts), []

        def run(reverse, i, states):
            matrix, offset, inverse, *parameters = levels[i]
            (x,) = states
            x, logdet, _ = ops.raw.chain(x, matrix, offset, inverse, parameters, reverse, *chains)
            if not reverse:
                log_probs.append(logdet)
            return [x]

        def shrink(parts):
            (z,) = parts
            log_probs.append(-0.5 * z.square().sum(dim=(1, 2, 3)))
            z = z / _factor(lam)
            if checks:
                refuse_non_finite(z, "latents")
            return [z]

        latents = _descend([x - shift], partial(run, False), shrink, counts, blocks if reads_blocks else squeeze)
        return _ascend(latents, partial(run, True))[0] + shift, sum(log_probs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, ctx.counts, ctx.settings, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], lam, *tensors)

    @staticmethod
    @ops.without_autocast
    def backward(ctx, g, dlog_prob):
        if ops.wants_formulas():
            raise ops.no_graph("in memory='recompute'", "memory='store'")
        out, lam, *tensors = ctx.saved_tensors
        chains, shift, *_ = ctx.settings
        levels, needed = _by_level(tensors, ctx.counts), _by_level(ctx.needs_input_grad[4:], ctx.counts)
        found: list[list[Tensor] | None] = [None] * len(levels)
        no_logdet, products = out.new_zeros(len(out)), []
        g = torch.zeros_like(out) if g is None else g
        dlogdet = no_logdet if dlog_prob is None else dlog_prob.contiguous()

        def undo(reverse, i, states):
            matrix, offset, inverse, *parameters = levels[i]
            v, g = states
            mixes, glogdet = (matrix, offset, inverse), no_logdet if reverse else dlogdet
            g, dmatrix, doffset, gradients, v = ops.raw.chain_vjp(
                None, v, g, glogdet, [], *mixes, parameters, needed[i][_MIXES:], reverse, *chains
            )
            gradients = [dmatrix, doffset, *gradients]
            # Level by level, so that there are never two gradients of everything.
            found[i] = gradients if found[i] is None else [a.add_(b) for a, b in zip(found[i], gradients, strict=True)]
            return [v, g]

        def unshrink(parts):
            z, g = parts
            products.append((g * z).sum(dim=(1, 2, 3)))
            z, g = z * _factor(lam), g / _factor(lam)
            return [z, g if dlog_prob is None else g - z * dlog_prob[:, None, None, None]]

        latents = _descend([out - shift, g], partial(undo, True), unshrink, ctx.counts)
        _, dx = _ascend(latents, partial(undo, False))
        # z is what was divided by 1 + lambda already.
        dlam = -(sum(products) / (1 + lam)).sum_to_size(lam.shape)
        return dx, dlam, None, None, *_gradients(found, needed)


def _descend(images: list[Tensor], run, emit, counts: Sequence, enter=squeeze) -> list[list[Tensor]]:
    """Images through the levels, from fine to coarse: what `emit` makes of each level's latents, one a level and image.

    run(i, states): the steps of level i, on images that `enter` has squeezed.
    """
    latents = []
    for i in range(len(counts)):
        images = run(i, [enter(x) for x in images])
        if i + 1 < len(counts):
            images, emitted = zip(*(x.chunk(2, dim=1) for x in images), strict=True)
            latents.append(emit(emitted))
    return [*latents, emit(images)]


def _ascend(latents: list[list[Tensor]], run) -> list[Tensor]:
    """From coarse to fine: the images of latents, which are taken out of their list on the way."""
    states = latents.pop()
    while True:
        images = [unsqueeze(x) for x in run(len(latents), [ops.channels_last(x) for x in states])]
        if not latents:
            return images
        states = [torch.cat(halves, dim=1) for halves in zip(images, latents.pop(), strict=True)]


def _factor(lam: Tensor) -> Tensor:
    """1 + lambda, for images."""
    return 1 + lam.reshape(-1, 1, 1, 1)


def _by_level(items: Sequence, counts: Sequence[int]) -> list[Sequence]:
    ends = list(accumulate(counts))
    return [items[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _gradients(found: list[list[Tensor]], needed: list[Sequence[bool]]) -> list[Tensor | None]:
    """The gradients of all levels' tensors in their order; inverses have none."""
    every = []
    for (dmatrix, doffset, *gradients), (_, _, _, *need) in zip(found, needed, strict=True):
        gradients = iter(gradients)
        every += [dmatrix, doffset, None, *(next(gradients) if wanted else None for wanted in need)]
    return every
