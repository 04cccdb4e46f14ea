"""Every pixel op of the CUDA kernels, executed on the CPU, against the specification."""

import pytest
import torch
from pixel_cases import (
    COUPLINGS,
    DOUBLE,
    FLOAT,
    MANY_PIXELS,
    PRECISIONS,
    SPREADS,
    Inputs,
    arguments,
    compare,
    results,
)

from flowkern import backend as backends
from flowkern import reference
from flowkern.reference import SCALES

SHAPES = ((1, 2, 1, 1), (3, 4, 1, 1), (2, 6, 5, 3), (3, 10, 1, 7), (1, 12, 9, 11), (2, 24, 5, 13), (1, 48, 7, 9),
          (2, 96, 3, 7), (2, 34, 4, 8), (1, 192, 3, 2))
# More pixels than a block takes at a time, of every channel count that has kernels of its own and of some that don't.
SEVERAL_TILES = ((2, 12, 37, 19), (1, 24, 41, 13), (2, 48, 20, 17), (1, 96, 21, 13), (1, 20, 33, 21), (3, 8, 9, 33))
REDUCING = [op for op in backends.OPS if op not in ("channel_mix", "shrink", "data_consistency")]


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_op_against_reference(backend, order, op, precision):
    if op in COUPLINGS:
        for spread in SPREADS.values():
            compare(backend, op, precision, spread, SHAPES)
    elif precision in ("fp32", "fp64"):
        compare(backend, op, precision, 1.0, ((2, 3, 4, 5), *SHAPES))


@pytest.mark.parametrize("op", backends.OPS)
def test_several_tiles(backend, op):
    compare(backend, op, "fp32", 1.0, SEVERAL_TILES)


@pytest.mark.parametrize("op", REDUCING)
def test_sums_over_many_pixels(backend, op):
    compare(backend, op, "fp32", 1.0, MANY_PIXELS)


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 12, 4, 4), (2, 12, 0, 4)])
def test_empty(backend, op, shape):
    for _, args in arguments(op, shape, FLOAT, FLOAT):
        got, same = results(getattr(backend, op), args), results(getattr(reference, op), args)
        torch.testing.assert_close(got, same, rtol=0, atol=0)


@pytest.mark.parametrize("op", backends.OPS)
def test_same_bits_in_any_order_of_threads(backend, op, monkeypatch):
    """Threads run one after the other here, so that only a change of order shows a barrier that is missing."""
    for shape in [(3, 12, 17, 17), (2, 24, 9, 17), (2, 48, 10, 20), (1, 96, 9, 15), (5, 6, 9, 9), (1, 70, 9, 9)]:
        for dtype in (FLOAT, DOUBLE):
            calls = [args for _, args in arguments(op, shape, dtype, dtype)]
            runs = []
            for order in ("forward", "reverse", "reverse"):
                monkeypatch.setenv("FLOWKERN_EMULATE", order)
                runs.append([r for args in calls for r in results(getattr(backend, op), args)])
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True)), shape


