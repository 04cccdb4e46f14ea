"""One training step on one model: the set-up that speed, memory and error are all measured on.

The model is a Glow whose weights were moved away from their initialisation, at which couplings are the identity and
nothing could go wrong; the images are smooth random fields in [0, 1]. Everything follows from the seed.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import flowkern
from bench.memory import record
from flowkern import cpp
from flowkern.audit import smooth_fields
from flowkern.glow import OPTIONS


@dataclass(frozen=True)
class Setup:
    """A Glow and its batch; the default is the configuration of the project's first speed and memory figures."""

    levels: int = 3
    depth: int = 8
    hidden: int = 128
    size: int = 64
    batch: int = 8
    scale: str = "softclamp"
    seed: int = 0
    folds: int = 4      # of the unfolded denoiser

    def images(self) -> Tensor:
        """(batch, 3, size, size) in [0, 1]."""
        return smooth_fields(self.batch, (3, self.size, self.size), self.seed)

    def noisy_images(self, sigma: float = 0.2) -> Tensor:
        """The same with Gaussian noise."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.images() + sigma * torch.randn(self.batch, 3, self.size, self.size, generator=generator)

    def glow(self, device: str = "cpu", **options) -> flowkern.Glow:
        """An initialised Glow with couplings that do something. options: those of `flowkern.Glow`."""
        glow = self._new_glow(**options)
        if set(options) <= set(OPTIONS):
            glow.to(device).load_state_dict(_weights(self, device))
        else:
            self._move_and_initialize(glow, device)
        return glow

    def _new_glow(self, **options) -> flowkern.Glow:
        torch.manual_seed(self.seed)
        return flowkern.Glow((3, self.size, self.size), levels=self.levels, depth=self.depth, hidden=self.hidden,
                             scale=self.scale, shift=0.5, **options)

    @torch.no_grad()
    def _move_and_initialize(self, glow: flowkern.Glow, device: str) -> None:
        for name, p in glow.named_parameters():
            if name.endswith("weight3"):
                p.normal_(std=0.1 / (9 * self.hidden) ** 0.5)
            elif name.endswith(("bias3", "logs", "lower", "upper")):
                p.add_(torch.randn_like(p), alpha=0.02)
        for level in glow.levels:
            for step in level.steps:
                _without_signs(step.conv)
        # After that, so that the states stay of the order of 1, as training keeps them.
        glow.to(device).initialize(self.images().to(device))

    def channels(self) -> list[int]:
        """Channels of the state at each level."""
        return [12 * 2 ** i for i in range(self.levels)]

    def pixels(self) -> list[int]:
        """Pixels of a batch at each level."""
        return [self.batch * (self.size >> i + 1) ** 2 for i in range(self.levels)]

    def evaluation_flops(self, channels: int, pixels: int) -> int:
        """Floating-point operations of the three convolutions of one coupling network."""
        return 2 * pixels * (9 * channels // 2 * self.hidden + self.hidden**2 + 9 * self.hidden * channels)

    def flops(self) -> int:
        """Of all coupling networks, evaluated once on a batch: all but a few percent of the work.

        A stored training step does three times as much, one that recomputes four times.
        """
        return self.depth * sum(map(self.evaluation_flops, self.channels(), self.pixels()))

    def stored_bytes(self, itemsize: int = 4) -> int:
        """What `memory="store"` has to keep: per step x, (raw_s, t) and two hidden activations."""
        return sum(self.depth * p * (2 * c + 2 * self.hidden) * itemsize
                   for p, c in zip(self.pixels(), self.channels(), strict=True))


@functools.lru_cache(maxsize=2)  # the one that is measured, and a shallow one
def _weights(setup: Setup, device: str) -> dict[str, Tensor]:
    """Of all Glows of a set-up that differ only in how they run; they take a second to make. Kept on the CPU: the peaks
    of other devices are absolute.
    """
    glow = setup._new_glow()
    setup._move_and_initialize(glow, device)
    return glow.cpu().state_dict()


def _without_signs(conv: nn.Module) -> None:
    """Flip rows of W = P L U, a rotation still, so that U's diagonal is positive: not every library has its signs."""
    conv.lower.mul_(conv.sign[:, None] * conv.sign)
    conv.upper.mul_(conv.sign[:, None])
    conv.sign.fill_(1)


def loss(glow: flowkern.Glow, x: Tensor, reverse: bool = False) -> Tensor:
    """The training loss: mean negative log-likelihood in nats; in reverse a squared error plus the log-determinant."""
    if not reverse:
        return -glow.log_prob(x).mean()
    image, logdet = glow.inverse(x.flatten(1), size=x.shape[2:], return_logdet=True)
    return image.square().sum(dim=(1, 2, 3)).mul(0.5).sub(logdet).mean()


def own_network(in_channels: int, out_channels: int) -> nn.Module:
    """A coupling network that is not flowkern's."""
    return nn.Sequential(nn.Conv2d(in_channels, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, out_channels, 3, padding=1))


def footprint(depth: int = 8, reverse: bool = False, own: bool = False, compute_dtype: str | None = None,
              **options) -> dict:
    """Allocated bytes of one training step above what exists before it (images, parameters, buffers).

    "held": between forward and backward; "peak": over the step, with the scratch memory that threads keep. Both
    without the parameters' gradients (their data and their tensor objects) and the composed channel mixes (M and its
    inverse), which stand beside them.
    Runs in a process started by `bench.memory.measure`.
    own: with a user's own coupling network. options: those of `flowkern.Glow`.
    """
    cpp.kept_scratch(afresh=True)
    setup = Setup(depth=depth)
    if own:
        options["network"] = own_network
    options["compute_dtype"] = getattr(torch, compute_dtype) if compute_dtype else None
    x = setup.images()
    # oneDNN creates and keeps its primitives on first use (their shapes do not depend on the depth), autograd a node
    # and Python an object per parameter; a small image is enough for those.
    loss(Setup(depth=2).glow(**options), x, reverse).backward()
    glow = setup.glow(**options)
    loss(glow, x[:1, :, :16, :16], reverse).backward()
    glow.zero_grad(set_to_none=True)
    with record() as events:
        value = loss(glow, x, reverse)
        events.mark("forward")
        value.backward()
        del value       # and with it the graph
    gradients = events.storages(p.grad for p in glow.parameters())
    # What outlives the step is the gradients, their tensor objects included: each is listed, none is hidden.
    survivors = events.alive()
    mixes = events.of_size([depth * c * c * x.element_size() for c in setup.channels()], at="forward")
    # On a busy machine one thread may have done all there was in that step, and the other not used its scratch. It is
    # as large in a shallow model.
    shallow = Setup(depth=2).glow(**options)
    for _ in range(3):
        loss(shallow, x, reverse).backward()
    return {"held": events.held("forward", without=mixes),
            "peak": events.peak(without=survivors | mixes) + cpp.kept_scratch(),
            "mixes": events.size(mixes), "gradients": events.size(gradients),
            "gradient objects": events.size(survivors - gradients), "everything": events.peak(),
            "parameters": sum(p.numel() * p.element_size() for p in glow.parameters()),
            "parameter count": sum(1 for _ in glow.parameters())}


def footprints(cases: list[dict]) -> list[dict]:
    """`footprint` of several cases in one process: by depth, as weights of one are made once."""
    found = {i: footprint(**cases[i]) for i in sorted(range(len(cases)), key=lambda i: cases[i]["depth"])}
    return [found[i] for i in range(len(cases))]
