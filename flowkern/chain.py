"""The reversible chain: K steps of flow whose backward pass rebuilds activations by running the steps backwards.

A chain maps x to (z, logdet) or, with `reverse`, z to (x, logdet). Step k is the channel mix y = M_k x + m_k followed
by the coupling x' = couple(y, net_k(first half of y)). What is kept between forward and backward depends on `memory`:

- "recompute": the chain's output only (and the exact state every `anchor_every` steps). Backward rebuilds each step's
  input from its output; one evaluation of the coupling network serves both the inversion and its own gradient, because
  the half that it reads passes through the coupling unchanged. With `kept_steps`, the last steps to run are a chain of
  their own, in "store": autograd frees what they kept before the first ones are rebuilt, from the exact state between.
- "checkpoint": each step's input. Backward evaluates the network again but inverts nothing.
- "store": each step's input, (raw_s, t) and the network's hidden activations. Backward evaluates nothing again.

The three give the same gradients, up to the rounding of the inversion, which `flowkern.audit` measures.
After Gomez et al. 2017 (arXiv:1707.04585) and the contract of InvertibleNetworks.jl.
"""

import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd import Function

from flowkern import backend as backends
from flowkern import network, ops, reference
from flowkern.checks import choice, positive_int
from flowkern.layout import empty_channels_last
from flowkern.stored import hooked

MEMORY_MODES = ("recompute", "store", "checkpoint")


