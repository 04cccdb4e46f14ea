"""The folds of an unfolded network in the memory of a few images, however many folds there are.

Between two folds lies an image. Only some of these are kept for backward, the others are computed again, by binomial
checkpointing (Griewank and Walther 2000, "revolve"): of all ways to come back with so many images at a time, one that
evaluates the fewest folds again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.autograd import Function

from flowkern import ops
from flowkern.replay import (
    Applied,
    Autocast,
    Replay,
    add_gradient,
    check_parameters,
    refuse_replica,
    refuse_shards,
)


def unfold(
    fold: Callable,
    modules: Sequence[Sequence[nn.Module]],
    x: Tensor,
    *shared: Tensor,
    kept: int,
    fixed: Sequence[nn.Module] = (),
) -> tuple[Tensor, list[Tensor]]:
    """All folds, one after the other: the image (N, C, H, W), and what each told of log p, (N,).

    fold: fold(k, x, *shared) -> x after fold k, and log p (N,) or None. modules: for each fold those that it uses.
    shared: tensors that all folds use. kept: how many images are kept at a time, >= 1, beside the one that the fold
    at hand starts from. fixed: those of the modules whose buffers folds leave alone. Differentiable once, in x, shared,
    the modules' parameters and fixed buffers, and nothing else. Batch norm is updated once and dropout the same when a
    fold is evaluated again; what modules hold beside parameters and buffers must not change before backward.
    """
    folds = [_Fold(fold, k, used, fixed, x.device) for k, used in enumerate(modules)]
    given = {id(t): t for one in folds for t in one.held() if t.requires_grad or not isinstance(t, nn.Parameter)}
    place = {name: i for i, name in enumerate(given, start=len(shared))}
    for one in folds:
        one.places = [place.get(id(t)) for t in one.held()]
    x, *log_probs = _Folds.apply(folds, kept, len(shared), x, *shared, *given.values())
    return x, log_probs


def evaluated_again(folds: int, kept: int) -> int:
    """How many evaluations of a fold backward adds to those of forward; folds and kept >= 1."""
    return _plan(folds, kept)[0]


@cache
def _plan(count: int, kept: int) -> tuple[float, int]:
    """For `count` folds from an image that is there, one of the `kept`: the fewest evaluations that are made again, and
    after how many folds the next image is kept then.
    """
    if count == 1:
        return 0, 0
    if kept == 0:
        return float("inf"), 0
    return min((n + _plan(n, kept)[0] + _plan(count - n, kept - 1)[0], n) for n in range(1, count))


class _Fold:
    """One fold, as it runs for the first time and again. places: of what it holds among the tensors of `_Folds`, None
    for parameters that are not trained.
    """

    def __init__(
        self, fold: Callable, k: int, modules: Sequence[nn.Module], fixed: Sequence[nn.Module], device: torch.device
    ):
        for module in modules:
            refuse_replica(module)
            refuse_shards(module)
        self.applied = Applied(partial(fold, k), modules)
        self.replay = Replay(self.applied, device)
        # Where modules keep them: what is put there in a tensor's place is what they use.
        stores = [m._parameters for m in self.applied.modules()] + [m._buffers for f in fixed for m in f.modules()]
        self._slots = [(store, name) for store in stores for name, t in store.items() if t is not None]
        self.places: list[int | None] = []

    def held(self) -> list[Tensor]:
        """The parameters, and the buffers that are fixed."""
        return [store[name] for store, name in self._slots]

    @contextlib.contextmanager
    def holding(self, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> Iterator[None]:
        """A context in which it holds these, by their places. Reversible layers ask for their parameters again in
        backward, which must then be those of the graph.
        """
        before = self.held()
        try:
            for (store, name), i in zip(self._slots, self.places, strict=True):
                if i is not None:
                    store[name] = tensors[i]
            yield
        finally:
            for (store, name), t in zip(self._slots, before, strict=True):
                store[name] = t

    def __call__(self, x: Tensor, tensors: Sequence[Tensor], count: int):
        """tensors: the `count` shared ones and what folds hold, as of forward."""
        with self.replay.again_or_first(), self.holding(tensors):
            return self.applied(x, *tensors[:count])

    def graph(self, x: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], count: int):
        """Leaves by their places, that of x at -1, and the outputs made from them. The leaves are the fold's own: the
        hooks of parameters are for the gradients that `_Folds` returns.
        """
        used = [*range(count), *(i for i in self.places if i is not None)]
        leaves = {i: tensors[i].detach().requires_grad_(needed[i]) for i in used}
        leaves[-1] = x.detach().requires_grad_()
        with torch.enable_grad(), self.replay.again_or_first(), self.holding(leaves):
            return leaves, self.applied(leaves[-1], *(leaves[i] for i in range(count)))


class _Folds(Function):
    """All folds: tensors are the `count` shared ones and what folds hold."""

    @staticmethod
    def forward(ctx, folds, kept, count, x, *tensors):
        ctx.folds, ctx.kept, ctx.count, ctx.autocast = folds, kept, count, Autocast(x.device)
        images: dict[int, Tensor] = {}
        log_probs, start, last = [], 0, len(folds) - 1
        with ctx.autocast():
            for k, fold in enumerate(folds):
                if k == start:
                    start += _plan(len(folds) - k, kept - len(images))[1]
                    images[k] = x
                if k < last:
                    x, log_prob = fold(x, tensors, count)
                else:  # The graph of the last one is kept, because backward starts with it.
                    ctx.last = fold.graph(x, tensors, ctx.needs_input_grad[4:], count)
                    x, log_prob = (t if t is None else t.detach() for t in ctx.last[1])
                if log_prob is not None:
                    log_probs.append(log_prob)
        ctx.set_materialize_grads(False)
        ctx.starts = list(images)
        ctx.save_for_backward(*images.values(), *tensors)
        return x, *log_probs

    @staticmethod
    def backward(ctx, g, *dlog_probs):
        if ops.wants_formulas():
            raise ops.no_graph("with kept_images", "kept_images=None")
        check_parameters((fold.replay for fold in ctx.folds), "folds'", "that needs kept_images=None")
        saved = ctx.saved_tensors  # once: checkpointing around this has them ready for one reading
        images, tensors = saved[: len(ctx.starts)], saved[len(ctx.starts) :]
        backward = _Backward(ctx, tensors, dlog_probs)
        last = len(ctx.folds)
        for used, (start, x) in reversed(list(enumerate(zip(ctx.starts, images, strict=True)))):
            g = backward.through(start, last, x, g, ctx.kept - used)
            last = start
        return None, None, None, g, *backward.found


class _Backward:
    """One backward pass through `_Folds`. found: the gradients of the tensors so far."""

    def __init__(self, ctx, tensors: Sequence[Tensor], dlog_probs: Sequence[Tensor | None]):
        self.ctx, self.tensors, self.dlog_probs = ctx, tensors, dlog_probs
        self.found: list[Tensor | None] = [None] * len(tensors)

    def through(self, first: int, last: int, x: Tensor, g: Tensor | None, kept: int) -> Tensor | None:
        """The gradient of x, the image before fold `first`, from that of the one before fold `last`."""
        while last > first + 1:
            middle = first + _plan(last - first, kept)[1]
            g = self.through(middle, last, self._evaluated(first, middle, x), g, kept - 1)
            last = middle
        return self._through_one(first, x, g)

    def _evaluated(self, first: int, last: int, x: Tensor) -> Tensor:
        with torch.no_grad(), self.ctx.autocast():
            for fold in self.ctx.folds[first:last]:
                x, _ = fold(x, self.tensors, self.ctx.count)
        return x

    def _through_one(self, k: int, x: Tensor, g: Tensor | None) -> Tensor | None:
        leaves, outputs = self._graph(k, x)
        pairs = zip(outputs, (g, self.dlog_probs[k] if k < len(self.dlog_probs) else None), strict=True)
        pairs = [(out, d) for out, d in pairs if d is not None and out.requires_grad]
        if not pairs:
            return None
        outputs, gradients = zip(*pairs, strict=True)
        wanted = {i: t for i, t in leaves.items() if t.requires_grad}
        with self.ctx.folds[k].holding(leaves):
            found = torch.autograd.grad(outputs, [*wanted.values()], gradients, allow_unused=True)
        found = dict(zip(wanted, found, strict=True))
        g = found.pop(-1)
        for i, d in found.items():
            add_gradient(self.found, i, d, self.tensors[i])
        return g

    def _graph(self, k: int, x: Tensor):
        ctx = self.ctx
        if k == len(ctx.folds) - 1 and ctx.last is not None:  # there is none the second time, with retain_graph=True
            graph, ctx.last = ctx.last, None
            return graph
        with ctx.autocast():
            return ctx.folds[k].graph(x, self.tensors, ctx.needs_input_grad[4:], ctx.count)
