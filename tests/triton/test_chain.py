"""The reversible chain and Glow on Triton kernels: the reference's values and gradients in every mode."""

import pytest
import torch
from helpers import MODES, VARIANTS, gradients, relative, small_glow

import flowkern

SIZE = (2, 4, 4)


def glows(**options):
    """The same weights on Triton's kernels in fp32, and on the reference in fp64."""
    mine = small_glow(SIZE, levels=1, depth=3, hidden=4, dtype=torch.float32, backend="triton", **options)
    options.pop("memory", None), options.pop("anchor_every", None)
    exact = small_glow(SIZE, levels=1, depth=3, hidden=4, dtype=torch.float32, backend="reference", **options).double()
    return mine, exact


# Modes and variants meet in the other backends' tests: here every mode once, and every variant.
CASES = [("softclamp", *mode) for mode in MODES] + [(v, *MODES[0]) for v in VARIANTS if v != "softclamp"]


@pytest.mark.parametrize("variant,memory,anchor_every", CASES)
def test_gradients_in_every_mode(variant, memory, anchor_every):
    mine, exact = glows(memory=memory, anchor_every=anchor_every, **VARIANTS[variant])
    x = torch.rand(2, *SIZE)
    for direction in (lambda g: g, lambda g: lambda z: g.inverse(z, return_logdet=True)):
        given = x if direction(mine) is mine else mine(x)[0].detach()
        got = gradients(direction(mine), given, list(mine.parameters()))
        wanted = gradients(direction(exact), given.double(), list(exact.parameters()))
        for g, w in zip(got, wanted, strict=True):
            assert relative(g.double(), w) < 2e-5 or (g.double() - w).norm() < 1e-5


def test_log_prob_and_reconstruction():
    mine, exact = glows()
    x = torch.rand(3, 2, 8, 4)
    torch.testing.assert_close(mine.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mine.inverse(mine(x)[0], size=(8, 4)), x, rtol=0, atol=1e-5)


def test_empty_batch():
    """The log-determinants' partial sums have no sample to belong to."""
    glow, _ = glows()
    z, logdet = glow(torch.rand(0, *SIZE))
    assert z.shape == (0, 32) and logdet.shape == (0,)


def test_unfolded_network_trains_on_it():
    def loss(backend):
        torch.manual_seed(0)
        net = flowkern.Unfolded(flowkern.GlowProx(small_glow(SIZE, 1, 1, 4, torch.float32, backend=backend)), folds=1)
        with flowkern.use_backend(backend):
            value = net(torch.rand(2, *SIZE)).square().mean()
            value.backward()
        return [value, *(p.grad for p in net.parameters())]

    torch.testing.assert_close(loss("triton"), loss("reference"), rtol=1e-4, atol=1e-6)


def test_compiled_whole_with_the_same_numbers():
    glow = small_glow(SIZE, levels=1, depth=2, hidden=4, dtype=torch.float32, backend="triton")
    x = torch.rand(2, *SIZE)
    found = []
    for log_prob in (glow.log_prob, torch.compile(glow.log_prob, fullgraph=True, backend="aot_eager")):
        glow.zero_grad(set_to_none=True)
        value = log_prob(x)
        value.sum().backward()
        found.append([value.detach(), *(p.grad for p in glow.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
