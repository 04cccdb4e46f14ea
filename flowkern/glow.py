"""Glow: a multi-scale normalizing flow that trains in memory that does not grow with its depth."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import backend as backends
from flowkern import budget, dialects, saving, transforms
from flowkern.chain import MEMORY_MODES, is_standard, network_dtype
from flowkern.checks import choice, positive_int, refuse_non_finite
from flowkern.layers import Split, StepOfFlow, blocks, check_alone, run_steps, squeeze, unsqueeze
from flowkern.prior import Prior
from flowkern.replay import refuse_replica
from flowkern.variants import Variant

# How a Glow runs, which may be changed at any time; in the order in which they may be set.
OPTIONS = ("memory", "anchor_every", "memory_budget", "backend", "compute_dtype", "check_finite")


class Level(nn.Module):
    """Squeeze, K steps of flow and, except on the last level, a split. Holds parameters; `Glow` runs it."""

    def __init__(self, channels: int, depth: int, split: Split | None, contiguous: bool, **step_options):
        super().__init__()
        self.steps = nn.ModuleList(StepOfFlow(channels, **step_options) for _ in range(depth))
        self.split = split
        self.contiguous = contiguous

    def squeeze(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4C, H/2, W/2), by 2x2 blocks or, with `contiguous`, by reinterpreting memory."""
        n, c, h, w = x.shape
        return x.reshape(n, 4 * c, h // 2, w // 2) if self.contiguous else squeeze(x)

    def blocks(self, x: Tensor) -> Tensor:
        """The squeezed image as `run_steps` takes it: a view of the image where that is possible."""
        return self.squeeze(x) if self.contiguous else blocks(x)

    def unsqueeze(self, x: Tensor) -> Tensor:
        """The inverse of `squeeze`."""
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2 * h, 2 * w) if self.contiguous else unsqueeze(x)


