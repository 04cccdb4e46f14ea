"""The rows of the training-step benchmark: the same Glow, with the same weights, trained in different ways."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.memory import record
from bench.rivals import NormFlows, Reference
from bench.workload import Setup

SETUP = Setup(scale="sigmoid")      # the scale that the rivals have
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """How to make a model with `log_prob` from the set-up's Glow, and the precision its coupling networks run in."""

    make: Callable[[Setup], nn.Module]
    network: str = "fp32"


def _ours(memory: str, network: str = "fp32", backend: str = "auto") -> Contender:
    dtype = BF16 if network == "bf16" else None
    return Contender(lambda setup: setup.glow(memory=memory, backend=backend, compute_dtype=dtype), network)


NORMFLOWS = "normflows"
SAME_PRECISION = {"fp32": "PyTorch", "bf16": "PyTorch, bf16 network"}      # whose error bounds the others'
CONTENDERS = {
    NORMFLOWS: Contender(lambda setup: NormFlows(setup.glow())),
    "PyTorch": Contender(lambda setup: Reference(setup.glow())),
    "PyTorch, checkpoint": Contender(lambda setup: Reference(setup.glow(), checkpointed=True)),
    "PyTorch, bf16 network": Contender(lambda setup: Reference(setup.glow(), BF16), "bf16"),
    "flowkern store": _ours("store"),
    "flowkern recompute": _ours("recompute"),
    "flowkern checkpoint": _ours("checkpoint"),
    "flowkern store, bf16 network": _ours("store", "bf16"),
    "flowkern recompute, bf16 network": _ours("recompute", "bf16"),
    "flowkern store, reference backend": _ours("store", backend="reference"),
    "flowkern recompute, reference backend": _ours("recompute", backend="reference"),
}


def step(model: nn.Module, x: Tensor) -> None:
    """One training step without the optimizer: forward, mean negative log-likelihood, backward."""
    model.zero_grad(set_to_none=True)
    (-model.log_prob(x).mean()).backward()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The step's gradient as one vector in double precision, in the order of the model's parameters."""
    step(model, x)
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def gradient_error(name: str) -> float:
    """|g - g64| / |g64|, g64 by plain autograd in double precision; for normflows by its own double copy."""
    model, x = CONTENDERS[name].make(SETUP), SETUP.images()
    exact = NormFlows(SETUP.glow()) if name == NORMFLOWS else Reference(SETUP.glow())
    g, exact = gradient(model, x), gradient(exact.double(), x.double())
    return ((g - exact).norm() / exact.norm()).item()


def memory(name: str, depth: int = SETUP.depth) -> dict:
    """Allocated bytes held between forward and backward and at the step's peak, the parameters' gradients left out.

    Runs in a process started by `bench.memory.measure`.
    """
    torch.set_num_threads(2)
    model, x = CONTENDERS[name].make(replace(SETUP, depth=depth)), SETUP.images()
    for _ in range(2):
        step(model, x)
    model.zero_grad(set_to_none=True)
    with record() as events:
        value = -model.log_prob(x).mean()
        events.mark("forward")
        value.backward()
        del value
    return {"held": events.held("forward"), "peak": events.peak(without=events.alive())}