def _first_half(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def _is_anchor(position: int, anchor_every: int) -> bool:
    return anchor_every > 0 and position > 0 and position % anchor_every == 0


def _run(x, matrix, offset, inverse, nets, reverse, scale, alpha, table, memory, anchor_every):
    """Run the chain. Returns the state, logdet (N,) and a list with, per step, what backward wants kept (a list)."""
    steps = range(len(matrix))
    logdets: list[Tensor] = []
    kept: list[list[Tensor]] = []
    if memory != "recompute":
        for position, k in enumerate(reversed(steps) if reverse else steps):
            state = [] if position == 0 else [x]
            y = x if reverse else _mix(x, matrix[k], offset[k], table)
            h, hidden = nets.trace(k, _first_half(y)) if memory == "store" else (nets.forward(k, _first_half(y)), None)
            ops.check_coupling(y, h, scale)  # a user's network may give anything, and kernels read it by its address
            kept.append(state + ([h, *hidden] if memory == "store" else []))
            if reverse:
                x, d = table.mix_couple(y, h, inverse[k], offset[k], scale, alpha)
            else:
                x, d = table.couple(y, h, scale, alpha, False)
            logdets.append(d)
        return x, _total(logdets), kept
    # An anchor is the input of the step's channel mix: undoing the mix is what amplifies errors most, and the network's
    # input passes through the coupling as it is. A kept state has to exist, so there coupling and mix are not fused.
    if not reverse:
        x = _mix(x, matrix[0], offset[0], table)
        kept.append([])
    for position, k in enumerate(reversed(steps) if reverse else steps):
        h = nets.forward(k, _first_half(x))
        ops.check_coupling(x, h, scale)
        if reverse and _is_anchor(position, anchor_every):
            x, d = table.couple(x, h, scale, alpha, True)
            kept.append([x])
            x = table.channel_mix(x, inverse[k], offset[k], True)
        elif reverse:
            x, d = table.mix_couple(x, h, inverse[k], offset[k], scale, alpha)
            kept.append([])
        elif k + 1 == len(steps):
            x, d = table.couple(x, h, scale, alpha, False)
        elif _is_anchor(position + 1, anchor_every):
            x, d = table.couple(x, h, scale, alpha, False)
            kept.append([x])
            x = table.channel_mix(x, matrix[k + 1], offset[k + 1], False)
        else:
            x, d = table.couple_mix(x, h, matrix[k + 1], offset[k + 1], scale, alpha)
            kept.append([])
        del h
        logdets.append(d)
    return x, _total(logdets), kept


def _mix(x: Tensor, matrix: Tensor, offset: Tensor, table) -> Tensor:
    """The channel mix of a state, or of the blocks of an image that a level squeezes."""
    return table.squeeze_mix(x, matrix, offset) if x.dim() == 6 else table.channel_mix(x, matrix, offset, False)


def as_state(x: Tensor) -> Tensor:
    """A state (N, C, H, W), given itself or as blocks (N, C/4, 2, 2, H, W): itself, or a channels-last copy, by way of
    planes: on the CPU two such copies take a third of one that steps from block to block.
    """
    return ops.channels_last(x.flatten(1, 3)) if x.dim() == 6 else x


def _total(logdets: list[Tensor]) -> Tensor:
    """The sum over steps, and over the parts that a backend may leave of each: (N,). Added up once, not once a step."""
    return torch.cat([d if d.dim() == 2 else d[:, None] for d in logdets], dim=1).sum(dim=1)


def _vjp(x, v, g, glogdet, kept, matrix, offset, inverse, nets, need, reverse, scale, alpha, table, memory):
    """Reverse-mode derivative of `_run`. x is its input, v its output (the one that `memory` doesn't use is ignored).

    Returns dx, dmatrix, doffset, the list of parameter gradients and, in "recompute", the input as it was rebuilt.
    """
    count = len(matrix)
    steps = range(count)
    stored = memory != "recompute"
    dmatrix, doffset = torch.empty_like(matrix), torch.empty_like(offset)
    dparameters: list[list[Tensor | None]] = [[] for _ in steps]
    starts = [0]
    for k in steps:
        starts.append(starts[-1] + nets.count(k))

    def through_network(k, state, hidden, h, g, v_is_input):
        rebuilt, dy, dh = table.couple_vjp(state, g, h, glogdet, scale, alpha, reverse, v_is_input)
        needed = need[starts[k] : starts[k + 1]]
        dparameters[k] = nets.vjp(k, _first_half(state), hidden, dh, needed, _first_half(dy))
        return rebuilt, dy

    def through_mix(k, state, g, given_input):
        into = dmatrix[k], doffset[k]
        rebuilt, g, *_ = table.mix_vjp(state, g, matrix[k], inverse[k], offset[k], reverse, given_input, into)
        return rebuilt, g

    for position, k in reversed(list(enumerate(reversed(steps) if reverse else steps))):
        if stored:
            state, *rest = kept[position] if position else [x, *kept[position]]
            y = state if reverse else table.channel_mix(state, matrix[k], offset[k], False)
            # The list that `trace` made is handed on as it is: a backend may write over what only this list holds.
            h, hidden = (rest[0], rest[1:]) if rest else nets.trace(k, _first_half(y))
            if reverse:
                uncoupled, _ = table.couple(y, h, scale, alpha, True)
                _, g = through_mix(k, uncoupled, g, True)
                _, g = through_network(k, y, hidden, h, g, True)
            else:
                _, g = through_network(k, y, hidden, h, g, True)
                _, g = through_mix(k, state, g, True)
        elif reverse:
            anchor = kept[position][0] if kept[position] else None
            v, g = through_mix(k, v, g, False) if anchor is None else (anchor, through_mix(k, anchor, g, True)[1])
            h, hidden = nets.trace(k, _first_half(v))
            v, g = through_network(k, v, hidden, h, g, False)
        else:
            h, hidden = nets.trace(k, _first_half(v))
            v, g = through_network(k, v, hidden, h, g, False)
            anchor = kept[position][0] if kept[position] else None
            v, g = through_mix(k, v, g, False) if anchor is None else (anchor, through_mix(k, anchor, g, True)[1])
        del h, hidden
    return g, dmatrix, doffset, [d for step in dparameters for d in step], v


def _sizes(count: int, memory: str, anchor_every: int) -> list[int]:
    """How many tensors each position keeps, for the standard network."""
    if memory == "store":
        return [3 + (position > 0) for position in range(count)]
    if memory == "checkpoint":
        return [int(position > 0) for position in range(count)]
    return [int(_is_anchor(position, anchor_every)) for position in range(count)]


def _unflatten(kept: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    tensors = iter(kept)
    return [[next(tensors) for _ in range(size)] for size in sizes]


def _standard_run(x, *mixes, parameters, reverse, scale, alpha, dtype, memory, anchor_every, table):
    """`_run` with Glow's own networks."""
    nets = network.StandardNets(parameters, dtype, table)
    return _run(x, *mixes, nets, reverse, scale, alpha, table, memory, anchor_every)


def _standard_vjp(boundary, g, glogdet, kept, *mixes, parameters, need, reverse, scale, alpha, dtype, memory, table):
    """`_vjp` with Glow's own networks. boundary: the input, or in "recompute" the output."""
    nets = network.StandardNets(parameters, dtype, table)
    return _vjp(boundary, boundary, g, glogdet, kept, *mixes, nets, need, reverse, scale, alpha, table, memory)


backends.register_defaults(chain=_standard_run, chain_vjp=_standard_vjp)


def _check(channels: int, matrix: Tensor, offset: Tensor, inverse: Tensor, parameters: Sequence[Tensor], scale: str):
    """Raises ValueError for what doesn't fit a state of so many channels."""
    count = len(matrix)
    wanted = (count, channels, channels)
    if matrix.shape != wanted or inverse.shape != wanted or offset.shape != (count, channels):
        given = ", ".join(str(tuple(t.shape)) for t in (matrix, offset, inverse))
        raise ValueError(f"mixes of {count} steps of {channels} channels want M {wanted}, m and M^-1, got {given}")
    if len(parameters) != count * network.PARAMETERS:
        raise ValueError(f"{count} steps have {count * network.PARAMETERS} parameters, got {len(parameters)}")
    network.check_shapes(parameters, channels // 2, channels // 2 if scale == "additive" else channels)


def _chain_op(x, matrix, offset, inverse, parameters, reverse, scale, alpha, backend, dtype, memory, anchor_every):
    _check(x.shape[1] if x.dim() == 4 else math.prod(x.shape[1:4]), matrix, offset, inverse, parameters, scale)
    table = backends.table(x.device, backend, x.dtype)
    x, logdet, kept = table.chain(
        x, matrix, offset, inverse, parameters=parameters, reverse=reverse, scale=scale, alpha=alpha, dtype=dtype,
        memory=memory, anchor_every=anchor_every, table=table)
    return x, logdet, [t for position in kept for t in position]


def _chain_fake(x, matrix, offset, inverse, parameters, reverse, scale, alpha, backend, dtype, memory, anchor_every):
    def like(channels, dtype=x.dtype):
        return x.new_empty((x.shape[0], channels, *x.shape[-2:]), dtype=dtype).to(memory_format=torch.channels_last)

    channels = matrix.shape[-1]
    kept = []
    for position, size in enumerate(_sizes(len(matrix), memory, anchor_every)):
        k = len(matrix) - 1 - position if reverse else position
        w1, *_, w3, _, _ = parameters[k * network.PARAMETERS : (k + 1) * network.PARAMETERS]
        if memory == "store":
            size -= 3
        kept += [like(channels)] * size
        if memory == "store":
            kept += [like(w3.shape[0], dtype), like(w1.shape[0], dtype), like(w1.shape[0], dtype)]
    return like(channels), x.new_empty(x.shape[0]), kept


def _chain_vjp_op(x, v, g, glogdet, kept, matrix, offset, inverse, parameters, need, reverse, scale, alpha, backend,
                  dtype, memory, anchor_every):
    _check(g.shape[1], matrix, offset, inverse, parameters, scale)
    kept = _unflatten(kept, _sizes(len(matrix), memory, anchor_every))
    table = backends.table(g.device, backend, g.dtype)
    dx, dmatrix, doffset, dparameters, rebuilt = table.chain_vjp(
        v if memory == "recompute" else x, g, glogdet, kept, matrix, offset, inverse, parameters=parameters, need=need,
        reverse=reverse, scale=scale, alpha=alpha, dtype=dtype, memory=memory, table=table)
    rebuilt = rebuilt if memory == "recompute" else g.new_empty(0)
    return dx, dmatrix, doffset, [d for d in dparameters if d is not None], rebuilt


def _chain_vjp_fake(x, v, g, glogdet, kept, matrix, offset, inverse, parameters, need, *settings):
    wanted = [torch.empty_like(p) for p, needed in zip(parameters, need, strict=True) if needed]
    *_, memory, _ = settings
    rebuilt = empty_channels_last(g) if memory == "recompute" else g.new_empty(0)
    return empty_channels_last(g), torch.empty_like(matrix), torch.empty_like(offset), wanted, rebuilt


_SETTINGS = "bool reverse, str scale, float alpha, str backend, ScalarType dtype, str memory, int anchor_every"
ops.define(
    f"chain(Tensor x, Tensor matrix, Tensor offset, Tensor inverse, Tensor[] parameters, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor[])",
    _chain_op,
    _chain_fake,
)
ops.define(
    "chain_vjp(Tensor? x, Tensor? v, Tensor g, Tensor glogdet, Tensor[] kept, Tensor matrix, Tensor offset, "
    f"Tensor inverse, Tensor[] parameters, bool[] need, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
    _chain_vjp_op,
    _chain_vjp_fake,
)


class _StandardChain(Function):
    """The chain with Glow's own coupling network; its two halves are opaque operators, whole to torch.compile."""

    @staticmethod
    def forward(x, matrix, offset, inverse, settings, *parameters):
        out, logdet, kept = ops.raw.chain(x, matrix, offset, inverse, parameters, *settings)
        return out, logdet, *kept

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, matrix, offset, inverse, ctx.settings, *parameters = inputs
        out, _, *kept = outputs
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.kept = len(kept)
        *_, memory, _ = ctx.settings
        boundary = out if memory == "recompute" else x
        ctx.shape = x.shape
        ctx.save_for_backward(boundary, matrix, offset, inverse, *kept, *parameters)

    @staticmethod
    @ops.without_autocast
    def backward(ctx, g, glogdet, *_):
        boundary, matrix, offset, inverse, *rest = ctx.saved_tensors
        kept, parameters = rest[: ctx.kept], rest[ctx.kept :]
        g, glogdet = _materialize(g, glogdet, boundary)
        reverse, scale, alpha, _, _, memory, _ = ctx.settings
        if ops.wants_formulas():
            inputs = boundary, matrix, offset, *parameters
            return _by_formulas(memory, inputs, _differentiable_nets, g, glogdet, reverse, scale, alpha)
        stored = memory != "recompute"
        need = list(ctx.needs_input_grad[5:])
        dx, dmatrix, doffset, found, _ = ops.raw.chain_vjp(
            boundary if stored else None,
            None if stored else boundary,
            ops.channels_last(g),
            glogdet.contiguous(),
            kept,
            matrix,
            offset,
            inverse,
            parameters,
            need,
            *ctx.settings,
        )
        found = iter(found)
        dx = dx.unflatten(1, ctx.shape[1:4]) if len(ctx.shape) == 6 else dx
        return dx, dmatrix, doffset, None, None, *(next(found) if needed else None for needed in need)


class _LocalChain(Function):
    """The chain with a user's own coupling networks, in Python: local autograd can't live inside an opaque operator."""

    @staticmethod
    def forward(ctx, x, matrix, offset, inverse, context, nets, settings, *parameters):
        reverse, scale, alpha, backend, memory, anchor_every = settings
        out, logdet, kept = _run(
            x,
            matrix,
            offset,
            inverse,
            nets,
            reverse,
            scale,
            alpha,
            backends.table(x.device, backend, x.dtype),
            memory,
            anchor_every,
        )
        ctx.set_materialize_grads(False)
        ctx.nets, ctx.settings = nets, settings
        # As saved tensors, what is kept is let go of by backward; networks' graphs hang on it.
        ctx.parameters, ctx.sizes = len(parameters), [len(tensors) for tensors in kept]
        boundary, kept = out if memory == "recompute" else x, [t for tensors in kept for t in tensors]
        ctx.save_for_backward(boundary, matrix, offset, inverse, context, *parameters, *kept)
        return out, logdet

    @staticmethod
    @ops.without_autocast
    def backward(ctx, g, glogdet):
        boundary, matrix, offset, inverse, context, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.parameters], _unflatten(rest[ctx.parameters :], ctx.sizes)
        g, glogdet = _materialize(g, glogdet, boundary)
        reverse, scale, alpha, backend, memory, _ = ctx.settings
        nets = ctx.nets
        if ops.wants_formulas():
            nets.check_parameters()
            inputs = boundary, matrix, offset, *([] if context is None else [context]), *parameters
            dx, dmatrix, doffset, _, _, *found = _by_formulas(
                memory, inputs, nets.functions, g, glogdet, reverse, scale, alpha
            )
            dcontext = None if context is None else found.pop(0)
            return dx, dmatrix, doffset, None, dcontext, None, None, *found
        stored = memory != "recompute"
        nets.dcontext = None
        dx, dmatrix, doffset, dparameters, _ = _vjp(
            boundary if stored else None,
            None if stored else boundary,
            ops.channels_last(g),
            glogdet.contiguous(),
            kept,
            matrix,
            offset,
            inverse,
            nets,
            ctx.needs_input_grad[7:],
            reverse,
            scale,
            alpha,
            backends.table(g.device, backend, g.dtype),
            memory,
        )
        return dx, dmatrix, doffset, None, nets.dcontext, None, None, *dparameters


def _materialize(g, glogdet, like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like) if g is None else g, like.new_zeros(like.shape[0]) if glogdet is None else glogdet


class _Differentiable:
    """The standard network's parameters under the names that the reference reads."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.weight1, s1, b1, self.weight2, s2, b2, self.weight3, self.bias3, self.logs = parameters
        self.norm1 = SimpleNamespace(log_scale=s1, bias=b1)
        self.norm2 = SimpleNamespace(log_scale=s2, bias=b2)

    def __call__(self, a: Tensor) -> Tensor:
        return reference.coupling_network(a, self)


def _differentiable_nets(parameters: Sequence[Tensor]) -> list[_Differentiable]:
    count = network.PARAMETERS
    return [_Differentiable(parameters[i : i + count]) for i in range(0, len(parameters), count)]


def _by_formulas(memory, inputs, networks, g, glogdet, reverse, scale, alpha):
    """The first derivative by the reference's formulas: a differentiable function of everything under
    create_graph=True, and one that takes a batch of gradients (vmap).

    inputs: x, matrix, offset and what `networks` makes the chain's networks of.
    """
    if memory != "store":
        raise ops.no_graph(f"in memory={memory!r}", "memory='store'")
    graph = ops.wants_graph()
    with torch.enable_grad():
        # By other names, as x may have come from the same parameters on a way that is not this chain's; the same for
        # the same: where steps share a parameter, the first of them gets the whole of its gradient.
        aliases = {id(t): t.view_as(t) for t in inputs}
        x, matrix, offset, *rest = (aliases[id(t)] for t in inputs)
        outputs = reference_chain(x, matrix, offset, networks(rest), reverse, scale, alpha)
        # What is made of constants has no graph.
        pairs = [(out, d) for out, d in zip(outputs, (g, glogdet), strict=True) if out.requires_grad]
        wanted, found = {i: alias for i, alias in aliases.items() if alias.requires_grad}, {}
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [*wanted.values()], gradients, create_graph=graph, allow_unused=True)
            found = dict(zip(wanted, found, strict=True))
    dx, dmatrix, doffset, *others = (found.pop(id(t), None) for t in inputs)
    return dx, dmatrix, doffset, None, None, *others


def reference_chain(
    x: Tensor, matrix: Tensor, offset: Tensor, nets: Sequence, reverse: bool, scale: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """The chain by the reference's formulas, for ordinary autograd. Same results as `chain`, every activation
    stored.
    """
    logdet = x.new_zeros(x.shape[0])
    inverse = torch.linalg.inv(matrix) if reverse else None
    for k in reversed(range(len(matrix))) if reverse else range(len(matrix)):
        y = x if reverse else reference.channel_mix(x, matrix[k], offset[k])
        h = nets[k](_first_half(y))
        if reverse:
            x, d = reference.mix_couple(y, h, inverse[k], offset[k], scale, alpha)
        else:
            x, d = reference.couple(y, h, scale, alpha)
        logdet = logdet + d
    return x, logdet


def reads_blocks(nets: Sequence[nn.Module], x: Tensor, backend: str) -> bool:
    """Whether `chain` takes an image's blocks instead of the squeezed image, and so saves a pass over it."""
    return is_standard(nets) and has_squeeze_mix(x.device, x.dtype, backend)


@torch.compiler.assume_constant_result
def has_squeeze_mix(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether the backend mixes blocks of an image as they lie."""
    return backends.table(device, backends.resolve(device, backend), dtype).squeeze_mix is not None


def is_standard(nets: Iterable[nn.Module]) -> bool:
    """Whether these are Glow's own networks, whose gradient is written out. What hooks into one wants it called."""
    return all(getattr(net, "written_out", False) and not hooked(net) for net in nets)


def network_dtype(state: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype | None:
    """The networks' precision: what was asked for, else autocast's, which leaves double precision alone as everywhere
    in PyTorch, else None, which is the state's.
    """
    device = state.device.type
    lowered = torch.is_autocast_enabled(device) and state.dtype != torch.float64
    return compute_dtype or (torch.get_autocast_dtype(device) if lowered else None)


def chain(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    inverse: Tensor,
    nets: Sequence[nn.Module],
    *,
    context: Tensor | None = None,
    reverse: bool = False,
    scale: str = "softclamp",
    alpha: float = 1.0,
    memory: str = "recompute",
    anchor_every: int | None = None,
    kept_steps: int = 0,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Run K steps of flow, differentiably, in memory that does not grow with K (see the module's text for `memory`).

    x (N, C, H, W), or forward also the blocks (N, C/4, 2, 2, H, W) of an image to squeeze, a view, where
    `reads_blocks`; matrix, inverse (K, C, C) and offset (K, C): the composed channel mixes, their inverses carrying no
    gradient of their own; nets: K coupling networks, of a state and, if given, a context (N, ...). Returns the
    state and the couplings' log-determinant (N,) in nats; the mixes' own log-determinants are constants of x that the
    caller adds. kept_steps: how many steps "recompute" stores, the last ones to run. compute_dtype is the networks'
    precision (default: autocast's, else the state's). Raises ValueError or TypeError for invalid options.
    """
    choice(memory, "memory", MEMORY_MODES)
    anchors = 0 if anchor_every is None else positive_int(anchor_every, "anchor_every")
    if not 0 <= kept_steps <= len(nets):
        raise ValueError(f"kept_steps wants an int from 0 to {len(nets)}, got {kept_steps!r}")
    name = backends.resolve(x.device, backend)
    x = x if x.dim() == 6 else ops.channels_last(x)
    dtype = network_dtype(x, compute_dtype)
    standard = is_standard(nets)
    parameters = [p for net in nets for p in (net.flat_parameters() if standard else net.parameters())]
    inputs = (x, matrix, offset, *parameters, *(() if context is None else (context,)))
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if not needed:
        memory, anchors = "recompute", 0
    elif memory != "recompute":
        x = as_state(x)  # which backward wants, too; kept as blocks, it would keep what a split emits from it alive
    elif kept_steps:
        at = kept_steps if reverse else len(nets) - kept_steps
        parts = [t.split([at, len(nets) - at]) for t in (matrix, offset, inverse)] + [(nets[:at], nets[at:])]
        first, last = zip(*(reversed(part) if reverse else part for part in parts), strict=True)
        options = {"context": context, "reverse": reverse, "scale": scale, "backend": backend}
        # float, because torch.compile with dynamic=True fails on a symbol that enters two chains.
        options |= {"alpha": float(alpha), "compute_dtype": compute_dtype}
        if not first[-1]:
            return chain(x, *last, memory="store", **options)
        x, logdet = chain(x, *first, anchor_every=anchor_every, **options)
        x, d = chain(x, *last, memory="store", **options)
        return x, logdet + d
    with torch.autocast(x.device.type, enabled=False):
        if standard:
            settings = (reverse, scale, alpha, name, dtype or x.dtype, memory, anchors)
            # Without gradients the Function is left out: torch.compile binds a variadic one's arguments wrongly there.
            out, logdet, *_ = (
                _StandardChain.apply(x, matrix, offset, inverse, settings, *parameters)
                if needed
                else ops.raw.chain(x, matrix, offset, inverse, parameters, *settings)
            )
        else:
            settings = (reverse, scale, alpha, name, memory, anchors)
            local = network.LocalNets(nets, dtype, x.device, context)
            out, logdet = _run_local(x, matrix, offset, inverse, context, local, settings, *parameters)
    return out, logdet


@torch.compiler.disable(reason="a chain with networks of one's own runs outside of the graph, in Python")
def _run_local(*arguments) -> tuple[Tensor, Tensor]:
    return _LocalChain.apply(*arguments)
