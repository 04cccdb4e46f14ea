"""The unfolded proximal-gradient network (Wei et al., sections 2.3 and 2.4)."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkern import folds, saving, transforms
from flowkern.checks import per_image
from flowkern.consistency import exact_step, gradient_step, is_pure
from flowkern.layout import in_order_of
from flowkern.operators import Identity, Operator, least_variation, smoothest
from flowkern.operators import from_config as operator_from_config
from flowkern.operators.base import check_exact, check_operator
from flowkern.prox import PROXES, inverse_softplus

INITS = ("mode", "adjoint", "smooth", "tv")
FINALS = ("prox", "consistency")
CONSISTENCIES = ("gradient", "exact")


class Unfolded(nn.Module):
    """K folds of proximal-gradient descent for `y = A x + noise`, each fold with its own prox and step size.

    Fold k, from x: `x~ = x - mu_k A^T (A x - y)` (equation 7, with the gradient's sign: the paper prints
    `x - mu (y - x)`, the same family with mu of the opposite sign), then `x = prox_k(x~)` (equations 8-10).

    prox: one module, copied for each fold, or a sequence of `folds` modules, used as they are.
    tied: the copies of a single prox share their weights; each fold keeps its own mu, lambda and batch norm, whose
        statistics differ from fold to fold. Default: untied, every fold has weights of its own.
    operator: an object with `forward` and `adjoint`, default `Identity()` (denoising); see `flowkern.operators`. One
        that is a module moves and is saved with the network, and what it learns is trained along.
    init: where x starts: "mode", the prior's most likely image g(0) through fold 1's flow, computed once per batch;
        "adjoint", A^T y, which is dim or empty where A averages or loses pixels (divided by factor^2 behind
        `Downsample`, black in the holes of `Inpainting`); "smooth", the smoothest image that fits y
        (`flowkern.operators.smoothest`), for incomplete measurements with little noise; "tv", the one of least total
        variation (`flowkern.operators.least_variation`), which keeps edges; or a function of y. Default: "mode" where
        the prox has one, else "adjoint".
    final: "prox" ends with the last fold's prox; "consistency" is equation 11 as printed, g(f(x~)) = x~: the last
        fold ends after its data consistency, and its prox, which would cancel, is not run. A plain attribute: it may be
        changed after training.
    consistency: "gradient", the step above; or "exact", for an operator with `normal_inverse` or `prox`: x~ is the
        image that minimises `||A x~ - y||^2 + rho_k ||x~ - x||^2`, with rho_k = softplus(raw_rho_k) learnt instead of
        mu_k. rho starts at ||A||^2, from where the residual is halved in A's strongest direction as it is by mu's
        default.
    mu: where the learnt step sizes start, away from 0: from 0.1 denoising went nowhere near as far as from 0.5.
        Default: 0.5 / ||A||^2, a quarter of the step from which on the residual may grow; it is 0.5 for denoising.
        ||A|| is `operator.norm(size)` for the size of the Glow, if there is one; an operator without `norm` is taken to
        have norm 1.
    noise_aware: the network is told the noise level, `net(y, sigma=...)`, and scales its lambdas by
        (sigma / sigma_ref)^2, so that one network serves a range of levels: the square is how the prior's weight grows
        in the posterior. It needs proxes with a lambda, as `GlowProx`. sigma_ref: where the lambdas are as learnt.
        The default is the level at which the paper trains.

    kept_images: what is kept for backward. None: what the proxes keep, which for a `GlowProx` in recompute mode is its
        result, an image a fold, whatever the depth of the flow; data consistency adds nothing to it with the operators
        of `flowkern.operators` (and those registered in OPERATORS), whose steps are computed again in backward; a
        user's own operator is differentiated by autograd, and keeps what that keeps. A number: so many of the images
        between folds, however many folds there are, and no more of what proxes and operators keep than one fold does.
        Folds are evaluated again for it, `flowkern.folds.evaluated_again(folds, kept_images)` times in all. Gradients
        are those of None; there is no second derivative, and under torch.compile and torch.func it is as None. A plain
        attribute that is not saved.

    Raises TypeError for a prox or operator of the wrong kind, exact consistency with an operator that has none,
    and noise awareness with a prox that has none, ValueError for wrong values.
    """

    def __init__(
        self,
        prox: nn.Module | Sequence[nn.Module],
        folds: int = 4,
        operator=None,
        *,
        tied: bool = False,
        init: str | Callable[[Tensor], Tensor] | None = None,
        final: str = "prox",
        consistency: str = "gradient",
        mu: float | None = None,
        noise_aware: bool = False,
        sigma_ref: float = 0.2,
        kept_images: int | None = None,
    ):
        super().__init__()
        if not isinstance(folds, int) or isinstance(folds, bool) or folds < 1:
            raise ValueError(f"folds must be a positive integer, got {folds!r}")
        if mu is not None and not (isinstance(mu, int | float) and math.isfinite(mu)):
            raise ValueError(f"mu must be a finite number, got {mu!r}")
        if consistency not in CONSISTENCIES:
            raise ValueError(f"consistency must be 'gradient' or 'exact', got {consistency!r}")
        if consistency == "exact" and mu is not None:
            raise ValueError(f"exact consistency learns rho and has no step size mu, got mu={mu!r}")
        if not (isinstance(sigma_ref, int | float) and 0 < sigma_ref < math.inf):
            raise ValueError(f"sigma_ref must be a positive number, got {sigma_ref!r}")
        operator = Identity() if operator is None else operator
        check_operator(operator)
        if consistency == "exact":
            check_exact(operator)
        self.operator = operator
        self.consistency = consistency
        self.tied = tied
        self.proxes = nn.ModuleList(_one_per_fold(prox, folds, tied))
        gain = _norm(operator, self.proxes[0]) ** 2 if mu is None else None
        exact = consistency == "exact"
        # One of the two: a parameter that is not used would have no gradient, which DDP waits for.
        like = next((p for p in self.proxes.parameters() if p.is_floating_point()), torch.empty(0))
        every = partial(torch.full, (folds,), dtype=like.dtype, device=like.device)
        self.mu = None if exact else nn.Parameter(every(float(0.5 / gain if mu is None else mu)))
        self.raw_rho = nn.Parameter(every(inverse_softplus(gain))) if exact else None
        has_mode = hasattr(self.proxes[0], "mode")
        self.init = ("mode" if has_mode else "adjoint") if init is None else init
        if self.init not in INITS and not callable(self.init):
            raise ValueError(f"init must be 'mode', 'adjoint', 'smooth', 'tv' or a function of y, got {init!r}")
        if self.init == "mode" and not has_mode:
            raise ValueError(
                f"init='mode' needs a prox with a most likely image; {type(self.proxes[0]).__name__} has none"
            )
        self.final = final
        without = [type(prox).__name__ for prox in self.proxes if not hasattr(prox, "lam")]
        if noise_aware and without:
            raise TypeError(f"noise_aware=True scales the lambda of a prox; {without[0]} has none")
        self.noise_aware, self.sigma_ref = bool(noise_aware), float(sigma_ref)
        self.kept_images = kept_images

    @property
    def rho(self) -> Tensor | None:
        """The learnt weights (folds,) of exact data consistency, None with gradient steps."""
        return None if self.raw_rho is None else F.softplus(self.raw_rho)

    @property
    def final(self) -> str:
        return self._final

    @final.setter
    def final(self, value: str) -> None:
        if value not in FINALS:
            raise ValueError(f"final must be 'prox' or 'consistency', got {value!r}")
        self._final = value

    @property
    def kept_images(self) -> int | None:
        """How many of the images between folds are kept for backward; None: all, and all else that folds keep."""
        return self._kept_images

    @kept_images.setter
    def kept_images(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"kept_images must be an int >= 1 or None, got {value!r}")
        self._kept_images = value

    def forward(
        self,
        y: Tensor,
        *,
        sigma: float | Tensor | None = None,
        operator=None,
        return_log_prob: bool = False,
    ):
        """The estimate of x (N, C, H, W) from the measurement y; it is not clipped.

        y: what the operator's `forward` gives, N first; for denoising (N, C, H, W), pixels in [0, 1] plus noise.
        sigma: the standard deviation of the noise in y, in y's units, >= 0: a number or a tensor of one, or one an
        image (N,). For a network with noise_aware=True, which wants it, and for no other.
        operator: what y was measured with, in place of the network's own: where each image has a mask or kernel of its
        own. The learnt steps stay as they are, so it should be of the same kind and norm.
        return_log_prob: return (estimate, log_prob), log_prob (proxes that ran, N) in nats: of the image x~ of each
        fold under its flow. Trained along with a small weight it keeps each flow a density; the error alone does not,
        as it stays the same when a flow scales its latents and its inverse scales them back.

        Raises ValueError for a y or sigma that does not fit, TypeError for what is no operator, or one that exact
        consistency can't use, and for return_log_prob with proxes that have no density.
        """
        operator = self.operator if operator is None else operator
        check_operator(operator)
        self._check(y, operator)
        without = [type(prox).__name__ for prox in self.proxes if return_log_prob and not hasattr(prox, "glow")]
        if without:
            raise TypeError(f"return_log_prob=True wants proxes with a density, as GlowProx; {without[0]} has none")
        scale = self._scale(sigma, y)
        x = self._start(y, operator)
        fold = partial(self._fold, operator=operator, return_log_prob=return_log_prob)
        weights = self.mu if self.raw_rho is None else self.raw_rho
        if self.kept_images is not None and torch.is_grad_enabled() and not transforms.is_traced():
            own = _modules_of(operator)
            modules = [[prox, *own] for prox in self.proxes]
            fixed = own if is_pure(operator) else []
            shared = [y, weights] if scale is None else [y, weights, torch.as_tensor(scale).to(weights)]
            x, log_probs = folds.unfold(fold, modules, x, *shared, kept=self.kept_images, fixed=fixed)
        else:
            log_probs = []
            for k in range(len(self.proxes)):
                if k == 1 and type(operator) is Identity:
                    y = in_order_of(y, x)  # as the proxes lay images out: once for all folds, each of which keeps it
                x, log_prob = fold(k, x, y, weights, scale)
                if log_prob is not None:
                    log_probs.append(log_prob)
        if return_log_prob:
            return x, torch.stack(log_probs) if log_probs else x.new_zeros(0, len(x))
        return x

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights and configuration into the folder `path`, made if missing.

        Raises ValueError for what a configuration can't name: an operator that has none, a function as `init`, proxes
        that differ between folds or are not the library's, or a Glow with coupling networks of the user's own.
        """
        configs = [getattr(prox, "config", None) for prox in self.proxes]
        operator = getattr(self.operator, "config", None) if isinstance(self.operator, Operator) else None
        if (
            operator is None
            or self.init not in INITS
            or None in configs
            or any(PROXES.get(type(prox).__name__) is not type(prox) for prox in self.proxes)
            or any(config != configs[0] for config in configs)
        ):
            raise ValueError(
                "only an Unfolded of alike, library-made proxes, with an operator that has a configuration and a named "
                "init, can be saved with its configuration; save the state_dict of this one"
            )
        config = {
            "folds": len(configs),
            "tied": self.tied,
            "operator": operator,
            "init": self.init,
            "final": self.final,
            "consistency": self.consistency,
            "noise_aware": self.noise_aware,
            "sigma_ref": self.sigma_ref,
            "kind": type(self.proxes[0]).__name__,
            "prox": configs[0],
        }
        saving.write(path, self, config)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, kept_images: int | None = None, **options) -> "Unfolded":
        """Load what `save_pretrained` wrote. options: of the proxes' networks (for a Glow: memory, backend, ...).

        Raises FileNotFoundError for a missing file, ValueError for a truncated one or one whose tensors don't fit,
        TypeError or ValueError for unknown options or values out of range.
        """
        config, weights = saving.read(path, "Unfolded")
        try:
            made = PROXES[config["kind"]].from_config(config["prox"])
            # Folders written before there were operators, or the choices below, hold none.
            later = ("tied", "consistency", "noise_aware", "sigma_ref")
            net = cls(
                made,
                config["folds"],
                operator_from_config(config.get("operator", {"kind": "Identity"})),
                init=config["init"],
                final=config["final"],
                # mu is among the weights: no norm of an operator that is still to be filled.
                mu=None if config.get("consistency") == "exact" else 0.5,
                kept_images=kept_images,
                **{name: config[name] for name in later if name in config},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold the configuration of an Unfolded: {error}") from error
        for prox in net.proxes:
            prox.set_options(**options)
        dtype = next((weights[name].dtype for name in ("mu", "raw_rho") if name in weights), torch.float32)
        saving.fill(net.to(dtype), weights, f"the weights in {path}")
        return net

    def _check(self, y: Tensor, operator) -> None:
        """Raises ValueError for what can't be a measurement; the operator knows more."""
        images = type(operator) is Identity
        numbers = isinstance(y, Tensor) and (y.is_floating_point() or (y.is_complex() and not images))
        if not numbers or (images and y.ndim != 4):
            given = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y must be a floating-point tensor{' (N, C, H, W)' if images else ''}, got {given}")

    def _scale(self, sigma: float | Tensor | None, y: Tensor) -> float | Tensor | None:
        """The factor of every lambda: a number or (N,) like sigma, None where the network is not told sigma."""
        if not self.noise_aware:
            if sigma is not None:
                raise ValueError("sigma is for a network made with noise_aware=True, and this one was not")
            return None
        if sigma is None:
            raise ValueError("this network was made with noise_aware=True and wants the noise level, net(y, sigma=...)")
        sigma = per_image(sigma, "sigma", len(y))
        if isinstance(sigma, Tensor):
            sigma = sigma.to(self.mu if self.raw_rho is None else self.raw_rho)
        return (sigma / self.sigma_ref) ** 2

    def _start(self, y: Tensor, operator) -> Tensor:
        if self.init == "adjoint":
            x = operator.adjoint(y)
            return x.view_as(x) if x is y else x  # torch.compile refuses one tensor as both of a step's arguments
        if self.init == "smooth":
            return smoothest(operator, y)
        if self.init == "tv":
            return least_variation(operator, y)
        if self.init == "mode":
            like = operator.adjoint(y)
            return self.proxes[0].mode(like).expand_as(like) if len(like) else like
        return self.init(y)

    def _fold(
        self,
        k: int,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        scale: float | Tensor | None = None,
        *,
        operator,
        return_log_prob: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x after fold k, and log p (N,) of the image that its prox was given, or None. weights: mu or raw_rho."""
        if self.consistency == "exact":
            x = exact_step(operator, x, y, F.softplus(weights[k]))
        else:
            x = gradient_step(operator, x, y, weights[k])
        if k == len(self.proxes) - 1 and self.final == "consistency":
            return x, None
        options = {} if scale is None else {"scale": scale}
        if return_log_prob:
            return self.proxes[k](x, return_log_prob=True, **options)
        return self.proxes[k](x, **options), None


def _modules_of(operator) -> list[nn.Module]:
    """The operator, if it is a module. Raises ValueError where it, or an operator in it, is trained and no module says
    so.
    """
    modules = [*operator.modules()] if isinstance(operator, nn.Module) else [operator]
    # Buffers of what is not known to leave them alone are those of now, without gradients.
    places = ("__dict__",) if is_pure(operator) else ("__dict__", "_buffers")
    for part in (*modules, *(inner for module in modules for inner in _inner_operators(module))):
        # Weight norm and pruning put what they make of their parameters beside them.
        names, ends = getattr(part, "_parameters", {}), ("_g", "_v", "_orig")
        made = {name.removesuffix(end) for name in names for end in ends if name.endswith(end)}
        tensors = {name: t for place in places for name, t in getattr(part, place, {}).items() if name not in made}
        held = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
        if held:
            raise ValueError(
                "with kept_images, what an operator learns must be a parameter of an nn.Module; "
                f"{type(part).__name__} has a {held[0]} that requires a gradient and is none"
            )
    return [operator] if isinstance(operator, nn.Module) else []


def _inner_operators(module) -> Sequence:
    found = getattr(module, "operators", ())
    return found if isinstance(found, list | tuple) else ()


def _norm(operator, prox: nn.Module) -> float:
    """||A||, on images of the size that the prox's Glow was made for if there is one; 1 if the operator can't tell."""
    if not callable(getattr(operator, "norm", None)):
        return 1.0
    try:
        norm = operator.norm(getattr(getattr(prox, "glow", None), "size", None))
    except (ValueError, RuntimeError):  # an operator for another size: a Glow takes any
        try:
            norm = operator.norm()
        except (ValueError, RuntimeError):  # and for none that it knows
            return 1.0
    return norm if 0 < norm < math.inf else 1.0


def _one_per_fold(prox, folds: int, tied: bool) -> list[nn.Module]:
    if isinstance(prox, nn.Module) and not isinstance(prox, nn.ModuleList):
        first = copy.deepcopy(prox)
        return [first, *(copy.deepcopy(first, _shared(first) if tied else {}) for _ in range(folds - 1))]
    if not isinstance(prox, Sequence | nn.ModuleList) or not all(isinstance(p, nn.Module) for p in prox):
        raise TypeError(f"prox must be a module, or a sequence of one module a fold, got {type(prox).__name__}")
    if tied:
        raise ValueError("tied=True shares the weights of a single prox; got a sequence of modules")
    if len(prox) != folds:
        raise ValueError(f"got {len(prox)} prox modules for {folds} folds; pass one a fold, or a single one to copy")
    return list(prox)


def _shared(prox: nn.Module) -> dict[int, nn.Module]:
    """What a tied copy takes instead of copying, as deepcopy's memo: the inner modules that hold no batch norm, and of
    the others the parameters, but for batch norms' and the prox's lambda.
    """
    norms = nn.modules.batchnorm._BatchNorm
    split = [m for m in prox.modules() if m is prox or any(isinstance(inner, norms) for inner in m.modules())]
    whole = [m for m in prox.modules() if m not in split]
    loose = [
        parameter
        for module in split
        if not isinstance(module, norms)
        for name, parameter in module.named_parameters(recurse=False)
        if not (module is prox and name == "raw_lam")
    ]
    return {id(shared): shared for shared in (*whole, *loose)}