def test_any_layout_of_the_operands(backend):
    """h and cotangents arrive in whatever layout a user's network left them; small operands are views."""
    for channels in (6, 12):
        make = Inputs((2, channels, 5, 7), FLOAT, FLOAT)
        x, g, h, glogdet = make.state(), make.state(), make.network("softclamp"), make.normal(2)
        matrix, inverse_matrix, offset = make.mix()
        plain, wide = (lambda t: t.contiguous()), (lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]])

        def unaligned(t):
            return torch.cat([t.flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:].view(
                t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2)

        strided = torch.stack([offset, offset], dim=1)[:, 0]
        expanded = glogdet[:1].expand(2)
        for change in (plain, wide, unaligned):
            calls = [("couple", (change(x), change(h), "softclamp", 1.0)),
                     ("couple_mix", (change(x), change(h), matrix.mT, strided, "softclamp", 1.0)),
                     ("channel_mix", (change(x), matrix.mT, strided)),
                     ("couple_vjp", (x, change(g), change(h), expanded, "softclamp", 1.0)),
                     ("mix_vjp", (change(x), change(g), matrix, inverse_matrix, strided)),
                     ("shrink_vjp", (x, change(g), glogdet[0])),
                     ("data_consistency", (x, change(g), glogdet[0])),
                     ("data_consistency_vjp", (x, change(g), change(h), glogdet[0]))]
            for op, args in calls:
                for got, expected in zip(results(getattr(backend, op), args), results(getattr(reference, op), args),
                                         strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["shrink", "shrink_vjp", "data_consistency", "data_consistency_vjp"])
@pytest.mark.parametrize("size", [1, 7, 4098, 33333])
def test_flat_sizes_and_addresses(backend, op, size):
    """Any size, and tensors that begin where accesses of 16 bytes can't."""
    for start in (0, 1):
        x, y, g = (torch.randn(size + start)[start:] for _ in range(3))
        strength = torch.tensor(0.3)
        args = {"shrink": (x,), "shrink_vjp": (x, g), "data_consistency": (x, y), "data_consistency_vjp": (x, y, g)}[op]
        got, expected = (results(getattr(m, op), (*args, strength)) for m in (backend, reference))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * size**0.5)


@pytest.mark.parametrize("channels", [12, 10])
@pytest.mark.parametrize("inverse,given", [(False, False), (True, True)])
def test_reductions_written_where_asked(backend, channels, inverse, given):
    make = Inputs((2, channels, 4, 5), FLOAT, FLOAT)
    into = make.normal(3, channels, channels)[1], make.normal(3, channels)[1]
    args = (make.state(), make.state(), *make.mix(), inverse, given)
    *_, dmatrix, doffset = backend.mix_vjp(*args, into=into)
    assert dmatrix is into[0] and doffset is into[1]
    *_, expected, expected_offset = backend.mix_vjp(*args)
    assert torch.equal(dmatrix, expected) and torch.equal(doffset, expected_offset)


def test_log_determinant_in_parts(backend):
    """The caller adds them up; how many there are follows from the shape alone."""
    make = Inputs((2, 12, 64, 64), FLOAT, FLOAT)
    x, h = make.state(), make.network("softclamp")
    _, parts = backend.couple(x, h, "softclamp", 1.0)
    assert parts.shape[0] == 2 and parts.shape[1] > 1
    torch.testing.assert_close(parts.sum(dim=1), reference.couple(x, h, "softclamp", 1.0)[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("raw", [-200.0, -95.0, -88.5, -30.0, 0.0, 1e-30, 30.0, 200.0, float("inf"), float("nan")])
def test_special_raw_values(backend, scale, raw):
    """Overflow and NaN come out where the reference has them: nothing is clamped in silence."""
    for channels in (4, 12):
        make = Inputs((1, channels, 3, 3), FLOAT, FLOAT)
        x, h = make.state(), make.network(scale)
        h[:, :1] = raw
        for inverse in (False, True):
            args = (x, h, scale, 1.0, inverse)
            for got, expected in zip(results(backend.couple, args), reference.couple(*args), strict=True):
                assert torch.equal(got.isnan(), expected.isnan())
                torch.testing.assert_close(got, expected, rtol=3e-5, atol=1e-5, equal_nan=True)


def test_quotients_by_a_subnormal_scale(backend):
    """1 / s overflows where b / s does not."""
    x, h = torch.full((1, 2, 1, 1), 1e-4), torch.tensor([-95.0, 0.0]).view(1, 2, 1, 1)
    for inverse, given in [(False, False), (True, True)]:
        args = (x, x, h, torch.ones(1), "sigmoid", 1.0, inverse, given)
        torch.testing.assert_close(backend.couple_vjp(*args), reference.couple_vjp(*args), rtol=1e-3, atol=0)
