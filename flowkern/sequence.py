"""A user's own invertible steps with gradients that keep no activations."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Function

from flowkern import ops, transforms
from flowkern.chain import MEMORY_MODES
from flowkern.checks import choice, positive_int
from flowkern.replay import Autocast, Replay, add_gradient, check_parameters, refuse_replica, refuse_shards


class ReversibleSequence(nn.Module):
    """Invertible steps one after the other, trained without keeping their activations.

    steps: modules with forward(x) -> (y, logdet (N,)) and inverse(y) -> x; any shapes, N first. They may contain
    dropout (replayed) and batch norm (its statistics are updated once). They must not work in place on what they are
    given, and not depend on anything that changes between forward and backward. memory: "recompute" keeps the output
    alone and rebuilds each step's input by its inverse, which costs a second evaluation of the step; "checkpoint" keeps
    each step's input; "store" is ordinary autograd. anchor_every: in "recompute", keep every n-th step's input exactly.

    After Gomez et al. 2017 (arXiv:1707.04585). Raises ValueError for no steps or unknown modes, TypeError for a step
    without `inverse` or an `anchor_every` that is no int.

    >>> from flowkern.layers import StepOfFlow
    >>> flow = ReversibleSequence([StepOfFlow(4, hidden=8) for _ in range(3)])
    >>> x = torch.randn(2, 4, 8, 8)
    >>> y, logdet = flow(x)
    >>> torch.allclose(flow.inverse(y), x, atol=1e-4)
    True
    """

    def __init__(self, steps: Iterable[nn.Module], memory: str = "recompute", anchor_every: int | None = None):
        super().__init__()
        steps = list(steps)
        if not steps:
            raise ValueError("ReversibleSequence wants at least one step, got none")
        for i, step in enumerate(steps):
            if not isinstance(step, nn.Module) or not callable(getattr(step, "inverse", None)):
                raise TypeError(f"step {i} wants to be an nn.Module with inverse(y) -> x, got {type(step).__name__}")
        self.steps = nn.ModuleList(steps)
        self.memory, self.anchor_every = memory, anchor_every

    @property
    def memory(self) -> str:
        """What is kept between forward and backward: "recompute", "store" or "checkpoint"."""
        return self._memory

    @memory.setter
    def memory(self, mode: str) -> None:
        self._memory = choice(mode, "memory", MEMORY_MODES)

    @property
    def anchor_every(self) -> int | None:
        """Keep an exact state every so many steps; None keeps none."""
        return self._anchor_every

    @anchor_every.setter
    def anchor_every(self, every: int | None) -> None:
        self._anchor_every = None if every is None else positive_int(every, "anchor_every")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, ...) -> y and log|det dy/dx| (N,), the sum of the steps'."""
        return self._run(x, reverse=False, want_logdet=True)

    def inverse(self, y: Tensor, return_logdet: bool = False):
        """y -> x, or (x, log|det dx/dy| (N,)), which evaluates each step forwards too. Differentiable, as lean."""
        x, logdet = self._run(y, reverse=True, want_logdet=return_logdet)
        return (x, logdet) if return_logdet else x

    def _run(self, x: Tensor, reverse: bool, want_logdet: bool) -> tuple[Tensor, Tensor]:
        if self.memory != "store" and torch.is_grad_enabled():
            refuse_replica(self)
            refuse_shards(self)
        order = [_Step(s, x.device, reverse, want_logdet) for s in (reversed(self.steps) if reverse else self.steps)]
        parameters = [p for p in self.parameters() if p.requires_grad]
        needed = torch.is_grad_enabled() and (x.requires_grad or parameters)
        if self.memory != "store" and needed:
            if transforms.is_transformed():
                raise RuntimeError(f"torch.func wants memory='store', got memory={self.memory!r}")
            every = 1 if self.memory == "checkpoint" else self.anchor_every
            return _Sequence.apply(x, order, every, self.memory, *parameters)
        logdet = x.new_zeros(x.shape[0])
        for step in order:
            x, d = step.first(x)
            logdet = logdet + d
        return x, logdet


class _Step:
    """One step in the direction that is run, with what its replay needs."""

    def __init__(self, module: nn.Module, device: torch.device, reverse: bool, want_logdet: bool):
        self.module, self.reverse, self.want_logdet = module, reverse, want_logdet
        self.replay = Replay(module, device)

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and logdet, as it runs for the first time."""
        self.strides = torch.empty_like(x, device="meta").stride()  # dense, also for an x that was expanded
        with self.replay.recorded():
            out = self.module.inverse(x) if self.reverse else self.module(x)
        return (out, self._logdet_of(x, out)) if self.reverse else out

    def again(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same once more."""
        with self.replay.restored():
            out = self.module.inverse(x) if self.reverse else self.module(x)
        return (out, self._logdet_of(x, out)) if self.reverse else out

    def back(self, out: Tensor) -> Tensor:
        """The input from the output, in the memory layout that it had: dropout's mask follows it."""
        with self.replay.restored():
            x = self.module(out)[0] if self.reverse else self.module.inverse(out)
        if x.stride() == self.strides:
            return x
        return torch.empty_strided(x.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)

    def _logdet_of(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.want_logdet:
            return y.new_zeros(y.shape[0])
        with self.replay.restored():
            return -self.module(x)[1]


class _Sequence(Function):
    @staticmethod
    def forward(ctx, x, order, every, memory, *parameters):
        given, logdet, kept = x, x.new_zeros(x.shape[0]), []
        ctx.autocast = Autocast(x.device)
        with ctx.autocast():
            for position, step in enumerate(order):
                kept.append(x if every and position and position % every == 0 else None)
                x, d = step.first(x)
                logdet = logdet + d
        x = x.clone() if x is given else x
        ctx.set_materialize_grads(False)
        ctx.order, ctx.memory, ctx.positions = order, memory, [k is not None for k in kept]
        boundary = given if memory == "checkpoint" else x
        ctx.save_for_backward(boundary, *(k for k in kept if k is not None), *parameters)
        return x, logdet

    @staticmethod
    def backward(ctx, g, glogdet):
        if torch.is_grad_enabled():
            raise ops.no_graph(f"in memory={ctx.memory!r}", "memory='store'")
        check_parameters((step.replay for step in ctx.order), "steps'", "that needs memory='store'")
        boundary, *saved = ctx.saved_tensors
        kept = {position: saved.pop(0) for position, has in enumerate(ctx.positions) if has}
        if ctx.memory == "checkpoint":
            kept[0] = boundary
        gradients: list[Tensor | None] = [None] * len(saved)
        v = boundary
        for position in reversed(range(len(ctx.order))):
            with ctx.autocast():
                step = ctx.order[position]
                x = kept.pop(position) if position in kept else step.back(v)
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    out, d = step.again(leaf)
            outputs = [(o, c) for o, c in ((out, g), (d, glogdet)) if c is not None and o.requires_grad]
            v = x
            if not outputs:
                g = None
                continue
            g, *found = torch.autograd.grad(
                [o for o, _ in outputs], [leaf, *saved], [c for _, c in outputs], allow_unused=True
            )
            for i, d in enumerate(found):
                add_gradient(gradients, i, d, saved[i])
        return g, None, None, None, *gradients
