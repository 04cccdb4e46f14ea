"""Every pixel op of every GPU backend on the GPU, against the specification computed on the CPU."""

import functools

import pytest
import torch
from gpu_device import DEVICE
from pixel_cases import COUPLINGS, FLOAT, MANY_PIXELS, SHAPES, Inputs, arguments, compare, results

import flowkern
from flowkern import backend as backends
from flowkern import mix, reference
from flowkern.layers import StepOfFlow

KERNELS = [name for name in ("triton", "cuda") if flowkern.backends().get(name) is True]
# Raw values up to some 70: beyond 87 a sigmoid scale is a denormal number, which a GPU's exponential rounds to zero.
SPREADS = (1.0, 15.0)
LARGE = ((3, 12, 65, 67), (2, 24, 64, 64), (2, 48, 33, 31), (1, 96, 32, 16), (2, 192, 8, 9))


class OnDevice:
    """A backend's functions, fed from the CPU and read back to it in the same memory layout."""

    def __init__(self, name, dtype=FLOAT):
        self.table = backends.table(DEVICE, name, dtype)

    def __getattr__(self, op):
        def move(value, device):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        def run(*args):
            out = results(getattr(self.table, op), [move(a, DEVICE) for a in args])
            return tuple(move(o, "cpu") for o in out)

        return run


def test_the_backends_run_here():
    assert flowkern.backends()["triton"] is True, flowkern.backends()["triton"]
    assert flowkern.backends()["cuda"] is True, flowkern.backends()["cuda"]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_op_against_reference(name, op, precision):
    if precision == "fp64" and name == "triton":
        with pytest.raises(RuntimeError, match="computes states in float32"):
            OnDevice(name, torch.float64)
        return
    table = OnDevice(name, torch.float64 if precision == "fp64" else FLOAT)
    if op in COUPLINGS:
        for spread in SPREADS:
            compare(table, op, precision, spread, SHAPES)
            compare(table, op, precision, spread, LARGE)
    elif precision in ("fp32", "fp64"):
        compare(table, op, precision, 1.0, ((2, 3, 4, 5), *SHAPES))
        compare(table, op, precision, 1.0, (*LARGE, *MANY_PIXELS))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty(name, op, shape):
    for _, args in arguments(op, shape, FLOAT, FLOAT):
        got, same = getattr(OnDevice(name), op)(*args), results(getattr(reference, op), args)
        torch.testing.assert_close(got, same, rtol=0, atol=0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("inverse", [False, True])
def test_nan_stays_nan(name, scale, inverse):
    """Bounds on exponents keep it: a GPU's maximum does not unless it is told to."""
    make = Inputs((2, 12, 3, 5), FLOAT, FLOAT)
    x, h = make.state(), make.network(scale)
    h[0, 0, 1, 1] = torch.nan
    args = (x, h, scale, 1.0, inverse)
    expected = results(reference.couple, args)
    assert expected[0].isnan().any()
    for mine, same in zip(OnDevice(name).couple(*args), expected, strict=True):
        assert torch.equal(mine.isnan(), same.isnan())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("op", backends.OPS)
def test_same_bits_again(name, op):
    for _, args in arguments(op, (5, 24, 65, 33), FLOAT, FLOAT):
        once, again = (getattr(OnDevice(name), op)(*args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_composition_of_the_mixes(name):
    for steps, channels in ((3, 4), (2, 12), (32, 48), (2, 192)):
        torch.manual_seed(channels)
        made = [StepOfFlow(channels, hidden=2) for _ in range(steps)]
        parameters = mix.stacked([p.detach() + 0.02 * torch.randn_like(p) for s in made for p in (
            s.conv.lower, s.conv.upper, s.conv.log_s, s.actnorm.log_scale, s.actnorm.bias)])
        fixed = [torch.stack([getattr(s.conv, n) for s in made]) for n in ("sign", "permutation")]
        exact = mix.mixes(*(p.double() for p in parameters), *fixed)
        table = backends.table(DEVICE, name)
        mine = [t.to(DEVICE) for t in (*parameters, *fixed)]
        for got, wanted in zip(table.compose(*mine), exact, strict=True):
            torch.testing.assert_close(got.cpu(), wanted.float(), rtol=1e-6, atol=1e-6)
        cotangents = [torch.randn(t.shape) for t in (exact[0], exact[1], exact[3])]
        wanted = mix.mixes_vjp(*(p.double() for p in parameters), *fixed, *(c.double() for c in cotangents))
        for got, w in zip(table.compose_vjp(*mine, *(c.to(DEVICE) for c in cotangents)), wanted, strict=True):
            torch.testing.assert_close(got.cpu(), w.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_addresses_beyond_32_bits(name, real_gpu):
    """A state of more than 2^31 numbers; its first and last pixels are what a small state of them would give."""
    table = backends.table(DEVICE, name)
    n, c, size = 3, 12, 7936
    x = torch.empty((n, c, size, size), device=DEVICE, memory_format=torch.channels_last).normal_()
    assert x.numel() > 2**31
    matrix, offset = torch.randn(c, c, device=DEVICE), torch.randn(c, device=DEVICE)
    corner = functools.partial(lambda t: torch.cat([t[:1, :, :2, :2], t[-1:, :, -2:, -2:]]).contiguous(
        memory_format=torch.channels_last))
    wanted = reference.channel_mix(corner(x).double(), matrix.double(), offset.double())
    got = corner(table.channel_mix(x, matrix, offset, False)).double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    h = torch.empty_like(x, dtype=torch.bfloat16).normal_()
    y, logdet = table.couple(x, h, "softclamp", 1.0, False)
    wanted, _ = reference.couple(corner(x).double(), corner(h).double(), "softclamp", 1.0)
    torch.testing.assert_close(corner(y).double(), wanted, rtol=1e-5, atol=1e-5)
    assert logdet.isfinite().all()
