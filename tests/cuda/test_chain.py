"""The reversible chain, Glow and the composition on the emulated kernels: the reference's values and gradients."""

import dataclasses

import pytest
import torch
from helpers import MODES, VARIANTS, gradients, relative, small_glow

from flowkern import backend as backends

SIZE = (3, 4, 4)


@pytest.fixture(autouse=True)
def on_cpu(backend, monkeypatch):
    """The backend registered as one that runs here and serves CPU tensors."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    monkeypatch.setattr(backends, "_tables", {})
    backends.register(dataclasses.replace(backends._registry["cuda"], devices=("cpu",), probe=lambda: None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory,anchor_every", MODES)
def test_gradients_in_every_mode(variant, memory, anchor_every, dtype):
    options = VARIANTS[variant]
    mine = small_glow(SIZE, 1, 3, 4, torch.float32, backend="cuda", memory=memory, anchor_every=anchor_every, **options)
    exact = small_glow(SIZE, 1, 3, 4, torch.float32, backend="reference", **options).double()
    mine, limit = mine.to(dtype), 2e-5 if dtype == torch.float32 else 1e-12
    x = torch.rand(2, *SIZE, dtype=dtype)
    for direction in (lambda g: g, lambda g: lambda z: g.inverse(z, return_logdet=True)):
        given = x if direction(mine) is mine else mine(x)[0].detach()
        got = gradients(direction(mine), given, list(mine.parameters()))
        wanted = gradients(direction(exact), given.double(), list(exact.parameters()))
        for g, w in zip(got, wanted, strict=True):
            assert relative(g.double(), w) < limit or (g.double() - w).norm() < limit


def test_log_prob_and_reconstruction():
    mine = small_glow(SIZE, 2, 2, 4, torch.float32, backend="cuda")
    exact = small_glow(SIZE, 2, 2, 4, torch.float32, backend="reference").double()
    x = torch.rand(3, 3, 8, 4)
    torch.testing.assert_close(mine.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mine.inverse(mine(x)[0], size=(8, 4)), x, rtol=0, atol=1e-5)
