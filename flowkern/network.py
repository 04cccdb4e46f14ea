"""The coupling networks of a level as the chain uses them: evaluated, and differentiated on request.

`StandardNets` is Glow's own network with folded normalisation and a written-out gradient; `LocalNets` is a user's own.
The standard network is 3x3 -> ActNorm -> ReLU -> 1x1 -> ActNorm -> ReLU -> 3x3 times exp(3 logs). The ActNorms and the
last scale are folded into the convolutions' weights (one step at a time, so that no second copy of all weights exists),
in the precision the network runs in. Parameters are a flat sequence in the order of
`flowkern.layers.CouplingNet.flat_parameters`: weight1, norm1.log_scale, norm1.bias, weight2, norm2.log_scale,
norm2.bias, weight3, bias3, logs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from flowkern import backend, ops
from flowkern.layout import in_order_of
from flowkern.replay import Replay, check_parameters, refuse_replica, refuse_shards

PARAMETERS = 9


@lru_cache
def _shapes(few: int, hidden: int, out: int) -> list[tuple[int, ...]]:
    """Of the nine parameters of a network from `few` to `out` channels."""
    return [(hidden, few, 3, 3), (hidden,), (hidden,), (hidden, hidden, 1, 1), (hidden,), (hidden,),
            (out, hidden, 3, 3), (out,), (out,)]


def check_shapes(parameters: Sequence[Tensor], few: int, out: int) -> None:
    """Raises ValueError for parameters, nine a step, that are not those of networks from `few` to `out` channels:
    kernels know memory by these sizes alone.
    """
    for first in range(0, len(parameters), PARAMETERS):
        given = [p.shape for p in parameters[first : first + PARAMETERS]]
        hidden = given[0][0]
        if given != (wanted := _shapes(few, hidden, out)):
            raise ValueError(
                f"a coupling network from {few} to {out} channels with {hidden} hidden ones wants weights and biases "
                f"of {', '.join(map(str, wanted))}, got {', '.join(str(tuple(shape)) for shape in given)}"
            )


def fold(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weights and biases (w1, b1, w2, b2, w3, b3) of the three plain convolutions that equal the network, in
    `dtype`.
    """
    w1, s1, b1, w2, s2, b2, w3, b3, logs = parameters
    e1, e2, e3 = torch.exp(s1), torch.exp(s2), torch.exp(3 * logs)
    folded = (w1 * _rows(e1), e1 * b1, w2 * _rows(e2), e2 * b2, w3 * _rows(e3), e3 * b3)
    return tuple(p.to(dtype) for p in folded)


