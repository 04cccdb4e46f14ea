"""A Glow as fixed modules of plain PyTorch operations, for torch.export and ONNX.

The channel mixes and their inverses are composed once and baked in as constants; nothing of flowkern's own operators is
left. Weights are copied: later training does not reach them. For inference: no memory modes, no gradients.
"""

import copy

from torch import Tensor, nn

from flowkern.glow import Glow
from flowkern.layers import plain_chain
from flowkern.mix import compose


class _Baked(nn.Module):
    def __init__(self, glow: Glow):
        super().__init__()
        if not glow.is_initialized:
            raise ValueError("this Glow is not initialised; call glow.initialize(x) before exporting it")
        self.glow = copy.deepcopy(glow).requires_grad_(False)
        self.eval()
        self.glow._steps = self._steps
        for i, level in enumerate(self.glow.levels):
            matrix, offset, inverse, logdet = compose(level.steps)
            for name, value in (("matrix", matrix), ("offset", offset), ("inverse", inverse), ("logdet", logdet)):
                self.register_buffer(f"{name}{i}", value)

    def _steps(self, level: int, x: Tensor, context: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        names = ("matrix", "offset", "inverse", "logdet")
        matrix, offset, inverse, logdet = (getattr(self, f"{name}{level}") for name in names)
        steps = self.glow.levels[level].steps
        x, d = plain_chain(steps, x, matrix, offset, inverse, context, reverse)
        constant = logdet * (x.shape[2] * x.shape[3])
        return x, d - constant if reverse else d + constant


class LogProb(_Baked):
    """log p(x) (N,) in nats of images x (N, C, H, W), with a context if the Glow is conditioned.

    >>> import torch
    >>> glow = Glow((1, 4, 4), levels=1, depth=2, hidden=4)
    >>> glow.initialize(torch.rand(8, 1, 4, 4))
    >>> x = torch.rand(2, 1, 4, 4)
    >>> program = torch.export.export(LogProb(glow), (x,))
    >>> torch.allclose(program.module()(x), glow.log_prob(x))
    True
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.glow.log_prob(x, context)


class Inverse(_Baked):
    """Images (N, C, H, W) of latents z (N, C*H*W), with a context if the Glow is conditioned."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.glow.inverse(z, context=context)
