"""What Glows of other libraries do differently and what no choice of weights can express, as options of the layers.

Everything else is folded into the weights when a checkpoint is loaded (`flowkern.dialects`). A coupling network with an
option set runs as a network of a user's own does: ordinary autograd, one step at a time, in any memory mode.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import reference
from flowkern.layers import ActNorm
from flowkern.layout import channels_last_outside_vmap
from flowkern.prior import edge_term
from flowkern.stored import refuse_pruned

CHOICES = {
    "edge": (None, "ones", "indicator"),
    "scale_map": (None, "sigmoid", "exp", "inverse_sigmoid"),
    "squeeze": ("pixels", "contiguous"),
    "keeps": ("first", "second"),
    "prior_map": (None, "channels", "pixels"),
    "prior_context": (None, "top", "all"),
}
PER_LEVEL = ("scale_bias", "squeeze")


@dataclass(frozen=True)
class Variant:
    """The options; the defaults are Glow as flowkern builds it. Those of `PER_LEVEL` may be lists, one value a level.

    edge: "ones" pads the last convolution of networks and priors with ones, "indicator" gives every 3x3 convolution a
    channel that is 1 in the padding and 0 inside. leaky: slope of the networks' LeakyReLUs. scale_map: the network's
    raw output to log s: "sigmoid" log(sigmoid(raw + 2) + scale_bias), "exp" raw, "inverse_sigmoid"
    -log sigmoid(raw + 2); it wants scale="softclamp", whose alpha then bounds |log s|. shift_after: s b + t instead of
    (b + t) s. squeeze: "contiguous" reinterprets the memory of (C, H, W) as (4C, H/2, W/2). keeps: which half of the
    channels a split lets pass. prior_map: every emission has a Gaussian with constants per channel or per pixel.
    prior_context: the Gaussians of these emissions depend on the context. network_context: the networks do.
    """

    edge: str | None = None
    leaky: float = 0.0
    scale_map: str | None = None
    scale_bias: float | list[float] = 0.0
    shift_after: bool = False
    squeeze: str | list[str] = "pixels"
    keeps: str = "first"
    prior_map: str | None = None
    prior_context: str | None = None
    network_context: bool = True

    @classmethod
    def of(cls, options: dict | None, levels: int) -> "Variant":
        """Checked options. Raises ValueError or TypeError in one sentence."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options or {} if name not in known]
        if unknown:
            raise ValueError(f"unknown variant option {unknown[0]!r}; choose among {', '.join(known)}")
        variant = cls(**options or {})
        for name in known:
            value = getattr(variant, name)
            values = value if name in PER_LEVEL and isinstance(value, (list, tuple)) else [value]
            if isinstance(value, (list, tuple)) and len(values) != levels:
                raise ValueError(f"variant option {name} wants one value, or one per level ({levels}), got {value!r}")
            if name in CHOICES and any(v not in CHOICES[name] for v in values):
                choices = ", ".join(map(repr, CHOICES[name]))
                raise ValueError(f"unknown variant option {name}={value!r}; choose one of {choices}")
        return variant

    def changed(self) -> dict:
        """The options that are not the defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def at(self, name: str, level: int):
        """The value of an option at a level."""
        value = getattr(self, name)
        return value[level] if isinstance(value, (list, tuple)) else value

    @property
    def plain_network(self) -> bool:
        """Whether the coupling networks are Glow's own."""
        return not any((self.edge, self.leaky, self.scale_map, self.shift_after)) and self.network_context

    def prior(self, context: int, size: tuple[int, int], last: bool) -> dict:
        """Options of a level's `Prior`, beside whether it is learned. size: (H, W) of the level."""
        reads_context = self.prior_context == "all" or (self.prior_context == "top" and last)
        map_size = {None: None, "channels": (1, 1), "pixels": size}[self.prior_map]
        return {"edge": self.edge, "map_size": map_size, "classes": context if reads_context else 0}

    def network(self, level: int, hidden: int, scale: str, alpha: float, context: int):
        """A factory (in_channels, out_channels) -> `VariantNet`, or None where the standard network serves."""
        options = {
            "edge": self.edge,
            "leaky": self.leaky,
            "scale_map": self.scale_map,
            "scale_bias": self.at("scale_bias", level),
            "shift_after": self.shift_after,
            "context": context if self.network_context else 0,
        }
        if not any(options.values()):
            return None
        return lambda i, o: VariantNet(i, o, hidden, scale, alpha, **options)


