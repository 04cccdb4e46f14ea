"""The layers of Glow, each usable alone: forward(x) -> (y, logdet), inverse(y) -> x, or (x, logdet) on request; `Split`
and `CouplingNet` say what they do instead.

Log-determinants are (N,), in nats, of the direction computed. Kingma and Dhariwal 2018 (arXiv:1807.03039).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import backend as backends
from flowkern import ops, reference, stored, transforms
from flowkern.chain import as_state, chain, reads_blocks
from flowkern.checks import choice, refuse_non_finite
from flowkern.layout import channels_last_outside_vmap
from flowkern.mix import compose, factors, mixes
from flowkern.prior import Prior

MIN_STD = 1e-3  # an (almost) constant channel must not be scaled up without bound at initialisation


def check_alone(what: str) -> None:
    """Raise RuntimeError where several processes work together: each would initialise from its own images, and what
    they then train would differ from process to process.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"this {what} is not initialised, and several processes train: call initialize(x) with the same images in "
            "all of them, before the model is wrapped"
        )


class ActNorm(nn.Module):
    """exp(log_scale) (x + bias) per channel, initialised from data to zero mean and unit variance (section 3.1).

    The first training forward initialises; the flag is a buffer, so a loaded layer keeps its values. x (N, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._known = False  # the buffer's value, known without reading the device

    @property
    def is_initialized(self) -> bool:
        """Whether the values come from data. The buffer is asked as long as it is not known to say so: others may have
        copied one that does into it (DDP's broadcast).
        """
        if not (self._known or torch.compiler.is_compiling() or self.initialized.is_meta):
            self._known = bool(self.initialized)
        return self._known

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        own = [state_dict.get(prefix + name) for name in ("log_scale", "bias")]
        if prefix + "initialized" not in state_dict and all(t is not None and bool(t.any()) for t in own):
            self.initialized.fill_(True)  # averages, and others' lists of parameters, leave out what is no parameter
        self._known = bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Set scale and bias from a batch (std floored) and return the normalised batch. Raises ValueError if it is
        empty, or holds NaN or infinities.
        """
        _check_channels(x, len(self.bias), "ActNorm")
        if x.numel() == 0:
            raise ValueError(f"ActNorm: data-dependent initialisation wants a non-empty batch, got {tuple(x.shape)}")
        values = x.to(torch.float64).transpose(0, 1).flatten(1)
        mean, std = values.mean(dim=1), values.std(dim=1, correction=0)
        refuse_non_finite(mean + std, "values that ActNorm is initialised from")
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.clamp_min(MIN_STD).log())
        self.initialized.fill_(True)
        self._known = True
        return reference.actnorm(x, self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_channels(x, len(self.bias), "ActNorm")
        if self.training and not self.is_initialized:
            check_alone("ActNorm")
            self.initialize(x)
        return reference.actnorm(x, self), self._logdet(x)

    def inverse(self, y: Tensor, return_logdet: bool = False):
        _check_channels(y, len(self.bias), "ActNorm")
        x = reference.actnorm(y, self, inverse=True)
        return (x, -self._logdet(y)) if return_logdet else x

    def _logdet(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * _pixels(x)).repeat(x.shape[0])


class InvertibleConv1x1(nn.Module):
    """Multiply every pixel by W = P L (U + diag(sign exp(log_s))), started at a random rotation (section 3.2).

    P and the signs stay fixed. x (N, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        dtype = torch.get_default_dtype()
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_s = nn.Parameter(diagonal.abs().log().to(dtype))
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self.register_buffer("permutation", p.argmax(dim=1))  # row i of W is row permutation[i] of L U

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        given = state_dict.get(f"{prefix}permutation")
        if given is not None and given.shape == self.permutation.shape and not given.is_meta:
            # Kernels take its numbers for places in memory.
            if given.sort().values.tolist() != list(range(len(given))):
                errors.append(f"{prefix}permutation must hold each of 0 ... {len(given) - 1} once")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def weight(self) -> Tensor:
        """W, (C, C), in the parameters' precision."""
        with torch.autocast(self.lower.device.type, enabled=False):
            return reference.conv1x1_weight(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_channels(x, len(self.log_s), "InvertibleConv1x1")
        x = _full_precision(x)
        return ops.channel_mix(x, self.weight(), torch.zeros_like(self.log_s)), self._logdet(x)

    def inverse(self, y: Tensor, return_logdet: bool = False):
        _check_channels(y, len(self.log_s), "InvertibleConv1x1")
        inverse = torch.linalg.inv(self.weight())
        x = ops.channel_mix(_full_precision(y), inverse, torch.zeros_like(self.log_s))
        return (x, -self._logdet(y)) if return_logdet else x

    def _logdet(self, x: Tensor) -> Tensor:
        return (self.log_s.sum() * _pixels(x)).repeat(x.shape[0])


class CouplingNet(nn.Module):
    """Glow's coupling network: 3x3 -> ActNorm -> ReLU -> 1x1 -> ActNorm -> ReLU -> 3x3, zero at first, times exp(3
    logs).

    a (N, in_channels, H, W) -> h (N, out_channels, H, W).
    """

    # Whether the chain may evaluate and differentiate the network by formulas of its own; not one with another forward.
    written_out = True

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.written_out = False

    def __init__(self, in_channels: int, out_channels: int, hidden: int):
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(hidden, in_channels, 3, 3) * 0.05)
        self.norm1 = ActNorm(hidden)
        self.weight2 = nn.Parameter(torch.randn(hidden, hidden, 1, 1) * 0.05)
        self.norm2 = ActNorm(hidden)
        self.weight3 = nn.Parameter(torch.zeros(out_channels, hidden, 3, 3))
        self.bias3 = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))

    def flat_parameters(self) -> list[Tensor]:
        """The nine parameters in the order of `flowkern.network`."""
        weight1, weight2, *last = stored.parameters(self, "weight1", "weight2", "weight3", "bias3", "logs")
        norm1, norm2 = (stored.parameters(norm, "log_scale", "bias") for norm in (self.norm1, self.norm2))
        return [weight1, *norm1, weight2, *norm2, *last]

    @torch.no_grad()
    def initialize(self, a: Tensor) -> None:
        """Initialise both ActNorms from a batch."""
        h = F.relu(self.norm1.initialize(F.conv2d(a, self.weight1, padding=1)))
        self.norm2.initialize(F.conv2d(h, self.weight2))

    def forward(self, a: Tensor) -> Tensor:
        stored.refuse_pruned(self.norm1, self.norm2)
        return reference.coupling_network(a, self)


