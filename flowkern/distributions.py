"""A Glow as a `torch.distributions.Distribution` over images, and as a `Transform` from latents to images.

Both call the Glow that they are given: its parameters are trained through them, in its memory mode.
"""

import math
import weakref

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from flowkern.glow import Glow
from flowkern.network import versions


class GlowDistribution(Distribution):
    """The distribution of images (C, H, W) of a Glow's size, with z ~ N(0, I).

    context (*batch, context_channels), for a Glow that is conditioned: one distribution each, of batch shape `batch`.

    >>> glow = Glow((1, 4, 4), levels=1, depth=2, hidden=4)
    >>> images = GlowDistribution(glow.eval())
    >>> x = images.rsample((5,))
    >>> x.shape, images.log_prob(x).shape
    (torch.Size([5, 1, 4, 4]), torch.Size([5]))
    """

    has_rsample = True
    arg_constraints = {}

    def __init__(self, glow: Glow, context: Tensor | None = None, validate_args: bool | None = None):
        self.glow, self.context = glow, context
        batch = Size() if context is None else context.shape[:-1]
        super().__init__(batch, Size(glow.size), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=3)
    def support(self):
        return constraints.independent(constraints.real, 3)

    def expand(self, batch_shape, _instance=None) -> "GlowDistribution":
        new = self._get_checked_instance(GlowDistribution, _instance)
        new.glow = self.glow
        batch_shape = Size(batch_shape)
        new.context = None if self.context is None else self.context.expand(*batch_shape, self.context.shape[-1])
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        """Images (*sample_shape, *batch_shape, C, H, W), differentiable in the Glow's parameters."""
        shape = self._extended_shape(Size(sample_shape))
        like = next(self.glow.parameters())
        n = math.prod(shape[:-3])
        z = torch.randn(n, math.prod(self.event_shape), dtype=like.dtype, device=like.device)
        return self.glow.inverse(z, context=self._contexts(shape[:-3])).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """(*sample_shape, *batch_shape) in nats. value (*sample_shape, *batch_shape, C, H, W)."""
        if value.dim() < 3 or value.shape[-3:] != self.event_shape:
            wanted = ", ".join(map(str, self.event_shape))
            raise ValueError(f"expected images of shape (..., {wanted}), got {tuple(value.shape)}")
        leading = torch.broadcast_shapes(value.shape[:-3], self.batch_shape)
        x = value.expand(*leading, *self.event_shape).reshape(-1, *self.event_shape)
        return self.glow.log_prob(x, self._contexts(leading)).reshape(leading)

    def _contexts(self, leading: Size) -> Tensor | None:
        """One context a row, for rows that are `leading` flattened."""
        if self.context is None:
            return None
        width = self.context.shape[-1]
        return self.context.expand(*leading, width).reshape(-1, width)


class GlowTransform(Transform):
    """From latents (..., C*H*W) to images (..., C, H, W); `.inv` is the direction that scores images.

    context: (..., context_channels) for latents of the same leading dimensions, which it broadcasts to; or
    (N, context_channels) with a row for each of theirs, whatever their shape. A log-determinant that is asked for right
    after its transform is not computed again. Raises ValueError for contexts that fit neither way.
    """

    bijective = True
    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.independent(constraints.real, 3)

    def __init__(self, glow: Glow, context: Tensor | None = None, cache_size: int = 0):
        super().__init__(cache_size)
        self.glow, self.context = glow, context
        self._last = None

    def with_cache(self, cache_size: int = 1) -> "GlowTransform":
        return self if self._cache_size == cache_size else GlowTransform(self.glow, self.context, cache_size)

    def __eq__(self, other) -> bool:
        return isinstance(other, GlowTransform) and self.glow is other.glow and self.context is other.context

    __hash__ = Transform.__hash__

    def forward_shape(self, shape) -> Size:
        return Size(shape[:-1]) + Size(self.glow.size)

    def inverse_shape(self, shape) -> Size:
        return Size(shape[:-3]) + Size([math.prod(self.glow.size)])

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """log|det dx/dz| (...) in nats."""
        found, self._last = self._last, None
        known = found is not None and found[0]() is z and found[1]() is x and (found[3] or not torch.is_grad_enabled())
        if known and found[4] == self._states(z, x):
            return found[2]
        context = self._context(z.shape[:-1])
        rows = z.reshape(-1, z.shape[-1])
        return self.glow.inverse(rows, return_logdet=True, context=context)[1].reshape(z.shape[:-1])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_last": None}  # what is remembered belongs to tensors that stay here

    def _call(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        x, logdet = self.glow.inverse(rows, return_logdet=True, context=self._context(z.shape[:-1]))
        x = x.reshape(self.forward_shape(z.shape))
        return self._remembered(z, x, logdet.reshape(z.shape[:-1]), x)

    def _inverse(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, *x.shape[-3:])
        z, logdet = self.glow(rows, self._context(x.shape[:-3]))
        z = z.reshape(self.inverse_shape(x.shape))
        return self._remembered(z, x, -logdet.reshape(x.shape[:-3]), z)

    def _remembered(self, z: Tensor, x: Tensor, logdet: Tensor, result: Tensor) -> Tensor:
        me = weakref.ref(self)

        def forget(dead: weakref.ref) -> None:
            """With a tensor that is gone, what is remembered serves nobody, and its graph takes memory."""
            transform = me()
            if transform is not None and transform._last and any(dead is ref for ref in transform._last[:2]):
                transform._last = None

        grad = torch.is_grad_enabled()
        self._last = weakref.ref(z, forget), weakref.ref(x, forget), logdet, grad, self._states(z, x)
        return result

    def _states(self, z: Tensor, x: Tensor) -> tuple[list[int], list[int]]:
        """Of all that the log-determinant depends on: which tensors, and how often each was written to."""
        given = [z, x, *([] if self.context is None else [self.context]), *self.glow.parameters()]
        return list(map(id, given)), versions(given)

    def _context(self, leading: Size) -> Tensor | None:
        """One context a row, for rows that are `leading` flattened."""
        if self.context is None:
            return None
        *given, width = self.context.shape
        if given == [math.prod(leading)]:
            return self.context
        try:
            return self.context.expand(*leading, width).reshape(-1, width)
        except RuntimeError:
            raise ValueError(
                f"contexts of shape {tuple(self.context.shape)} don't go with {tuple(leading)} latents or images"
            ) from None