class VariantNet(nn.Module):
    """Glow's coupling network with options of `Variant`, and with a context.

    a (N, in_channels, H, W) and context (N, context, h, w), h and w being H and W or 1, -> h (N, out_channels, H, W) as
    `AffineCoupling` reads it under scale and alpha. A 1x1 convolution of the context is added to the first
    convolution's result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int,
        scale: str = "softclamp",
        alpha: float = 1.0,
        edge: str | None = None,
        leaky: float = 0.0,
        scale_map: str | None = None,
        scale_bias: float = 0.0,
        shift_after: bool = False,
        context: int = 0,
    ):
        super().__init__()
        if scale_map and scale != "softclamp":
            raise ValueError(f"variant option scale_map={scale_map!r} wants scale='softclamp', got {scale!r}")
        self.scale, self.alpha, self.leaky = scale, alpha, leaky
        self.tied_edge = edge == "ones"
        self.scale_map, self.scale_bias, self.shift_after = scale_map, scale_bias, shift_after
        self.weight1 = nn.Parameter(torch.randn(hidden, in_channels, 3, 3) * 0.05)
        self.norm1 = ActNorm(hidden)
        self.weight2 = nn.Parameter(torch.randn(hidden, hidden, 1, 1) * 0.05)
        self.norm2 = ActNorm(hidden)
        self.weight3 = nn.Parameter(torch.zeros(out_channels, hidden, 3, 3))
        self.bias3 = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))
        indicator = edge == "indicator"
        self.edge1 = nn.Parameter(torch.randn(hidden, 1, 3, 3) * 0.05) if indicator else None
        self.edge3 = nn.Parameter(torch.zeros(out_channels, 1, 3, 3)) if indicator else None
        self.context = nn.Parameter(torch.randn(hidden, context, 1, 1) * 0.05) if context else None

    @torch.no_grad()
    def initialize(self, a: Tensor, context: Tensor | None = None) -> None:
        """Initialise both ActNorms from a batch."""
        h = self._activation(self.norm1.initialize(self._first(a, context)))
        self.norm2.initialize(F.conv2d(h, self.weight2))

    def forward(self, a: Tensor, context: Tensor | None = None) -> Tensor:
        refuse_pruned(self.norm1, self.norm2)
        # ActNorms and the last scale are folded into the convolutions: fewer hidden activations for autograd to keep.
        e1, e2, e3 = torch.exp(self.norm1.log_scale), torch.exp(self.norm2.log_scale), torch.exp(3 * self.logs)
        h = self._activation(self._first(a, context, e1, self.norm1.bias))
        h = self._activation(F.conv2d(h, self.weight2 * _rows(e2), e2 * self.norm2.bias))
        weight3 = self.weight3 * _rows(e3)
        h = F.conv2d(h, weight3, self.bias3 * e3, padding=1)
        if self.tied_edge:
            h = h + edge_term(weight3.sum(dim=1, keepdim=True), *h.shape[2:])
        elif self.edge3 is not None:
            h = h + edge_term(self.edge3 * _rows(e3), *h.shape[2:])
        if self.scale == "additive" or not (self.scale_map or self.shift_after):
            return h
        raw, t = h.to(self.bias3.dtype).chunk(2, dim=1)
        log_s = self._log_scale(raw)
        if self.scale_map:
            # The raw value of which the soft clamp makes log s.
            raw = self.alpha * torch.atanh((log_s / self.alpha).clamp(-1 + 1e-6, 1 - 1e-6))
        if self.shift_after:
            t = t * torch.exp(-log_s)
        return torch.cat([raw, t], dim=1)

    def _first(self, a: Tensor, context: Tensor | None, scale: Tensor | None = None, bias: Tensor | None = None):
        """The first convolution, of a, the border and the context; with scale and bias, scale (. + bias)."""
        rows = 1 if scale is None else _rows(scale)
        a = channels_last_outside_vmap(a)
        h = F.conv2d(a, self.weight1 * rows, None if scale is None else scale * bias, padding=1)
        if self.edge1 is not None:
            h = h + edge_term(self.edge1 * rows, *h.shape[2:])
        return h if self.context is None else h + F.conv2d(context, self.context * rows)

    def _activation(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.leaky) if self.leaky else F.relu(h)

    def _log_scale(self, raw: Tensor) -> Tensor:
        if self.scale_map is None:
            return reference.log_scale(raw, self.scale, self.alpha)
        if self.scale_map == "exp":
            return raw
        if self.scale_map == "inverse_sigmoid":
            return -F.logsigmoid(raw + 2)
        return torch.log(torch.sigmoid(raw + 2) + self.scale_bias) if self.scale_bias else F.logsigmoid(raw + 2)


def _rows(scale: Tensor) -> Tensor:
    return scale[:, None, None, None]
