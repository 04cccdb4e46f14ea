"""The rows of the model benchmarks: the same model, with the same weights, in different hands."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import flowkern
from bench import rivals
from bench.workload import Setup

BF16 = torch.bfloat16
INSTALL = {"FrEIA": "pip install --no-deps FrEIA==0.2", "memcnn": "pip install --no-deps memcnn==1.5.2",
           "nflows": "pip install --no-deps nflows umnn", "normflows": "pip install --no-deps normflows"}


@dataclass(frozen=True)
class Contender:
    """How to make a model from a set-up.

    network: the precision of its coupling networks. rival: not ours. evaluations: how often a training step evaluates
    each network: once for the forward pass, twice for the gradients, and more where it recomputes; a function of the
    set-up where that depends on it. truth: the model
    whose results in double precision its own are compared with; a rival with parameters of its own is compared with
    itself, and its likelihood with the reference's. full: measured by `--full` alone. inference: False
    where it does without gradients what another row does. full_works: what it does under `--full` alone. compiled: by
    torch.compile, when it runs first. note: what is not the same.
    """

    make: Callable[[Setup], nn.Module]
    network: str = "fp32"
    rival: bool = True
    evaluations: int | Callable[[Setup], float] = 3
    truth: Callable[[Setup], nn.Module] = lambda setup: rivals.Reference(setup.glow())
    full: bool = False
    inference: bool = True
    full_works: tuple[str, ...] = ()
    compiled: bool = False
    note: str = ""

    def does(self, work: str, full: bool) -> bool:
        """Whether this row is in the group of a work."""
        idle = not self.inference and work in ("log_prob", "inverse", "sample")
        return not idle and (full or work not in self.full_works)

    def evaluations_in(self, setup: Setup) -> float:
        """How often a training step evaluates the networks of a set-up, on average over their work."""
        return self.evaluations(setup) if callable(self.evaluations) else self.evaluations


def _plain(kind: type = rivals.Reference, **options) -> Callable:
    return lambda setup: kind(setup.glow(), **options)


def _library(kind: type, note: str, evaluations: int = 3, own_truth: bool = True) -> dict[str, Contender]:
    """In both memory formats of PyTorch; the default one is quick enough to be measured always."""
    name = kind.__name__.lower() if kind is not rivals.FrEIA else "FrEIA"
    truth = {"truth": _plain(kind)} if own_truth else {}
    return {name + suffix: Contender(_plain(kind, channels_last=bool(suffix)), evaluations=evaluations,
                                     full=bool(suffix), inference=own_truth, note=note, **truth)
            for suffix in ("", ", channels-last")}


def _ours(memory: str, network: str = "fp32", backend: str = "auto", full: bool = False) -> Contender:
    dtype = BF16 if network == "bf16" else None
    return Contender(lambda setup: setup.glow(memory=memory, backend=backend, compute_dtype=dtype), network,
                     rival=False, evaluations=3 if memory == "store" else 4, full=full,
                     inference=memory == "recompute")


def _within(mib: int) -> Contender:
    """Recompute with a budget, in MiB."""

    def make(setup: Setup) -> flowkern.Glow:
        return setup.glow(memory_budget=mib << 20)

    def evaluations(setup: Setup) -> float:
        kept = make(setup).kept_steps(setup.batch)
        again = sum(setup.evaluation_flops(c, p) * (setup.depth - n)
                    for c, p, n in zip(setup.channels(), setup.pixels(), kept, strict=True))
        return 3 + again / setup.flops()

    return Contender(make, rival=False, evaluations=evaluations, inference=False)


CHECKPOINT = "PyTorch, checkpoint"
WHOLE = "PyTorch, torch.compile, whole"
RECOMPUTE = "flowkern recompute"
SAME_PRECISION = {"fp32": "PyTorch", "bf16": "PyTorch, bf16 network"}      # whose error bounds the others'
GLOWS = {
    "PyTorch": Contender(_plain()),
    "PyTorch, contiguous": Contender(_plain(rivals.Contiguous)),
    "PyTorch, channels-last weights": Contender(_plain(channels_last=True), full=True),
    "PyTorch, torch.compile": Contender(_plain(rivals.Compiled), full_works=("sample",), compiled=True),
    # As one program, not a step at a time: takes a quarter of a minute to compile where there are two steps.
    WHOLE: Contender(_plain(rivals.CompiledWhole), full=True, compiled=True),
    "PyTorch, torch.compile, channels-last weights": Contender(_plain(rivals.Compiled, channels_last=True), full=True,
                                                               compiled=True),
    CHECKPOINT: Contender(_plain(checkpointed=True), evaluations=4, inference=False),
    "PyTorch, bf16 network": Contender(_plain(network_dtype=BF16), "bf16"),
    "PyTorch, torch.compile, bf16 network": Contender(_plain(rivals.Compiled, network_dtype=BF16), "bf16",
                                                      full_works=("inverse", "sample"), compiled=True),
    **_library(rivals.NormFlows, "the last layer's exp(3 logs) is part of its weights"),
    **_library(rivals.FrEIA, "its own 1x1 convolutions don't learn: Glow's as an InvertibleModule"),
    **_library(rivals.NFlows, "a bias in the 1x1 convolution; its scale without the added 0.001"),
    **_library(rivals.MemCNN, "InvertibleModuleWrapper around the reference's step", evaluations=5, own_truth=False),
    "flowkern store": _ours("store"),
    RECOMPUTE: _ours("recompute"),
    **{f"flowkern recompute, budget {mib} MiB": _within(mib) for mib in (24, 48)},
    "flowkern checkpoint": _ours("checkpoint"),
    "flowkern store, bf16 network": _ours("store", "bf16"),
    "flowkern recompute, bf16 network": _ours("recompute", "bf16"),
    "flowkern store, reference backend": _ours("store", backend="reference", full=True),
    "flowkern recompute, reference backend": _ours("recompute", backend="reference", full=True),
}


class OneStep(nn.Module):
    """A `flowkern.layers.StepOfFlow` run in one way."""

    def __init__(self, step: nn.Module, run: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self.step, self._run = step, run

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self.step, x)


def _step(run: Callable, of: Callable = lambda step: step, **options) -> Contender:
    return Contender(lambda setup: OneStep(of(setup.glow().levels[-1].steps[0]), run), truth=_plain_step, **options)


def _plain_step(setup: Setup) -> nn.Module:
    return OneStep(setup.glow().levels[-1].steps[0], lambda step, x: flowkern.reference.step_of_flow(x, step))


def _checkpointed(step: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.utils.checkpoint.checkpoint(flowkern.reference.step_of_flow, x, step, use_reentrant=False)


def _our_step(memory: str, network: str = "fp32") -> Contender:
    options = {"memory": memory, "compute_dtype": BF16 if network == "bf16" else None}
    return _step(lambda step, x: step(x, **options), network=network, rival=False,
                 evaluations=3 if memory == "store" else 4)


STEPS = {
    "PyTorch": Contender(_plain_step, truth=_plain_step),
    "PyTorch, contiguous": _step(lambda step, x: rivals.plain.contiguous_step(x, step)),
    "PyTorch, torch.compile": _step(lambda step, x: step(x), rivals.plain.CompiledStep, compiled=True),
    CHECKPOINT: _step(_checkpointed, evaluations=4),
    "flowkern store": _our_step("store"),
    RECOMPUTE: _our_step("recompute"),
    "flowkern store, bf16 network": _our_step("store", "bf16"),
    "flowkern recompute, bf16 network": _our_step("recompute", "bf16"),
}


def _denoiser(setup: Setup, **options) -> flowkern.Unfolded:
    # A flow normalised to noisy images, as pre-training makes it: one that has seen smooth ones alone amplifies noise
    # so much that a gradient in bf16 would be wrong in every digit, whoever computes it.
    glow = setup.glow(**options)
    glow.initialize(setup.noisy_images())
    return flowkern.Unfolded(flowkern.GlowProx(glow), folds=setup.folds)


def _plain_denoiser(**options) -> Callable:
    return lambda setup: rivals.Unfolded(_denoiser(setup), **options)


PLAIN_DENOISER = _plain_denoiser()


def _our_denoiser(memory: str, network: str = "fp32") -> Contender:
    dtype = BF16 if network == "bf16" else None
    return Contender(lambda setup: _denoiser(setup, memory=memory, compute_dtype=dtype), network, rival=False,
                     evaluations=3 if memory == "store" else 4, truth=PLAIN_DENOISER)


UNFOLDED = {
    "PyTorch": Contender(PLAIN_DENOISER, truth=PLAIN_DENOISER),
    "PyTorch, contiguous": Contender(_plain_denoiser(kind=rivals.Contiguous), truth=PLAIN_DENOISER),
    "PyTorch, torch.compile": Contender(_plain_denoiser(kind=rivals.Compiled), truth=PLAIN_DENOISER, full=True,
                                        compiled=True),
    CHECKPOINT: Contender(_plain_denoiser(checkpointed=True), evaluations=4, truth=PLAIN_DENOISER),
    "PyTorch, bf16 network": Contender(_plain_denoiser(network_dtype=BF16), "bf16", truth=PLAIN_DENOISER),
    "flowkern store": _our_denoiser("store"),
    RECOMPUTE: _our_denoiser("recompute"),
    "flowkern checkpoint": _our_denoiser("checkpoint"),
    "flowkern store, bf16 network": _our_denoiser("store", "bf16"),
    "flowkern recompute, bf16 network": _our_denoiser("recompute", "bf16"),
}
SMALL = {name: replace(GLOWS[name], full=False)
         for name in ("PyTorch", "PyTorch, contiguous", "PyTorch, torch.compile", WHOLE, "normflows", "FrEIA", "nflows",
                      "flowkern store", RECOMPUTE)}
FAMILIES = {"glow": GLOWS, "step": STEPS, "unfolded": UNFOLDED, "small": SMALL}


def chosen(family: str, full: bool) -> dict[str, Contender]:
    """The rows of a family that are to be measured."""
    return {name: contender for name, contender in FAMILIES[family].items() if full or not contender.full}