class AffineCoupling(nn.Module):
    """Transform the second half of the channels, `b <- (b + t) s`, with (raw_s, t) read from the first (section 3.3).

    net: maps (N, C/2, H, W) to (N, C, H, W), or to (N, C/2, H, W) with scale="additive". Scale maps: "softclamp",
    s = exp(alpha tanh(raw/alpha)), "sigmoid", s = sigmoid(raw + 2), and "additive", s = 1.
    """

    def __init__(self, net: nn.Module, scale: str = "softclamp", alpha: float = 1.0):
        super().__init__()
        choice(scale, "scale", reference.SCALES)
        if scale == "softclamp" and not alpha > 0:
            raise ValueError(f"the soft clamp wants alpha > 0, got {alpha!r}")
        self.net = net
        self.scale = scale
        self.alpha = float(alpha)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Initialise the network if it knows how to (`net.initialize(a)`), and return the transformed batch."""
        if hasattr(self.net, "initialize"):
            self.net.initialize(x[:, : x.shape[1] // 2], *_given(context))
        with torch.no_grad():
            return self(x, context)[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.couple(_full_precision(x), self._network(x, context), self.scale, self.alpha)

    def inverse(self, y: Tensor, return_logdet: bool = False, context: Tensor | None = None):
        h = self._network(y, context)
        x, logdet = ops.couple(_full_precision(y), h, self.scale, self.alpha, inverse=True)
        return (x, logdet) if return_logdet else x

    def _network(self, x: Tensor, context: Tensor | None) -> Tensor:
        _check_even(x)
        # In one memory layout in both directions: dropout's mask follows its input's.
        return self.net(channels_last_outside_vmap(x)[:, : x.shape[1] // 2], *_given(context))


class StepOfFlow(nn.Module):
    """ActNorm, invertible 1x1 convolution, affine coupling (figure 2a). x (N, C, H, W) with C even."""

    def __init__(
        self,
        channels: int,
        hidden: int = 512,
        scale: str = "softclamp",
        alpha: float = 1.0,
        network: Callable[[int, int], nn.Module] | None = None,
    ):
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"a step of flow wants an even number of channels, got {channels}")
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        sizes = channels // 2, channels // 2 if scale == "additive" else channels
        net = CouplingNet(*sizes, hidden) if network is None else network(*sizes)
        self.coupling = AffineCoupling(net, scale, alpha)

    @property
    def is_initialized(self) -> bool:
        return self.actnorm.is_initialized

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Data-dependent initialisation of every ActNorm in the step; returns the transformed batch."""
        with torch.autocast(x.device.type, enabled=False):
            zero = torch.zeros_like(self.actnorm.bias)
            x = reference.channel_mix(self.actnorm.initialize(x), self.conv.weight(), zero)
            return self.coupling.initialize(x, context)

    def forward(self, x: Tensor, **chain_options) -> tuple[Tensor, Tensor]:
        """Options are those of `flowkern.chain.chain`: memory, anchor_every, kept_steps, backend,
        compute_dtype."""
        if self.training and not self.is_initialized:
            check_alone("StepOfFlow")
            self.initialize(x)
        return run_steps([self], x, **chain_options)

    def inverse(self, y: Tensor, return_logdet: bool = False, **chain_options):
        x, logdet = run_steps([self], y, reverse=True, **chain_options)
        return (x, logdet) if return_logdet else x


