"""Glow in constant memory by memcnn (van de Leemput et al. 2019, github.com/silvandeleemput/memcnn)."""

import torch
from torch import Tensor, nn

import flowkern
from bench.rivals.plain import Reference
from flowkern import reference


class MemCNN(Reference):
    """Every step of flow inside an InvertibleModuleWrapper that frees its input and rebuilds it in backward.

    memcnn's own AffineCoupling has two networks and no log-determinant; its wrapper takes any invertible module, here
    the reference's step. Raises ImportError when memcnn is not installed.
    """

    def __init__(self, glow: flowkern.Glow, channels_last: bool = False):
        from memcnn import InvertibleModuleWrapper

        super().__init__(glow, channels_last=channels_last)
        for level in self.glow.levels:
            for i, step in enumerate(level.steps):
                level.steps[i] = InvertibleModuleWrapper(_Step(step), keep_input=False)

    def step(self, x, step, logdet):
        # Without gradients the wrapper would free its input all the same, and a caller's image with it.
        return step(x, logdet) if torch.is_grad_enabled() else step._fn(x, logdet)

    def unstep(self, y, step):
        return step._fn.inverse(y, y.new_zeros(y.shape[0]))[0]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The next step's wrapper empties the storage of what it is given, which must not be the emitted half's.
        kept, part = x.chunk(2, dim=1)
        return kept.clone(), part


class _Step(nn.Module):
    """(x, sum of log-determinants) -> (y, sum with this step's), and back."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        y, d = reference.step_of_flow(x, self.step)
        return y, logdet + d

    def inverse(self, y: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        x, d = reference.step_of_flow(y, self.step, inverse=True)
        return x, logdet + d
