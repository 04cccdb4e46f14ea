"""On a GPU: forward and backward of a training step captured once as CUDA graphs, and replayed from then on.

A step of flow is a few kernels of microseconds each. Launching them one by one from Python takes several times as long
as they run (docs/gpu.md); a graph launches them all at once.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train import ranks
from train.config import Config


@dataclass
class Replayed:
    """A captured `run`, for tensors of the shapes that it was captured with."""

    run: Callable[..., Tensor]
    shapes: list[torch.Size]

    def suits(self, *inputs: Tensor) -> bool:
        """Whether it can stand in for the model on these inputs."""
        return [t.shape for t in inputs] == self.shapes


class _Step(nn.Module):
    """`run` as a module with the model's parameters: capturing replaces its forward and leaves the model's alone."""

    def __init__(self, model: nn.Module, run: Callable[..., Tensor]):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)


def wanted(config: Config, device: torch.device) -> bool:
    """Whether steps of these settings can be replayed: a Glow's on one GPU, whole batches at a time.

    Gradients that a graph leaves are the same tensors every time, so that they can't be added up; DDP's hooks would not
    run; batch norm has not been tried.
    """
    plain = not config.compile and config.accumulate == 1 and ranks.count() == 1
    return config.cuda_graphs and device.type == "cuda" and config.prox == "glow" and plain


def capture(model: nn.Module, run: Callable[..., Tensor], examples: tuple[Tensor, ...], config: Config) -> Replayed:
    """`run` of a model in training, for tensors like `examples`, which need no gradient."""
    low = config.precision == "bf16-mixed"
    # Casts of an outer autocast are kept for its whole block; a graph may not depend on what lies outside of it.
    casting = torch.autocast(examples[0].device.type, torch.bfloat16, cache_enabled=False) if low else nullcontext()
    with casting:
        made = torch.cuda.make_graphed_callables(_Step(model, run).train(), examples, allow_unused_input=True)
    return Replayed(made, [t.shape for t in examples])