class Glow(nn.Module):
    """Glow (Kingma and Dhariwal 2018, arXiv:1807.03039), a bijection between images and latents of the same size.

    size: (C, H, W) of the images, H and W divisible by 2^levels; other such sizes are accepted at call time. depth:
    steps of flow per level, an int or one int per level. hidden: width of the coupling networks. coupling: "affine"
    or "additive". scale: "softclamp", s = exp(alpha tanh(raw/alpha)), bounded both ways, or "sigmoid", Glow's
    sigmoid(raw + 2). split_prior: "standard" splits plainly, "learned" is Glow's conditional Gaussian, reparametrised
    so that z stays N(0, I); top_prior: the same for what the last level emits, with constants per channel. network:
    own coupling network, (in_channels, out_channels) -> nn.Module, which leaves its input as it is; dropout and batch
    norm may be in it, because backward replays what ran. context_channels: how many numbers the model is conditioned
    on, which are given as `context` to every method. shift: subtracted from images first, added last. variant: what
    models of other libraries do differently, by the names of `flowkern.variants.Variant`; `from_checkpoint` sets it.
    memory: "recompute" rebuilds activations in backward, "store" keeps them, "checkpoint" keeps each step's input.
    anchor_every: keep an exact state every n steps, which bounds the drift of "recompute". memory_budget: bytes that
    "recompute" may take at the peak of a training step through one call of `forward` or `inverse`, beside parameters,
    their gradients and the composed mixes: it keeps the activations of as many steps as fit and recomputes the others
    (`kept_steps` tells). Below what "recompute" takes anyway nothing is kept, and the budget is not met. The model of
    what fits was measured on the CPU; on a GPU it is not checked yet. backend: see `flowkern.backends()`.
    compute_dtype: precision of the coupling networks (default: autocast's, else the parameters'). check_finite: reject
    NaN and inf in inputs (default: on the CPU only, because on a GPU the check waits for the device).

    Raises ValueError or TypeError, in one sentence, for arguments and inputs that don't fit, and RuntimeError for a
    backend that can't run here.

    >>> glow = Glow((3, 16, 16), levels=2, depth=2, hidden=16)
    >>> x = torch.rand(4, 3, 16, 16)
    >>> glow.initialize(x)
    >>> z, logdet = glow(x)
    >>> z.shape, logdet.shape, torch.allclose(glow.inverse(z), x, atol=1e-4)
    (torch.Size([4, 768]), torch.Size([4]), True)
    """

    def __init__(
        self,
        size: Sequence[int],
        levels: int = 3,
        depth: int | Sequence[int] = 16,
        hidden: int = 512,
        *,
        coupling: str = "affine",
        scale: str = "softclamp",
        alpha: float = 1.0,
        split_prior: str = "standard",
        top_prior: str = "standard",
        network: Callable[[int, int], nn.Module] | None = None,
        context_channels: int = 0,
        shift: float = 0.0,
        variant: dict | None = None,
        memory: str = "recompute",
        anchor_every: int | None = None,
        memory_budget: int | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        check_finite: bool | None = None,
    ):
        super().__init__()
        size = _check_size_argument(size)
        levels = positive_int(levels, "levels")
        depth = list(depth) if isinstance(depth, Sequence) and not isinstance(depth, str) else [depth] * levels
        if len(depth) != levels:
            raise ValueError(f"depth wants one int, or one per level ({levels}), got {len(depth)}")
        depth = [positive_int(d, "depth") for d in depth]
        hidden = positive_int(hidden, "hidden")
        choice(coupling, "coupling", ("affine", "additive"))
        choice(scale, "scale", ("softclamp", "sigmoid"))
        choice(split_prior, "split_prior", ("standard", "learned"))
        choice(top_prior, "top_prior", ("standard", "learned"))
        if context_channels != 0:
            positive_int(context_channels, "context_channels")
        options = Variant.of(variant, levels)
        if isinstance(network, str):
            network = _named_network(network)
        if network is not None and not (options.plain_network and context_channels == 0):
            raise ValueError("network= excludes context_channels and the coupling network's variant options")
        self.levels_count = levels
        self.size = size
        self._check_divisible(size[1:])
        self.config = {
            "size": list(size),
            "levels": levels,
            "depth": depth,
            "hidden": hidden,
            "coupling": coupling,
            "scale": scale,
            "alpha": float(alpha),
            "split_prior": split_prior,
            "top_prior": top_prior,
            "context_channels": context_channels,
            "variant": options.changed(),
            "shift": float(shift),
            "network": "standard" if network is None else "custom",
        }
        self.shift = float(shift)
        self._memory_budget = None
        self.memory = memory
        self.anchor_every = anchor_every
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.check_finite = check_finite
        self.context_channels = context_channels
        self.variant = options
        self.levels = nn.ModuleList()
        scale = "additive" if coupling == "additive" else scale
        channels, height, width = size
        for i, steps in enumerate(depth):
            last = i == levels - 1
            channels, height, width = 4 * channels, height // 2, width // 2
            prior = options.prior(context_channels, (height, width), last)
            split = None if last else Split(channels, split_prior == "learned", options.keeps, **prior)
            own = options.network(i, hidden, scale, alpha, context_channels) if network is None else network
            steps_options = {"hidden": hidden, "scale": scale, "alpha": alpha, "network": own}
            self.levels.append(Level(channels, steps, split, options.at("squeeze", i) == "contiguous", **steps_options))
            if last:
                self.top = Prior(channels, learned=top_prior == "learned", **prior)
            channels //= 2
        self.memory_budget = memory_budget

    @property
    def memory(self) -> str:
        """What is kept between forward and backward: "recompute", "store" or "checkpoint"."""
        return self._memory

    @memory.setter
    def memory(self, mode: str) -> None:
        choice(mode, "memory", MEMORY_MODES)
        if mode != "recompute" and self._memory_budget is not None:
            raise ValueError(f"memory={mode!r} has no use for a memory_budget; set memory_budget to None first")
        self._memory = mode

    @property
    def anchor_every(self) -> int | None:
        """Keep an exact state every so many steps; None keeps none."""
        return self._anchor_every

    @anchor_every.setter
    def anchor_every(self, every: int | None) -> None:
        self._anchor_every = None if every is None else positive_int(every, "anchor_every")

    @property
    def memory_budget(self) -> int | None:
        """Bytes within which "recompute" keeps activations (see the class); None keeps none."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, bytes_: int | None) -> None:
        if bytes_ is not None:
            if isinstance(bytes_, bool) or not isinstance(bytes_, int):
                raise TypeError(f"memory_budget wants an int, in bytes, or None, got {bytes_!r}")
            if bytes_ < 0:
                raise ValueError(f"memory_budget wants an int >= 0, got {bytes_}")
            if self.memory != "recompute":
                raise ValueError(f"memory_budget is for memory='recompute', and this Glow has memory={self.memory!r}")
            if not is_standard(step.coupling.net for level in self.levels for step in level.steps):
                raise ValueError(
                    "memory_budget knows what Glow's own coupling network keeps, without a context or hooks, and this "
                    "Glow has another one; use memory='checkpoint' or 'store'"
                )
        self._memory_budget = bytes_

    def kept_steps(self, n: int, size: Sequence[int] | None = None, inverse: bool = False) -> tuple[int, ...]:
        """How many steps of each level keep their activations within `memory_budget`, for n images of (H, W) = size.

        size: default, the construction's. inverse: for the method `inverse`, which differs, as backward frees the
        levels in the opposite order.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n wants an int >= 0, got {n!r}")
        if self.memory_budget is None:
            return (0,) * self.levels_count
        # Under torch.compile sizes may be symbols, and what is kept depends on their values: range asks for them.
        n, h, w = (len(range(s)) for s in (n, *self._check_divisible(self.size[1:] if size is None else size)))
        like = next(self.parameters())
        dtype = network_dtype(like, self.compute_dtype) or like.dtype
        learned = "learned" in (self.config["split_prior"], self.config["top_prior"])
        levels = []
        for i, level in enumerate(self.levels):
            net, pixels = level.steps[0].coupling.net, n * (h >> i + 1) * (w >> i + 1)
            channels, outputs, hidden = len(level.steps[0].actnorm.bias), len(net.bias3), len(net.weight1)
            numbers = like.element_size(), dtype.itemsize
            levels.append((len(level.steps), n, pixels, channels, outputs, hidden, *numbers, learned))
        anchors = self.anchor_every or 0
        backend = backends.resolve(like.device, self.backend)
        placed = like.device, backend, like.dtype, dtype
        return budget.plan(tuple(levels), self.memory_budget, anchors, inverse, *placed)

    @property
    def backend(self) -> str:
        """The backend of the pixel ops, or "auto"."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        backends.check(name)
        self._backend = name

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Precision of the coupling networks; None follows autocast, else the parameters."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"compute_dtype wants a floating torch.dtype or None, got {dtype!r}")
        self._compute_dtype = dtype

    @property
    def is_initialized(self) -> bool:
        """Whether every ActNorm has been initialised from data (or loaded)."""
        return all(step.is_initialized for level in self.levels for step in level.steps)

    def set_options(self, **options) -> None:
        """Set how the model runs, by the names of `OPTIONS`: memory, backend and the like, which are not saved with it.

        Raises TypeError for another name, and what each of them raises for an invalid value.
        """
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"{name!r} is not how a Glow runs; the options are {', '.join(OPTIONS)}")
        if options.get("memory_budget", 0) is None:
            self.memory_budget = None  # first: with a budget there is no other memory mode
        for name in (name for name in OPTIONS if name in options):
            setattr(self, name, options[name])

    def _options(self) -> dict:
        return {
            "memory": self.memory,
            "anchor_every": self.anchor_every,
            "backend": self.backend,
            "compute_dtype": self.compute_dtype,
        }

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Data-dependent initialisation of every ActNorm: zero mean, unit variance (std floored) on this batch.

        x (N, C, H, W), N >= 1. Non-finite values are refused on every device, in a context too.
        """
        self._initialize(x, context, every=True)

    @torch.no_grad()
    def _initialize(self, x: Tensor, context: Tensor | None, every: bool) -> None:
        """every: also the steps that are initialised, or loaded, already."""
        x = self._check_image(x, finite=True)
        if x.shape[0] == 0:
            raise ValueError(f"initialize wants at least one image, got a batch of shape {tuple(x.shape)}")
        contexts = self._contexts(context, x.shape[0], x.shape[2:], finite=True)
        x = x - self.shift
        with torch.autocast(x.device.type, enabled=False):
            for level, local in zip(self.levels, contexts.levels, strict=True):
                x = level.squeeze(x)
                for step in level.steps:
                    done = step.is_initialized and not every
                    x = run_steps([step], x, context=local)[0] if done else step.initialize(x, local)
                if level.split is not None:
                    x = level.split(x, contexts.vector)[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image to latent: x (N, C, H, W) -> z (N, C*H*W) and log|det dz/dx| (N,) in nats.

        context, wanted if the Glow has context_channels and only then: (N, context_channels), or maps
        (N, context_channels, h, w), which are averaged to the size of each level. Differentiable in both.
        The first forward in training mode initialises the ActNorms from x.
        """
        x = self.ready(x, context)
        contexts = self._contexts(context, x.shape[0], x.shape[2:])
        x = x - self.shift
        logdet = x.new_zeros(x.shape[0])
        emitted = []
        for i, level in enumerate(self.levels):
            x, d = self._steps(i, level.blocks(x), contexts.levels[i], reverse=False)
            logdet = logdet + d
            if level.split is not None:
                x, part, d = level.split(x, contexts.vector)
                emitted.append(part)
                logdet = logdet + d
        x, d = self.top(x, context=contexts.vector)
        emitted.append(x)
        # A level's latents are flattened pixel by pixel, as they lie in memory.
        return torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in emitted], dim=1), logdet + d

    def ready(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Images x as the levels take them: checked, and of the parameters' dtype. In training mode the first ones
        initialise the ActNorms.
        """
        x = self._check_image(x)
        if self.training and not self.is_initialized:
            if torch.compiler.is_compiling():
                raise RuntimeError("this Glow is not initialised; call glow.initialize(x) before compiling it")
            check_alone("Glow")
            self._initialize(x, context, every=False)
        return x

    def inverse(
        self,
        z: Tensor,
        size: Sequence[int] | None = None,
        return_logdet: bool = False,
        context: Tensor | None = None,
    ):
        """Latent to image: z (N, C*H*W) -> x (N, C, H, W), or (x, log|det dx/dz| (N,)) with `return_logdet`.

        size: (H, W) of the images if they are not the construction's. context: as in `forward`. Differentiable, as lean
        in memory as `forward`.
        """
        self._check_tensor(z, "latent")
        *emitted, x = self.split_latent(z.to(next(self.parameters()).dtype), size)
        contexts = self._contexts(context, z.shape[0], self.size[1:] if size is None else size)
        x, logdet = self.top.inverse(x, context=contexts.vector)
        for i, level in reversed(list(enumerate(self.levels))):
            if level.split is not None:
                x, d = level.split.inverse(x, emitted.pop(), contexts.vector)
                logdet = logdet + d
            x, d = self._steps(i, x, contexts.levels[i], reverse=True)
            logdet = logdet + d
            x = level.unsqueeze(x)
        x = x + self.shift
        return (x, logdet) if return_logdet else x

    def _steps(self, level: int, x: Tensor, context: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """The steps of flow of a level. `flowkern.export` replaces this."""
        options = self._options()
        if self.memory_budget is not None and torch.is_grad_enabled():
            h, w = (side << level + 1 for side in x.shape[-2:])
            options["kept_steps"] = self.kept_steps(x.shape[0], (h, w), inverse=reverse)[level]
        return run_steps(self.levels[level].steps, x, reverse=reverse, context=context, **options)

    def split_latent(self, z: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """Views of z (N, C*H*W), one (N, c, h, w) per level, in the order in which levels emit them."""
        c, *own = self.size
        h, w = self._check_divisible(own if size is None else size)
        if z.dim() != 2 or z.shape[1] != c * h * w:
            hint = "" if size is not None else f"; for images that are not {own[0]}x{own[1]} pass size=(H, W)"
            raise ValueError(f"expected latents of shape (N, {c * h * w}), got {tuple(z.shape)}{hint}")
        parts = []
        for i in range(self.levels_count):
            h, w = h // 2, w // 2
            channels = c * 2 ** (i + 1) * (2 if i == self.levels_count - 1 else 1)
            parts.append((channels, h, w))
        widths = [math.prod(part) for part in parts]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [
            z.narrow(1, start, width).view(z.shape[0], h, w, channels).permute(0, 3, 1, 2)
            for start, width, (channels, h, w) in zip(starts, widths, parts, strict=True)
        ]

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | context), (N,) in nats, with z ~ N(0, I). x (N, C, H, W)."""
        return standard_log_prob(*self(x, context))

    def bits_per_dim(self, x: Tensor, bits: int = 8, context: Tensor | None = None) -> Tensor:
        """-log_prob(x) / (D ln 2) + bits (N,): bits per dimension of images in [0, 1] that are already dequantised.

        bits: of a grey level; 0 gives the density's own, in the units of x.
        """
        return -self.log_prob(x, context) / (math.prod(x.shape[1:]) * math.log(2)) + bits

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 0.7,
        size: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """n images (n, C, H, W) from latents drawn from N(0, temperature^2 I). context: as in `forward`, with N = n."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n wants an int >= 0, got {n!r}")
        if not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature wants a finite number >= 0, got {temperature!r}")
        refuse_replica(self)
        h, w = self._check_divisible(self.size[1:] if size is None else size)
        like = next(self.parameters())
        z = torch.randn(n, self.size[0] * h * w, dtype=like.dtype, device=like.device, generator=generator)
        return self.inverse(temperature * z, size=(h, w), context=context)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the weights (safetensors) and the configuration (JSON) into the folder `path`, made if missing.

        Raises ValueError where something is parametrized or pruned, which a configuration can't say.
        """
        saving.write(path, self, self.config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, network: Callable[[int, int], nn.Module] | None = None, **options
    ) -> "Glow":
        """Load what `save_pretrained` wrote. options: memory, anchor_every, memory_budget, backend, compute_dtype,
        check_finite.

        Raises FileNotFoundError for a missing file, ValueError for a truncated one or one whose tensors don't fit the
        configuration, TypeError or ValueError for unknown options or values out of range. A Glow with its own coupling
        network wants the same `network` again.
        """
        config, weights = saving.read(path, "Glow")
        try:
            custom = config.pop("network", None) == "custom"
            if custom != (network is not None):
                wants = (
                    "its own coupling network; pass the same network=" if custom else "the standard network; pass none"
                )
                raise ValueError(f"the Glow in {path} was made with {wants}")
            glow = cls(**config, network=network)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold the configuration of a Glow: {error}") from error
        glow.set_options(**options)
        dtype = next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
        saving.fill(glow.to(dtype), weights, f"the weights in {path}")
        return glow

    @classmethod
    def from_checkpoint(
        cls,
        source,
        dialect: str | None = None,
        *,
        size: int | Sequence[int] | None = None,
        shift: float | None = None,
        memory: str = "recompute",
        anchor_every: int | None = None,
        memory_budget: int | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        check_finite: bool | None = None,
        **dialect_options,
    ) -> "Glow":
        """A Glow trained with another implementation: rosinality, chaiyujin, GlowIP, openai or normflows.

        source: a file of tensors (torch.save, .npz, .safetensors) or a state_dict. dialect: a name from
        `flowkern.dialects.DIALECTS` (default: told from the tensors' names). size: of the images, an int or (H, W),
        where the file does not tell it. shift: subtracted from images first (default: the dialect's, for images in
        [0, 1]). dialect_options: what the file does not tell; see the dialect's module. log_prob is the original's; z
        is ours: each level's latents in the order of `split_latent`, standardised by the learned priors.

        Raises FileNotFoundError; ValueError for a file that is not one of tensors (pickled code is never executed) or
        whose tensors don't fit, all of them listed; TypeError for an option that the dialect does not have.
        """
        arguments, weights, dtype = dialects.load(source, dialect, size=size, **dialect_options)
        if shift is not None:
            arguments["shift"] = shift
        runtime = {"memory": memory, "anchor_every": anchor_every, "memory_budget": memory_budget, "backend": backend}
        glow = cls(**arguments, **runtime, compute_dtype=compute_dtype, check_finite=check_finite).to(dtype)
        saving.fill(glow, weights, "the converted tensors")
        return glow

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self.config.items() if k != "size" and v not in (0, {})}
        return ", ".join([str(tuple(self.size)), *(f"{k}={v!r}" for k, v in shown.items()), f"memory={self.memory!r}"])

    def _check_divisible(self, size: Sequence[int]) -> tuple[int, int]:
        if not hasattr(size, "__len__") or len(size) != 2:
            raise ValueError(f"size wants (H, W), got {size!r}")
        h, w = size
        unit = 2**self.levels_count
        if h < 1 or w < 1 or h % unit or w % unit:
            raise ValueError(f"height and width must be divisible by 2^levels = {unit}, got {h}x{w}")
        return int(h), int(w)

    def _check_tensor(self, x: Tensor, what: str, finite: bool = False) -> None:
        refuse_replica(self)
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {what}s as a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point {what}s, got {x.dtype}")
        like = self._check_values(x, what, finite)
        if x.dtype == torch.float64 and like.dtype != torch.float64:
            raise TypeError(
                f"the {what}s are torch.float64 and the Glow is {like.dtype}; call glow.double() or x.float()"
            )

    def _check_values(self, x: Tensor, what: str, finite: bool) -> Tensor:
        """Check that numbers are where the Glow is, and are numbers (finite: looked at on every device). Returns one of
        its parameters.
        """
        like = next(self.parameters())
        if x.layout != torch.strided:
            raise TypeError(f"expected {what}s as a dense tensor, got {x.layout}")
        if x.device != like.device:
            raise ValueError(f"the {what}s are on {x.device} and the Glow is on {like.device}; move one of them")
        if self.checks_values(x.device, finite):
            refuse_non_finite(x, f"{what}s")
        return like

    def checks_values(self, device: torch.device, always: bool = False) -> bool:
        """Whether NaN and infinities are looked for in what is on a device; never in what is traced."""
        wanted = always or (device.type == "cpu" if self.check_finite is None else self.check_finite)
        return wanted and not (torch.compiler.is_compiling() or transforms.batched_or_forward())

    def _contexts(self, context: Tensor | None, n: int, size: Sequence[int], finite: bool = False) -> "_Contexts":
        """What the priors and each level's networks read of the context."""
        levels = self.levels_count
        if self.context_channels == 0:
            if context is not None:
                raise ValueError("this Glow takes no context; it was made without context_channels")
            return _Contexts(None, [None] * levels)
        wanted = f"({n}, {self.context_channels}) or ({n}, {self.context_channels}, h, w)"
        if not isinstance(context, Tensor) or not context.is_floating_point():
            given = f"{context.dtype}" if isinstance(context, Tensor) else type(context).__name__
            raise TypeError(f"this Glow wants a floating-point context of shape {wanted}, got {given}")
        if context.dim() not in (2, 4) or context.shape[:2] != (n, self.context_channels):
            raise ValueError(f"expected a context of shape {wanted}, got {tuple(context.shape)}")
        context = context.to(self._check_values(context, "context", finite).dtype)
        if self.variant.prior_context and context.dim() == 4:
            raise ValueError(f"this Glow's priors read the context, which must be ({n}, {self.context_channels}) then")
        vector = context if context.dim() == 2 else None
        if not self.variant.network_context:
            return _Contexts(vector, [None] * levels)
        if vector is not None:
            return _Contexts(vector, [vector[:, :, None, None]] * levels)
        sizes = [(size[0] >> i + 1, size[1] >> i + 1) for i in range(levels)]
        return _Contexts(None, [F.adaptive_avg_pool2d(context, s) for s in sizes])

    def _check_image(self, x: Tensor, finite: bool = False) -> Tensor:
        self._check_tensor(x, "image", finite)
        c, h, w = self.size
        if x.dim() != 4 or x.shape[1] != c:
            raise ValueError(f"expected images of shape (N, {c}, H, W), got {tuple(x.shape)}")
        self._check_divisible(x.shape[2:])
        return x.to(next(self.parameters()).dtype)


class _Contexts(NamedTuple):
    """The context as priors read it (N, channels), and as each level's networks do (N, channels, h or 1, w or 1)."""

    vector: Tensor | None
    levels: list[Tensor | None]


def standard_log_prob(z: Tensor, logdet: Tensor) -> Tensor:
    """log p(x) (N,) in nats of what a flow maps to z (N, D) with log|det dz/dx| = logdet (N,), under z ~ N(0, I)."""
    return logdet - 0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi))


def _named_network(name: str) -> None:
    """What a saved configuration says of the network: the standard one, or one that only its owner has."""
    if name == "custom":
        raise ValueError("this Glow was made with its own coupling network; pass the same network=")
    return choice(name, "network", ("standard",)) and None


def _check_size_argument(size: Sequence[int]) -> tuple[int, int, int]:
    try:
        size = tuple(size)
    except TypeError:
        raise TypeError(f"size wants (C, H, W), got {size!r}") from None
    if len(size) != 3:
        raise ValueError(f"size wants (C, H, W), got {size!r}")
    return tuple(positive_int(s, "size") for s in size)
