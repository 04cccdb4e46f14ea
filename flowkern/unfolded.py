"""The unfolded proximal-gradient network (Wei et al., sections 2.3 and 2.4)."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowkern import ops, saving
from flowkern.operators import Identity
from flowkern.prox import PROXES

INITS = ("mode", "adjoint")
FINALS = ("prox", "consistency")


class Unfolded(nn.Module):
    """K folds of proximal-gradient descent for `y = A x + noise`, each fold with its own prox and step size.

    Fold k, from x: `x~ = x - mu_k A^T (A x - y)` (equation 7, with the gradient's sign: the paper prints
    `x - mu (y - x)`, the same family with mu of the opposite sign), then `x = prox_k(x~)` (equations 8-10).

    prox: one module, copied for each fold, or a sequence of `folds` modules, used as they are.
    tied: the copies of a single prox share their weights; each fold keeps its own mu, lambda and batch norm, whose
        statistics differ from fold to fold. Default: untied, every fold has weights of its own.
    operator: an object with `forward` and `adjoint`, default `Identity()` (denoising).
    init: where x starts: "mode", the prior's most likely image g(0) through fold 1's flow, computed once per batch;
        "adjoint", A^T y; or a function of y. Default: "mode" where the prox has one, else "adjoint".
    final: "prox" ends with the last fold's prox; "consistency" is equation 11 as printed, g(f(x~)) = x~: the last
        fold ends after its data consistency, and its prox, which would cancel, is not run. A plain attribute: it may be
        changed after training.
    mu: where the learnt step sizes start, away from 0: from 0.1 training went nowhere near as far as from 0.5.

    What is kept for backward is a few images per fold and what the proxes keep, which for a `GlowProx` in recompute
    mode is one latent: memory does not grow with the depth of the flow.

    Raises TypeError for a prox, operator or init of the wrong kind, ValueError for wrong values.
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
        mu: float = 0.5,
    ):
        super().__init__()
        if not isinstance(folds, int) or isinstance(folds, bool) or folds < 1:
            raise ValueError(f"folds must be a positive integer, got {folds!r}")
        if not (isinstance(mu, int | float) and math.isfinite(mu)):
            raise ValueError(f"mu must be a finite number, got {mu!r}")
        operator = Identity() if operator is None else operator
        if not (callable(getattr(operator, "forward", None)) and callable(getattr(operator, "adjoint", None))):
            raise TypeError(f"operator must have the methods forward and adjoint, got {type(operator).__name__}")
        self.operator = operator
        self.tied = tied
        self.proxes = nn.ModuleList(_one_per_fold(prox, folds, tied))
        self.mu = nn.Parameter(torch.full((folds,), float(mu)))
        has_mode = hasattr(self.proxes[0], "mode")
        self.init = ("mode" if has_mode else "adjoint") if init is None else init
        if self.init not in INITS and not callable(self.init):
            raise ValueError(f"init must be 'mode', 'adjoint' or a function of y, got {init!r}")
        if self.init == "mode" and not has_mode:
            raise ValueError(
                f"init='mode' needs a prox with a most likely image; {type(self.proxes[0]).__name__} has none"
            )
        self.final = final

    @property
    def final(self) -> str:
        return self._final

    @final.setter
    def final(self, value: str) -> None:
        if value not in FINALS:
            raise ValueError(f"final must be 'prox' or 'consistency', got {value!r}")
        self._final = value

    def forward(self, y: Tensor) -> Tensor:
        """The estimate of x from the measurement y. For denoising y is (N, C, H, W), pixels in [0, 1] plus noise,
        and so is the result; it is not clipped.
        """
        if not isinstance(y, Tensor) or y.ndim != 4 or not y.is_floating_point():
            given = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y must be a floating-point tensor (N, C, H, W), got {given}")
        x = self._start(y)
        last = len(self.proxes) - 1
        for k, prox in enumerate(self.proxes):
            x = self._consistency(x, y, self.mu[k])
            if k < last or self.final == "prox":
                x = prox(x)
        return x

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights and configuration into the folder `path`, made if missing.

        Raises ValueError for what a configuration can't name: an operator other than the identity, a function as
        `init`, or proxes that differ between folds or don't describe themselves with `config`.
        """
        configs = [getattr(prox, "config", None) for prox in self.proxes]
        if (
            not isinstance(self.operator, Identity)
            or self.init not in INITS
            or None in configs
            or any(config != configs[0] for config in configs)
        ):
            raise ValueError(
                "only an Unfolded of alike, library-made proxes, with the identity as operator and a named "
                "init, can be saved with its configuration; save the state_dict of this one"
            )
        config = {
            "folds": len(configs),
            "tied": self.tied,
            "init": self.init,
            "final": self.final,
            "kind": type(self.proxes[0]).__name__,
            "prox": configs[0],
        }
        saving.write(path, self, config)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> "Unfolded":
        """Load what `save_pretrained` wrote. options: of the proxes' networks (for a Glow: memory, backend, ...).

        Raises FileNotFoundError for a missing file, ValueError for a truncated one or one whose tensors don't fit.
        """
        config, weights = saving.read(path, "Unfolded")
        try:
            made = PROXES[config["kind"]].from_config(config["prox"], **options)
            net = cls(
                made, config["folds"], tied=config.get("tied", False), init=config["init"], final=config["final"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold the configuration of an Unfolded: {error}") from error
        dtype = weights["mu"].dtype if "mu" in weights else torch.float32
        saving.fill(net.to(dtype), weights, f"the weights in {path}")
        return net

    def _start(self, y: Tensor) -> Tensor:
        if self.init == "adjoint":
            return self.operator.adjoint(y)
        if self.init == "mode":
            like = self.operator.adjoint(y)
            return self.proxes[0].mode(like).expand_as(like) if len(like) else like
        return self.init(y)

    def _consistency(self, x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        if isinstance(self.operator, Identity):
            return ops.data_consistency(x, y, mu)
        return x - mu * self.operator.adjoint(self.operator.forward(x) - y)


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
    """What a tied copy takes instead of copying, as deepcopy's memo: the inner modules that hold no batch norm."""

    def has_batch_norm(module: nn.Module) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())

    return {id(module): module for module in prox.modules() if module is not prox and not has_batch_norm(module)}