def trace(folded: Sequence[Tensor], a: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """a (N, C/2, H, W), of any dtype and strides -> h and, to `keep` for `vjp`, the hidden activations
    (N, hidden, H, W).

    All in the dtype and memory order (channels-last) of the folded weights.
    """
    w1, b1, w2, b2, w3, b3 = folded
    a = _as_input(a, w1)
    h1 = F.conv2d(a, w1, b1, padding=1).relu_()
    h2 = F.conv2d(h1, w2, b2).relu_()
    # Channels-last already, except from PyTorch's double-precision convolution.
    h = F.conv2d(h2, w3, b3, padding=1).contiguous(memory_format=torch.channels_last)
    return h, [h1, h2] if keep else []


def _as_input(a: Tensor, weight: Tensor) -> Tensor:
    return a.to(weight.dtype, memory_format=torch.channels_last)


def vjp(
    parameters: Sequence[Tensor],
    folded: Sequence[Tensor],
    a: Tensor,
    hidden: list[Tensor],
    dh: Tensor,
    need: Sequence[bool],
    da: Tensor,
) -> list[Tensor | None]:
    """Gradients of `trace` with respect to a, added to `da`, and, where `need` says so, to the nine parameters.

    hidden: [h1, h2], emptied here, so that each is freed as soon as it has served.
    """
    w1, _, w2, _, w3, _ = folded
    a = _as_input(a, w1)
    need1, need2, need3 = any(need[0:3]), any(need[3:6]), any(need[6:9])
    h2 = hidden.pop()
    g, dw3, db3 = _convolution_vjp(dh, h2, w3, 1, need3)
    g = _relu_vjp_(g, h2)
    del h2
    h1 = hidden.pop()
    g, dw2, db2 = _convolution_vjp(g, h1, w2, 0, need2)
    g = _relu_vjp_(g, h1)
    del h1
    g, dw1, db1 = _convolution_vjp(g, a, w1, 1, need1)
    da.add_(g)
    gradients: list[Tensor | None] = []
    for needed, dw, db in ((need1, dw1, db1), (need2, dw2, db2)):
        gradients += _unfold_norm(parameters[len(gradients) :], dw, db) if needed else [None] * 3
    gradients += _unfold_scale(parameters[6:], dw3, db3) if need3 else [None] * 3
    return [g if needed else None for g, needed in zip(gradients, need, strict=True)]


def tiled(parameters_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `trace` and `vjp` have no memory of a hidden activation's size but what is kept for backward."""
    return False


backend.register_defaults(network_fold=fold, network_trace=trace, network_vjp=vjp, network_tiled=tiled)


def _unfold_norm(parameters: Sequence[Tensor], dw: Tensor, db: Tensor) -> list[Tensor]:
    """From the gradient of w exp(s) and exp(s) b to those of w, s and b."""
    w, s, b = parameters[:3]
    dw, db, e = _laid_out(dw, w), db.to(w.dtype), torch.exp(s)
    return [dw * _rows(e), e * ((dw * w).sum(dim=(1, 2, 3)) + db * b), e * db]


def _unfold_scale(parameters: Sequence[Tensor], dw: Tensor, db: Tensor) -> list[Tensor]:
    """From the gradient of w exp(3 logs) and b exp(3 logs) to those of w, b and logs."""
    w, b, logs = parameters
    dw, db, e = _laid_out(dw, w), db.to(w.dtype), torch.exp(3 * logs)
    return [dw * _rows(e), e * db, 3 * e * ((dw * w).sum(dim=(1, 2, 3)) + db * b)]


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in its parameter's precision and memory layout, which is what optimizers and fake kernels expect."""
    return torch.empty_like(parameter).copy_(gradient)


def _convolution_vjp(g: Tensor, x: Tensor, w: Tensor, padding: int, need: bool):
    return torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]], [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, need, need]
    )


def _relu_vjp_(g: Tensor, activation: Tensor) -> Tensor:
    """In place, so that no third hidden-sized tensor lives."""
    return torch.ops.aten.threshold_backward.grad_input(g, activation, 0, grad_input=g)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to. Tensors of inference mode don't count that."""
    return [0 if t.is_inference() else t._version for t in tensors]


def _rows(scale: Tensor) -> Tensor:
    return scale[:, None, None, None]