def run_steps(
    steps, x: Tensor, reverse: bool = False, context: Tensor | None = None, **chain_options
) -> tuple[Tensor, Tensor]:
    """Run a sequence of `StepOfFlow`s of one level as a reversible chain. Returns the state and logdet (N,).

    x (N, C, H, W), or forward also `blocks` of the image that is to be squeezed: then a backend that can does without
    the squeezed image.
    context: what the coupling networks read beside the state. Under torch.func the chain runs as plain PyTorch, for
    which it wants memory="store", and under vmap and forward-mode differentiation backend="reference" (RuntimeError
    otherwise).
    """
    x, channels = _full_precision(x), len(steps[0].actnorm.bias)
    nets = [step.coupling.net for step in steps]
    plain = transforms.batched_or_forward()
    if plain or not torch.compiler.is_compiling() and transforms.is_transformed():
        _check_plain(x.device, plain, **chain_options)
        matrix, offset, inverse, mixes_logdet = mixes(*factors(steps))
        out, logdet = plain_chain(steps, x, matrix, offset, inverse, context, reverse)
    else:
        if x.dim() != 6 or reverse or not reads_blocks(nets, x, chain_options.get("backend", "auto")):
            x = as_state(x)
            _check_channels(x, channels, "a step of flow")
        matrix, offset, inverse, mixes_logdet = compose(steps, chain_options.get("backend", "auto"))
        coupling = steps[0].coupling
        out, logdet = chain(
            x,
            matrix,
            offset,
            inverse,
            nets,
            context=context,
            reverse=reverse,
            scale=coupling.scale,
            alpha=coupling.alpha,
            **chain_options,
        )
    constant = mixes_logdet * _pixels(out)
    return out, logdet - constant if reverse else logdet + constant


def plain_chain(steps, x, matrix, offset, inverse, context: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The steps by the reference's formulas, given their composed mixes. Returns state and couplings' logdet (N,)."""
    x, logdet = x.flatten(1, 3) if x.dim() == 6 else x, x.new_zeros(x.shape[0])
    for k in reversed(range(len(steps))) if reverse else range(len(steps)):
        coupling = steps[k].coupling
        x = x if reverse else reference.channel_mix(x, matrix[k], offset[k])
        h = coupling.net(x[:, : x.shape[1] // 2], *_given(context))
        x, d = reference.couple(x, h, coupling.scale, coupling.alpha, inverse=reverse)
        x = reference.channel_mix(x, inverse[k], offset[k], inverse=True) if reverse else x
        logdet = logdet + d
    return x, logdet


def _check_plain(
    device: torch.device, by_reference: bool, memory: str = "recompute", backend: str = "auto", **_
) -> None:
    if not by_reference:
        if memory != "store":
            raise RuntimeError(f"torch.func.grad wants memory='store', got memory={memory!r}")
        return
    name = backends.resolve(device, backend)
    if memory != "store" or name != "reference":
        raise RuntimeError(
            "vmap and forward-mode differentiation want memory='store' and backend='reference', got "
            f"memory={memory!r} and backend={name!r}"
        )


class Split(Prior):
    """Emit half of the channels as latents; the other half goes on (section 3.6 and figure 2b).

    With `learned`, the emitted half is standardised by a Gaussian whose mean and scale a zero-initialised 3x3
    convolution reads from the half that stays: Glow's conditional prior, reparametrised so that z stays N(0, I).
    keeps: "first" or "second", the half that goes on. prior_options: those of `flowkern.prior.Prior`.
    forward: x (N, C, H, W) -> (kept, emitted, logdet), each half (N, C/2, H, W).
    """

    def __init__(self, channels: int, learned: bool = False, keeps: str = "first", **prior_options):
        super().__init__(channels // 2, kept=channels // 2, learned=learned, **prior_options)
        self.keeps = keeps

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        kept, emitted = (first, second) if self.keeps == "first" else (second, first)
        return kept, *super().forward(emitted, kept, context)

    def inverse(self, kept: Tensor, emitted: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Put the halves together again. Returns x (N, C, H, W) and logdet (N,)."""
        emitted, logdet = super().inverse(emitted, kept, context)
        return torch.cat([kept, emitted] if self.keeps == "first" else [emitted, kept], dim=1), logdet


def squeeze(x: Tensor) -> Tensor:
    """`reference.squeeze` into channels-last memory. (N, C, H, W) -> (N, 4C, H/2, W/2)."""
    return as_state(blocks(x))


def blocks(x: Tensor) -> Tensor:
    """The squeezed image as a view of the image: (N, C, H, W) -> (N, C, 2, 2, H/2, W/2)."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `squeeze`, into channels-last memory."""
    n, c, h, w = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(n, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)


def _full_precision(x: Tensor) -> Tensor:
    """A state under autocast, where layers before it may have left it in lower precision: in single precision."""
    lowered = x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type)
    return x.float() if lowered else x


def _given(context: Tensor | None) -> tuple[Tensor, ...]:
    """The context as a network's further argument, if there is one."""
    return () if context is None else (context,)


def _pixels(x: Tensor) -> int:
    return math.prod(x.shape[-2:])


def _check_channels(x: Tensor, channels: int, what: str) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{what} of {channels} channels wants (N, {channels}, H, W), got {tuple(x.shape)}")


def _check_even(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] % 2:
        raise ValueError(f"a coupling wants (N, C, H, W) with an even C, got {tuple(x.shape)}")
