"""A stand-in for deepinv where it is not installed: the interface that it documents, as far as the adapter uses it.

`modules()` gives the entries of sys.modules that make `import deepinv` find it. test_deepinv.py compares the classes'
signatures with the real package's where that is installed (last: 0.5.0). The physics at the end are ours.
"""

import types

import torch
from torch import nn


class NoiseModel(nn.Module):
    def forward(self, input, **kwargs):
        return input


class ZeroNoise(NoiseModel):
    pass


class GaussianNoise(NoiseModel):
    def __init__(self, sigma=0.1):
        super().__init__()
        self.register_buffer("sigma", torch.as_tensor(sigma))

    def forward(self, x, **kwargs):
        return x + self.sigma * torch.randn_like(x)


class Physics(nn.Module):
    def __init__(self, A=None, noise_model=None, sensor_model=lambda x: x, solver="gradient_descent", max_iter=50,
                 tol=1e-4):
        super().__init__()
        self.noise_model = noise_model or ZeroNoise()
        self.sensor_model, self.forw, self.solver, self.max_iter, self.tol = sensor_model, A, solver, max_iter, tol

    def forward(self, x, **kwargs):
        return self.sensor_model(self.noise_model(self.A(x, **kwargs), **kwargs))

    def A(self, x, **kwargs):
        return self.forw(x, **kwargs)


class LinearPhysics(Physics):
    def __init__(self, A=lambda x, **kwargs: x, A_adjoint=None, img_size=None, noise_model=None,
                 sensor_model=lambda x: x, max_iter=50, tol=1e-4, solver="lsqr", implicit_backward_solver=True,
                 device="cpu"):
        super().__init__(A, noise_model, sensor_model, solver, max_iter, tol)
        self.A_adj, self.img_size, self.implicit_backward_solver = A_adjoint, img_size, implicit_backward_solver
        self.register_buffer("_device_holder", torch.tensor(0.0, device=device), persistent=False)

    def A_adjoint(self, y, **kwargs):
        return self.A_adj(y, **kwargs)

    def A_adjoint_A(self, x, **kwargs):
        return self.A_adjoint(self.A(x, **kwargs), **kwargs)

    def compute_sqnorm(self, x0, *, max_iter=100, tol=1e-3, verbose=True):
        x = torch.randn_like(x0)
        for _ in range(max_iter):
            x = self.A_adjoint_A(x / x.norm())
        return x.norm()

    def prox_l2(self, z, y, gamma, solver="CG", max_iter=None, tol=None, verbose=False, **kwargs):
        """Conjugate gradients; like the original, it keeps the settings that it is given."""
        self.max_iter = self.max_iter if max_iter is None else max_iter
        self.tol = self.tol if tol is None else tol
        self.solver = solver
        aty = self.A_adjoint(y)
        z = torch.full_like(aty, 0.0 if z is None else z) if not isinstance(z, torch.Tensor) else z

        def dot(a, b):
            return (a * b).flatten(1).sum(1)[:, None, None, None]

        b = aty + z / gamma
        x, residual = z, b - self.A_adjoint_A(z) - z / gamma
        p, old = residual, dot(residual, residual)
        for _ in range(self.max_iter):
            q = self.A_adjoint_A(p) + p / gamma
            alpha = old / dot(p, q).clamp_min(1e-300)
            x, residual = x + alpha * p, residual - alpha * q
            new = dot(residual, residual)
            if bool((new.sqrt() <= self.tol * dot(b, b).sqrt()).all()):
                break
            p, old = residual + new / old.clamp_min(1e-300) * p, new
        return x

    def A_dagger(self, y, solver="CG", max_iter=None, tol=None, verbose=False, **kwargs):
        return LinearPhysics.prox_l2(self, None, y, 1e8, solver, max_iter, tol)


class DecomposablePhysics(LinearPhysics):
    """A = diag(mask), the only decomposition here."""

    def __init__(self, mask, **options):
        super().__init__(**options)
        self.register_buffer("mask", mask)

    def A(self, x, mask=None, **kwargs):
        return x * self.mask

    def A_adjoint(self, y, mask=None, **kwargs):
        return y * self.mask

    def prox_l2(self, z, y, gamma, **kwargs):
        b = self.A_adjoint(y) if z is None else self.A_adjoint(y) + 1 / gamma * z
        return b / (self.mask**2 + 1 / gamma)


class Inpainting(DecomposablePhysics):
    def __init__(self, img_size, mask=None, noise_model=None):
        super().__init__(mask[None], img_size=img_size, noise_model=noise_model)


class Potential(nn.Module):
    def __init__(self, fn=None):
        super().__init__()
        self._fn = fn

    def fn(self, x, *args, **kwargs):
        return self._fn(x, *args, **kwargs)

    def forward(self, x, *args, **kwargs):
        return self.fn(x, *args, **kwargs)

    def grad(self, x, *args, **kwargs):
        raise NotImplementedError

    def prox(self, x, *args, gamma=1.0, stepsize_inter=1.0, max_iter_inter=50, tol_inter=1e-3, **kwargs):
        raise NotImplementedError


class Prior(Potential):
    def __init__(self, g=None, *args, **kwargs):
        super().__init__(*args, fn=g, **kwargs)
        self.explicit_prior = g is not None


class Denoiser(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.to(device)

    def forward(self, x, sigma, **kwargs):
        raise NotImplementedError


class Reconstructor(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.to(device)

    def forward(self, y, physics, **kwargs):
        raise NotImplementedError


CLASSES = {
    "physics": (Physics, LinearPhysics, DecomposablePhysics, Inpainting, GaussianNoise),
    "optim": (Prior,),
    "models": (Denoiser, Reconstructor),
}


def modules():
    """{"deepinv": ..., "deepinv.physics": ..., ...}, for sys.modules."""
    package = types.ModuleType("deepinv")
    package.__version__, package.__path__ = "stand-in", []
    found = {"deepinv": package}
    for name, classes in CLASSES.items():
        module = found[f"deepinv.{name}"] = types.ModuleType(f"deepinv.{name}")
        vars(module).update({kind.__name__: kind for kind in classes})
        setattr(package, name, module)
    return found