class StandardNets:
    """Glow's own coupling networks of a level, run by a backend: flat parameters, written-out gradient."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype, table):
        self.parameters = parameters
        self.dtype = dtype
        self.table = table
        self._last: tuple[int, Sequence[Tensor]] | None = None

    def _parameters(self, k: int) -> Sequence[Tensor]:
        return self.parameters[k * PARAMETERS : (k + 1) * PARAMETERS]

    def _folded(self, k: int) -> Sequence[Tensor]:
        """The folded weights of step k, kept until another step's are wanted: backward uses them twice in a row."""
        if self._last is None or self._last[0] != k:
            self._last = None
            self._last = k, self.table.network_fold(self._parameters(k), self.dtype)
        return self._last[1]

    def trace(self, k: int, a: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h and what `vjp` wants kept."""
        return self.table.network_trace(self._folded(k), a, True)

    def forward(self, k: int, a: Tensor) -> Tensor:
        return self.table.network_trace(self._folded(k), a, False)[0]

    def vjp(self, k: int, a: Tensor, kept: list[Tensor], dh: Tensor, need: Sequence[bool], da: Tensor):
        """The parameters' gradients; that of a is added to `da`."""
        return self.table.network_vjp(self._parameters(k), self._folded(k), a, kept, dh, need, da)

    def count(self, k: int) -> int:
        return PARAMETERS


class LocalNets:
    """A user's own coupling networks: evaluated as they are, differentiated by local autograd.

    What is evaluated again in backward is a replay of how it ran in forward: same dropout, batch norm updated once.
    context (N, ...), if not None, is the networks' second argument; `dcontext` adds up its gradient over steps.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype | None, device: torch.device, context=None):
        for module in modules:
            refuse_replica(module)
            refuse_shards(module)
        self.modules = modules
        self.dtype = dtype
        self.context = None if context is None else context.detach()
        self.needs_context = context is not None and context.requires_grad
        self.dcontext: Tensor | None = None
        self.replays = [Replay(m, device) for m in modules]

    def forward(self, k: int, a: Tensor) -> Tensor:
        """The first evaluation, or one like it."""
        return self.evaluate(k, a, self.context)

    def trace(self, k: int, a: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h and what `vjp` wants kept."""
        self.check_parameters(k)
        with torch.enable_grad():
            inputs = [a.detach().requires_grad_()]
            if self.needs_context:
                inputs.append(self.context.detach().requires_grad_())
            h = self.evaluate(k, inputs[0], inputs[1] if self.needs_context else self.context)
        return h.detach(), [h, *inputs]

    def check_parameters(self, *steps: int) -> None:
        """Raise RuntimeError if the parameters of these networks (of none: of all) are not those of forward."""
        check_parameters(
            (self.replays[k] for k in steps or range(len(self.modules))),
            "coupling networks'",
            "with networks of one's own, or a context, that needs memory='store', and has no second derivative",
        )

    def functions(self, tensors: Sequence[Tensor]) -> list[Callable]:
        """The networks as functions of a, with these tensors as context, if they have one, and parameters."""
        parameters, nets = iter(tensors), []
        context = None if self.context is None else next(parameters)
        for k, module in enumerate(self.modules):
            own = {name: next(parameters) for name, _ in module.named_parameters()}
            nets.append(partial(self.evaluate, k, context=context, parameters=own))
        return nets

    def evaluate(
        self, k: int, a: Tensor, context: Tensor | None, parameters: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The network k of a (and context), recorded the first time and replayed afterwards, with its own parameters or
        with others.
        """
        module, given = self.modules[k], (a,) if context is None else (a, context)
        # Without autocast's cache: what it keeps of a weight that was cast without a graph would have none in backward.
        # Full precision is what the network has without autocast, which on the CPU warns of it.
        lowered = self.dtype in (torch.bfloat16, torch.float16)
        autocast = torch.autocast(a.device.type, self.dtype if lowered else None, lowered, cache_enabled=False)
        before = versions(given)
        with self.replays[k].again_or_first(), autocast:
            h = module(*given) if parameters is None else functional_call(module, parameters, given)
            h = ops.channels_last(h)
        if versions(given) != before:
            raise RuntimeError(
                "a coupling network must not work in place on its input, which the coupling passes on unchanged: the "
                "network's first layer may be an activation with inplace=True"
            )
        return h

    def vjp(self, k: int, a: Tensor, kept: list[Tensor], dh: Tensor, need: Sequence[bool], da: Tensor):
        """The parameters' gradients; that of a is added to `da`."""
        h, *inputs = kept
        if not h.requires_grad:  # a constant
            return [None] * len(need)
        wanted = [p for p, needed in zip(self.replays[k].parameters, need, strict=True) if needed]
        # The graph is retained because in store mode the caller may run backward twice; it dies with `kept`.
        found = torch.autograd.grad(h, [*inputs, *wanted], dh, retain_graph=True, allow_unused=True)
        if found[0] is not None:
            da.add_(found[0])
        if self.needs_context and found[1] is not None:
            self.dcontext = found[1] if self.dcontext is None else self.dcontext + found[1]
        # In the parameter's own layout, step by step: accumulation would copy the others, for a whole level at once.
        own = iter(
            g if g is None else in_order_of(g, p)
            for g, p in zip(found[len(inputs) :], wanted, strict=True)
        )
        return [next(own) if needed else None for needed in need]

    def count(self, k: int) -> int:
        return len(self.replays[k].parameters)
