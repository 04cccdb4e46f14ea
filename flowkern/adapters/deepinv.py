"""deepinv, in both directions: its physics as an operator and our operators as its physics; a Glow as its prior, and
proxes and trained networks as its denoisers and reconstructors.

    net = flowkern.Unfolded(flowkern.GlowProx(glow), operator=Operator(deepinv.physics.Demosaicing((3, 64, 64))))
    model = deepinv.optim.GD(data_fidelity=deepinv.optim.L2(sigma=0.05), prior=Prior(glow), stepsize=1e-4)
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkern import operators
from flowkern.glow import Glow
from flowkern.map import _LBFGS
from flowkern.operators.base import check_operator, checked_size, is_exact, per_image_rho
from flowkern.replay import fixed
from flowkern.unfolded import Unfolded

try:
    from deepinv.models import Denoiser as _Denoiser
    from deepinv.models import Reconstructor as _Reconstructor
    from deepinv.optim import Prior as _Prior
    from deepinv.physics import LinearPhysics
except (ImportError, RuntimeError) as error:  # a torchvision made for another PyTorch raises RuntimeError
    raise ImportError(
        "flowkern.adapters.deepinv needs deepinv, and deepinv a torchvision that was built for the installed PyTorch: "
        "take those two from one index (pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu,"
        f" or the one of your CUDA), then pip install deepinv; here: {error}"
    ) from error


class Operator(operators.Operator):
    """A deepinv LinearPhysics as an operator: `forward` is its A and `adjoint` its A_adjoint, without noise or sensor.

    size: (C, H, W) of the images; default: the physics' img_size, where it has one. images: for how many images the
    physics holds parameters of their own.
    There is `normal_inverse` where the size is known and the physics' prox_l2 is exact without iterating: it is tried
    on one image here, because some of deepinv's closed forms hold under conditions that nothing tells.
    iterative: offer `normal_inverse` in any case, by prox_l2 with its solver, as exact as max_iter and tol make it.
    The norm is measured by power iteration. A physics' parameters move with the operator and are in its state_dict;
    there is no `config`.

    Raises TypeError for what is no LinearPhysics.
    """

    def __init__(
        self, physics: LinearPhysics, *, size: Sequence[int] | None = None, images: int = 1, iterative: bool = False
    ):
        super().__init__()
        if not isinstance(physics, LinearPhysics):
            raise TypeError(f"physics must be a deepinv.physics.LinearPhysics, got {type(physics).__name__}")
        self.physics, self.images = physics, images
        if size is None:
            size = getattr(physics, "img_size", None)
            self.size = tuple(map(int, size)) if size is not None and len(size) == 3 else None
        else:
            self.size = checked_size(size)
        self._solves = iterative or (self.size is not None and self._exact())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> A x."""
        y = self.physics.A(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"measurements must be one tensor, and those of {self._name} are a {type(y).__name__}")
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """y -> A^T y (N, C, H, W)."""
        return self.physics.A_adjoint(y)

    def measure(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> what the physics measures, A x with its noise and sensor."""
        return self.physics(x)

    def norm(self, size: Sequence[int] | None = None) -> float:
        """As in flowkern's operators. Raises ValueError for a size that the physics can't measure."""
        try:
            return super().norm(size)
        except (RuntimeError, IndexError, AssertionError) as error:
            size = self.size or (1, 64, 64) if size is None else tuple(size)
            raise ValueError(f"{self._name} does not measure images of size {size}: {error}") from error

    @property
    def normal_inverse(self):
        """`normal_inverse(b, rho)`, see the class."""
        if not self._solves:
            raise AttributeError(f"{self._name} has no exact normal_inverse that is known of")
        return self._normal_inverse

    @property
    def _name(self) -> str:
        return type(self.physics).__name__

    def _normal_inverse(self, b: Tensor, rho: float | Tensor, **options) -> Tensor:
        # prox_l2(z, y, gamma) minimises gamma / 2 ||A v - y||^2 + 1/2 ||v - z||^2.
        rho = per_image_rho(rho, b)
        with torch.no_grad():
            nothing = torch.zeros_like(self.forward(b))
        gamma = 1 / rho
        if isinstance(gamma, Tensor) and gamma.numel() == 1:
            gamma = gamma.reshape(())  # deepinv's solvers want () or one an image
        return self.physics.prox_l2(b / rho, nothing, gamma, **options)

    @torch.no_grad()
    def _exact(self) -> bool:
        """Whether the physics' prox_l2 is right when it may iterate but once, as closed forms are."""
        physics = self.physics
        like = next((t for t in [*physics.parameters(), *physics.buffers()] if t.is_floating_point()), torch.zeros(()))
        b = torch.randn(self.images, *self.size, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        settings = {name: getattr(physics, name) for name in ("max_iter", "tol", "solver") if hasattr(physics, name)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                v = self._normal_inverse(b, 0.5, max_iter=1)
                off = self.adjoint(self.forward(v)) + 0.5 * v - b
        except Exception:  # whatever it is, this is no prox_l2 to rely on
            return False
        finally:
            for name, value in settings.items():  # LinearPhysics.prox_l2 keeps what it is given
                setattr(physics, name, value)
        return bool(off.norm() <= 1e-3 * b.norm())


class Physics(LinearPhysics):
    """An operator as a deepinv LinearPhysics: any object with `forward` and `adjoint`.

    Where the operator has `normal_inverse` or `prox`, prox_l2 is exact; elsewhere it is LinearPhysics' own, by
    iteration, and so is A_dagger everywhere. The operator's parameters are its own: those that deepinv passes to A are
    ignored.
    options: of LinearPhysics (img_size, max_iter, ...); img_size defaults to the operator's size. noise_model: default,
    no noise.

    Raises TypeError for what is no operator.
    """

    def __init__(self, operator, noise_model: nn.Module | None = None, **options):
        check_operator(operator)
        noise = {} if noise_model is None else {"noise_model": noise_model}
        super().__init__(**{"img_size": getattr(operator, "size", None)} | noise | options)
        self.operator = operator

    def A(self, x: Tensor, **kwargs) -> Tensor:
        """x (N, C, H, W) -> A x."""
        return self.operator.forward(x)

    def A_adjoint(self, y: Tensor, **kwargs) -> Tensor:
        """y -> A^T y (N, C, H, W)."""
        return self.operator.adjoint(y)

    def prox_l2(self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, *args, **kwargs) -> Tensor:
        """The image v that minimises `gamma / 2 ||A v - y||^2 + 1/2 ||v - z||^2`. z may be None or a number, an even
        image. gamma: a positive number, or a tensor of one or of one an image. The rest is for the iteration.
        """
        if not is_exact(self.operator):
            gamma = _per_image(gamma)
            gamma = gamma[:, None, None, None] if isinstance(gamma, Tensor) and gamma.ndim else gamma
            return super().prox_l2(z, y, gamma, *args, **kwargs)
        if not isinstance(z, Tensor) or z.ndim < 4 or len(z) != len(y):
            z = torch.zeros_like(self.operator.adjoint(y)) + (0 if z is None else z)
        return operators.exact_consistency(self.operator, z, y, 1 / _per_image(gamma))


class Prior(_Prior):
    """A Glow as an explicit prior: g(x) = -log p(x) of each image (N,), in nats, the density that of the pixels given.

    The posterior's negative logarithm for noise of standard deviation sigma is `L2(sigma=sigma)` plus this with
    lambda = 1, or `L2()` plus this with lambda = sigma^2. The density's gradient is steep (some 1/s^2 where images
    deviate by s from the likely ones), and so steps are short, or taken back by backtracking.

    grad: with a graph, to train through, for an x that requires gradients or in memory="store", which it then needs.
    prox: the minimiser of `gamma g(u) + 1/2 ||u - x||^2` for each image, for gamma = sigma^2 the most likely image
    behind the noise; by L-BFGS from x (max_iter_inter evaluations), so that it is a local one, never worse than x, and
    not differentiable. `GlowProx` is the cheap step among latents, in place of this one: see `Denoiser`.
    context: of a conditioned Glow, one an image. g_param and what else deepinv passes is ignored.

    Raises TypeError for what is no Glow.
    """

    def __init__(self, glow: Glow, context: Tensor | None = None):
        super().__init__()
        if not isinstance(glow, Glow):
            raise TypeError(f"glow must be a flowkern.Glow, got {type(glow).__name__}")
        self.explicit_prior = True
        self.glow = glow
        self.register_buffer("context", context, persistent=False)

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (N, C, H, W) -> (N,); differentiable in x and the Glow's parameters."""
        return -self.glow.log_prob(x, self.context)

    def grad(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (N, C, H, W) -> the gradient of `fn`, (N, C, H, W)."""
        if torch.is_grad_enabled() and (x.requires_grad or self.glow.memory == "store"):
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.fn(x).sum(), x, create_graph=True)[0]
        with torch.inference_mode(False), torch.enable_grad(), fixed(self.glow):
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.fn(x).sum(), x)[0]

    def prox(self, x: Tensor, *args, gamma: float | Tensor = 1.0, max_iter_inter: int = 50, **kwargs) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W), see the class. gamma: > 0, a number or a tensor of one or of one an image.

        Raises RuntimeError where gradients through it are asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "the prox of a Glow prior is a search and has no gradients; call it under torch.no_grad(), or unfold "
                "with its grad, or with flowkern.Unfolded"
            )
        with torch.inference_mode(False), torch.enable_grad(), fixed(self.glow):
            x = x.detach().clone()
            gamma = per_image_rho(_per_image(gamma), x.flatten(1))
            gamma = gamma[:, 0] if isinstance(gamma, Tensor) else gamma
            u, best, lowest = x.flatten(1), x, torch.full_like(x[:, 0, 0, 0], math.inf)
            stepper = _LBFGS(u, 0.1)
            for _ in range(max_iter_inter):
                image = u.reshape(x.shape).requires_grad_()
                objective = gamma * self.fn(image) + 0.5 * (image - x).square().flatten(1).sum(dim=1)
                slope = torch.autograd.grad(objective.sum(), image)[0].flatten(1)
                image, objective = image.detach(), objective.detach()
                good = objective.isfinite() & slope.isfinite().all(dim=1)
                better = good & (objective < lowest)
                best = torch.where(better[:, None, None, None], image, best)
                lowest = torch.where(better, objective, lowest)
                u = stepper(u, objective, slope, good).detach()
        return best


class Denoiser(_Denoiser):
    """A prox or a network trained to denoise, as a denoiser of deepinv's: `denoiser(x, sigma)`, for plug-and-play.

    model: a prox of `flowkern.prox`; or an `Unfolded` of the identity, which is told sigma if it is noise-aware. A
    `GlowProx` scales its lambda by (sigma / sigma_ref)^2, as noise-aware networks do. Others denoise the level that
    they were trained on, whatever sigma.

    Raises TypeError for what is no module, ValueError for an `Unfolded` of another operator.
    """

    def __init__(self, model: nn.Module, sigma_ref: float = 0.2):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a prox or an Unfolded, got {type(model).__name__}")
        if isinstance(model, Unfolded) and not isinstance(model.operator, operators.Identity):
            raise ValueError(f"a denoiser's operator is the identity, not {type(model.operator).__name__}")
        if not (isinstance(sigma_ref, int | float) and 0 < sigma_ref < math.inf):
            raise ValueError(f"sigma_ref must be a positive number, got {sigma_ref!r}")
        self.model, self.sigma_ref = model, float(sigma_ref)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None, **kwargs) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W). sigma: a number, or a tensor of one or of one an image; None: as learnt."""
        sigma = _per_image(sigma)
        if isinstance(self.model, Unfolded):
            return self.model(x, sigma=sigma) if self.model.noise_aware else self.model(x)
        if sigma is None or not hasattr(self.model, "lam"):
            return self.model(x)
        sigma = sigma.to(self.model.lam) if isinstance(sigma, Tensor) else sigma
        return self.model(x, (sigma / self.sigma_ref) ** 2)


class Reconstructor(_Reconstructor):
    """A trained `Unfolded` as a reconstructor of deepinv's: `model(y, physics)`.

    The network reconstructs by the operator that it was trained with, and checks that the physics is that operator: its
    shapes, and its measurement of a test pattern. given: reconstruct by the physics that is given instead, where its
    shapes are the trained operator's; another mask or kernel is then like any data that the network hasn't seen.
    A noise-aware network is told `sigma`, by default the physics' `noise_model.sigma`.

    Raises TypeError for what is no `Unfolded`; when used, ValueError for a physics that doesn't fit.
    """

    def __init__(self, net: Unfolded, given: bool = False):
        super().__init__()
        if not isinstance(net, Unfolded):
            raise TypeError(f"net must be a flowkern.Unfolded, got {type(net).__name__}")
        self.net, self.given = net, given

    def forward(self, y: Tensor, physics: LinearPhysics, sigma: float | Tensor | None = None, **kwargs) -> Tensor:
        """The estimate of x (N, C, H, W) from the measurement y; it is not clipped."""
        net, size = self.net, self._check(y, physics)
        operator = None
        if self.given:
            operator = Operator(physics, size=size if net.consistency == "exact" else None)
        if not net.noise_aware:
            return net(y, operator=operator)
        sigma = getattr(getattr(physics, "noise_model", None), "sigma", None) if sigma is None else sigma
        return net(y, sigma=_per_image(sigma), operator=operator)

    @torch.no_grad()
    def _check(self, y: Tensor, physics: LinearPhysics) -> tuple[int, ...]:
        """The size of the images. Raises ValueError where the physics is not what the network was trained for."""
        trained = self.net.operator
        x = _pattern(trained.adjoint(y))
        if isinstance(physics, Physics) and physics.operator is trained:
            return tuple(x.shape[1:])
        name, ours = type(physics).__name__, trained.forward(x)
        asked = f"the network was trained to make images {tuple(x.shape)} of measurements {tuple(ours.shape)}"
        try:
            theirs, back = physics.A(x), physics.A_adjoint(ours)
        except Exception as error:
            raise ValueError(f"{asked}, and the physics given, {name}, fails on them: {error}") from error
        shapes = [tuple(getattr(t, "shape", ())) for t in (back, theirs)]
        if shapes != [tuple(x.shape), tuple(ours.shape)]:
            raise ValueError(f"{asked}, and the physics given, {name}, has {shapes[0]} and {shapes[1]}")
        if not self.given:
            off = float((theirs - ours).norm() / ours.norm().clamp_min(torch.finfo(x.dtype).tiny))
            if off > 1e-2:
                raise ValueError(
                    f"the physics given, {name}, has the shapes of the operator that the network was trained with and "
                    f"other measurements, {off:.0%} off on a test pattern; Reconstructor(net, given=True) goes by it"
                )
        return tuple(x.shape[1:])


def _per_image(value: float | Tensor | Sequence[float] | None) -> float | Tensor | None:
    """A parameter in the shapes that deepinv has for it, (), (1,), (N,) or (N, 1, 1, 1), as a number, (), or (N,)."""
    if value is None or isinstance(value, int | float):
        return value
    value = torch.as_tensor(value).flatten()
    return value[0] if len(value) == 1 else value


def _pattern(like: Tensor) -> Tensor:
    """Images in [0, 1) of the shape of `like` and alike nowhere, the same every time."""
    steps = torch.arange(like.numel(), device=like.device, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    return steps.frac().reshape(like.shape).to(like.real.dtype)
