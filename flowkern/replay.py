"""Evaluating a module again exactly as it ran before: same random numbers, same buffers, and no second update of them.

Backward passes that recompute need that of dropout (the mask must be the one that was used) and of batch norm (the
running statistics must be updated once). What measures a model or searches through it wants a fixed function instead.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flowkern.layout import in_order_of


class Replay:
    """What one evaluation of a module started from, as far as it matters.

        replay = Replay(module, device)
        with replay.recorded():
            y = module(x)
        with replay.restored():
            y_again = module(x)

    A state of the random number generator is kept only if the evaluation drew from it, buffers only if it changed them.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._module, self._device = module, device
        self.parameters = list(module.parameters())
        self._ran = False
        self._states: list[Tensor] | None = None
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []

    def has_its_parameters(self) -> bool:
        """Whether the module's parameters are still those that it had when this was made."""
        return all(p is q for p, q in zip(self._module.parameters(), self.parameters, strict=True))

    @contextlib.contextmanager
    def recorded(self):
        """Around the first evaluation."""
        states = self._generators()
        before = [(m, name, b, b._version, b.clone()) for m, name, b in self._registered()] if self._changes() else []
        yield
        self._ran = True
        if any(not torch.equal(a, b) for a, b in zip(states, self._generators(), strict=True)):
            self._states = states
        # Batch norm's kernel does not count its writes to the running statistics, but its counter's increments are.
        changed = {m for m, name, b, version, _ in before if m._buffers[name] is not b or b._version != version}
        self._buffers = [(m, name, copy) for m, name, _, _, copy in before if m in changed]

    def again_or_first(self):
        """`recorded()` the first time, `restored()` afterwards."""
        return self.restored() if self._ran else self.recorded()

    @contextlib.contextmanager
    def restored(self):
        """Around any further one, which leaves generators and buffers as they were before it."""
        own = [(m, name, m._buffers[name]) for m, name, _ in self._buffers]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self._states is not None):
            if self._states is not None:
                torch.set_rng_state(self._states[0])
                if devices:
                    torch.cuda.set_rng_state(self._states[1], self._device)
            try:
                for m, name, copy in self._buffers:
                    m._buffers[name] = copy.clone()
                yield
            finally:
                for m, name, buffer in own:
                    m._buffers[name] = buffer

    def _generators(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _registered(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [(m, n, b) for m in self._module.modules() for n, b in m._buffers.items() if b is not None]

    def _changes(self) -> bool:
        """Modules in evaluation mode leave their buffers alone."""
        return any(m.training for m in self._module.modules())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode: no dropout, no running statistics."""
    training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def fixed(module: nn.Module) -> Iterator[None]:
    """The same, with no gradients for its parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    with evaluating(module):
        try:
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)


class Applied(nn.Module):
    """A function as a module with the modules that it uses, whose parameters and buffers may then be given."""

    def __init__(self, function: Callable, modules: Sequence[nn.Module]):
        super().__init__()
        self.function, self.used = function, nn.ModuleList(modules)
        # Whether buffers may change is asked of every module, and these two have no say.
        self.training = self.used.training = False

    def forward(self, *arguments):
        return self.function(*arguments)


class Autocast:
    """Autocast as it is where this is made, but without its cache: what that keeps of a weight that was cast without a
    graph would have none in backward.
    """

    def __init__(self, device: torch.device):
        self._kind = device.type
        self._enabled, self._dtype = torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind)

    def __call__(self) -> torch.autocast:
        """A context in which it is so again."""
        return torch.autocast(self._kind, self._dtype, self._enabled, cache_enabled=False)


def refuse_replica(module: nn.Module) -> None:
    """Raise RuntimeError for a replica that nn.DataParallel made: its parameters can't be listed, and what asks for
    them would go without gradients.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"{type(module).__name__} does not run under nn.DataParallel, whose replicas have no parameters of their "
            "own; wrap it in torch.nn.parallel.DistributedDataParallel"
        )


def refuse_shards(module: nn.Module) -> None:
    """Raise RuntimeError for parameters that fully_shard has cut: a call uses what they are put together to, and they
    would go without gradients.
    """
    tensor = sys.modules.get("torch.distributed.tensor")  # which takes long to import; without it there are no shards
    if tensor is not None and any(isinstance(p, tensor.DTensor) for p in module.parameters()):
        raise RuntimeError(
            f"a {type(module).__name__} that is sharded by itself would lose its gradients here: call fully_shard for "
            "the whole model alone"
        )


def check_parameters(replays: Iterable[Replay], whose: str, instead: str) -> None:
    """Raise RuntimeError if the modules' parameters are not those that they had in forward."""
    if not all(replay.has_its_parameters() for replay in replays):
        raise RuntimeError(
            f"the {whose} parameters are not those of forward, as after torch.func.functional_call; {instead}"
        )


def add_gradient(gradients: list[Tensor | None], i: int, found: Tensor | None, like: Tensor) -> None:
    """Add what was found to the i-th gradient, in its parameter's own layout: accumulation would copy others, at once
    for all. Not in place, because one tensor may be the gradient of two parameters.
    """
    if found is not None:
        found = in_order_of(found, like)
        gradients[i] = found if gradients[i] is None else gradients[i] + found
