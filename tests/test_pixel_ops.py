"""Every pixel op of every backend that runs here, against the specification; and the specification against autograd.

How errors are judged: `pixel_cases`.
"""

import math

import pytest
import torch
from conftest import RUNNABLE
from helpers import instruction_set
from pixel_cases import (
    COUPLINGS,
    DOUBLE,
    FLOAT,
    MANY_PIXELS,
    PRECISIONS,
    SHAPES,
    SPREADS,
    Inputs,
    arguments,
    assert_doubles_within_budget,
    assert_within_budget,
    compare,
    results,
)

from flowkern import backend as backends
from flowkern import cpp, reference
from flowkern.reference import SCALES

CPU = torch.device("cpu")
IMPLEMENTATIONS = [name for name in RUNNABLE if name not in ("reference", "cpp")]
if "cpp" in RUNNABLE:
    IMPLEMENTATIONS += [f"cpp-{isa}" for isa in cpp.build_config()["isa_supported"]]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """The functions of one backend; the C++ one once for each instruction set that this machine has."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield backends.table(CPU, name)
        return
    with instruction_set(isa):
        yield backends.table(CPU, name)


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_op_against_reference(implementation, op, precision):
    if op in COUPLINGS:
        for spread in SPREADS.values():
            compare(implementation, op, precision, spread, SHAPES)
    elif precision in ("fp32", "fp64"):
        compare(implementation, op, precision, 1.0, ((2, 3, 4, 5), *SHAPES))


@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in ("channel_mix", "shrink", "data_consistency")])
def test_sums_over_many_pixels(implementation, op):
    """Reductions in short blocks: the budget holds where naive sums lose several times eager's precision."""
    compare(implementation, op, "fp32", 1.0, (*MANY_PIXELS, (1, 12, 160, 128)))


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty(implementation, op, shape):
    for _, args in arguments(op, shape, FLOAT, FLOAT):
        got, same = results(getattr(implementation, op), args), results(getattr(reference, op), args)
        torch.testing.assert_close(got, same, rtol=0, atol=0)


@pytest.mark.parametrize("op", backends.OPS)
def test_same_bits_again_and_on_any_number_of_threads(implementation, op):
    threads = torch.get_num_threads()
    try:
        for shape in [(3, 12, 33, 17), (2, 48, 40, 20), (5, 6, 9, 9)]:
            calls = [args for _, args in arguments(op, shape, FLOAT, FLOAT)]
            runs = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                runs.append([r for args in calls for r in results(getattr(implementation, op), args)])
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_any_layout_of_the_operands(implementation):
    """h and cotangents arrive in whatever layout a user's network left them; small operands are views."""
    make = Inputs((2, 6, 5, 7), DOUBLE, DOUBLE)
    x, g, h, glogdet = make.state(), make.state(), make.network("softclamp"), make.normal(2)
    matrix, inverse_matrix, offset = make.mix()
    plain, wide = (lambda t: t.contiguous()), (lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]])
    strided = torch.stack([offset, offset], dim=1)[:, 0]
    expanded = glogdet[:1].expand(2)
    for change in (plain, wide):
        calls = [("couple", (x, change(h), "softclamp", 1.0)),
                 ("couple_mix", (x, change(h), matrix.mT, strided, "softclamp", 1.0)),
                 ("channel_mix", (x, matrix.mT, strided)),
                 ("couple_vjp", (x, change(g), change(h), expanded, "softclamp", 1.0)),
                 ("mix_vjp", (x, change(g), matrix, inverse_matrix, strided)),
                 ("shrink_vjp", (x, change(g), glogdet[0])),
                 ("data_consistency", (x, change(g), glogdet[0])),
                 ("data_consistency_vjp", (x, change(g), change(h), glogdet[0]))]
        for op, args in calls:
            for got, expected in zip(results(getattr(implementation, op), args), results(getattr(reference, op), args),
                                     strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reductions_go_to_dense_memory(implementation):
    make = Inputs((1, 4, 2, 2), FLOAT, FLOAT)
    for into in ((torch.empty(4, 4).T, torch.empty(4)), (torch.empty(4, 4), torch.empty(8)[::2])):
        with pytest.raises(ValueError, match="mix_vjp: `into` must be dense tensors"):
            implementation.mix_vjp(make.state(), make.state(), *make.mix(), into=into)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_every_size_in_half_precision(implementation, dtype):
    """Networks' outputs as they are read, and their gradients as they are written: to the last bit, subnormal, too
    large, infinite.
    """
    sizes = torch.cat([torch.logspace(-9, 6, 300), torch.tensor([65504.0, 65519.0, 65520.0, math.inf])])
    values = torch.cat([sizes, -sizes]).view(1, 1, 1, -1)
    state, given = torch.zeros(1, 2, 1, values.numel()), values.to(dtype)
    y, _ = implementation.couple(state, given, "additive", 1.0, False)
    assert torch.equal(y[:, 1:], given.float())
    g = torch.cat([torch.zeros_like(values), values], dim=1)
    dh = implementation.couple_vjp(state, g, given, torch.zeros(1), "additive", 1.0, False, True)[2]
    assert torch.equal(dh, given)


@pytest.mark.parametrize(("scale", "alpha"), [*((scale, 1.0) for scale in SCALES), ("softclamp", 100.0)])
@pytest.mark.parametrize("raw", [-200.0, -88.5, -30.0, 0.0, 1e-30, 30.0, 200.0, float("inf"), float("nan")])
def test_special_raw_values(implementation, scale, alpha, raw):
    """Overflow and NaN come out where the reference has them: nothing is clamped in silence. With a large alpha scales
    overflow, too."""
    make = Inputs((1, 4, 3, 3), FLOAT, FLOAT)
    x, h = make.state(), make.network(scale)
    h[:, :1] = raw
    for inverse in (False, True):
        args = (x, h, scale, alpha, inverse)
        for got, expected in zip(implementation.couple(*args), reference.couple(*args), strict=True):
            assert torch.equal(got.isnan(), expected.isnan())
            torch.testing.assert_close(got, expected, rtol=3e-5, atol=1e-5, equal_nan=True)


def test_quotients_by_a_subnormal_scale(implementation):
    """1 / s overflows where b / s does not."""
    x, h = torch.full((1, 2, 1, 1), 1e-4), torch.tensor([-95.0, 0.0]).view(1, 2, 1, 1)
    for inverse, given in [(False, False), (True, True)]:
        args = (x, x, h, torch.ones(1), "sigmoid", 1.0, inverse, given)
        got, expected = implementation.couple_vjp(*args), reference.couple_vjp(*args)
        assert all(e.isfinite().all() for e in expected)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)  # s itself has few digits there


# The specification: each VJP against autograd of its forward op.

def test_reference_couple_vjp_is_autograds():
    for shape, spread in [((2, 6, 3, 2), 1.0), ((1, 2, 1, 1), 3.0)]:
        for _, (v, g, h, glogdet, *settings) in arguments("couple_vjp", shape, DOUBLE, DOUBLE, spread):
            scale, alpha, inverse, given = settings
            x = (v if given else reference.couple(v, h, scale, alpha, inverse=not inverse)[0]).clone().requires_grad_()
            network = h.clone().requires_grad_()
            out, logdet = reference.couple(x, network, scale, alpha, inverse)
            expected = torch.autograd.grad((out * g).sum() + (logdet * glogdet).sum(), [x, network])
            rebuilt, *got = reference.couple_vjp(v, g, h, glogdet, *settings)
            torch.testing.assert_close(tuple(got), expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(rebuilt, v.new_empty(0) if given else x.detach(), rtol=1e-9, atol=1e-9)


def test_reference_mix_vjp_is_autograds():
    for _, (v, g, matrix, inverse_matrix, offset, inverse, given) in arguments("mix_vjp", (2, 5, 3, 2), DOUBLE, DOUBLE):
        x = v
        if not given:
            x = reference.channel_mix(v, *((matrix, offset) if inverse else (inverse_matrix, offset, True)))
        leaves = [t.clone().requires_grad_() for t in (x, matrix, offset)]
        undo = (torch.linalg.inv(leaves[1]), leaves[2], True)
        mixed = reference.channel_mix(leaves[0], *(undo if inverse else leaves[1:]))
        expected = torch.autograd.grad((mixed * g).sum(), leaves)
        rebuilt, *got = reference.mix_vjp(v, g, matrix, inverse_matrix, offset, inverse, given)
        torch.testing.assert_close(tuple(got), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rebuilt, v.new_empty(0) if given else x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", ["shrink", "data_consistency"])
def test_reference_latent_vjp_is_autograds(op):
    for _, args in arguments(op, (2, 4, 3, 2), DOUBLE, DOUBLE):
        inputs = [a.clone().requires_grad_() for a in args]
        g = torch.randn(args[0].shape, dtype=DOUBLE)
        expected = torch.autograd.grad((getattr(reference, op)(*inputs) * g).sum(), inputs)
        *tensors, strength = args
        got = getattr(reference, f"{op}_vjp")(*tensors, g, strength)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["softclamp", "sigmoid"])
def test_reference_inverse_undoes_the_coupling(scale):
    make = Inputs((2, 6, 3, 2), DOUBLE, DOUBLE)
    x, h = make.state(), make.network(scale)
    y, logdet = reference.couple(x, h, scale, 1.0)
    back, inverse_logdet = reference.couple(y, h, scale, 1.0, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-12, atol=1e-12)


# The helpers above are themselves able to fail.

def test_budget_refuses_errors():
    exact = [torch.randn(1000, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))]
    same = [exact[0].float()]
    assert_within_budget("couple", [same[0].clone()], same, exact, "equal")
    for spoiled in (same[0] * (1 + 2e-6), torch.cat([same[0][:-1], same[0][-1:] + 1e-5]), same[0] / 0):
        with pytest.raises(AssertionError):
            assert_within_budget("couple", [spoiled], same, exact, "spoiled")
    double, single = [exact[0] * (1 + 3e-15)], same
    with pytest.raises(AssertionError):
        assert_doubles_within_budget("couple", double, exact, single, exact, "spoiled")


def test_unwritten_memory_is_nan():
    like = torch.zeros(2, 3)
    for tensor in (torch.empty(3), torch.empty_like(like), torch.empty_strided((2, 2), (2, 1)), like.new_empty(4),
                   like.new_empty_strided((2,), (1,)), torch.empty(2, dtype=torch.bfloat16)):
        assert tensor.isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).min).all()


@pytest.mark.unpoisoned
def test_poison_can_be_left_out():
    assert torch.empty.__module__ != "conftest"


@pytest.mark.skipif("cpp" not in RUNNABLE, reason="the native extension does not run here")
def test_an_instruction_set_that_this_machine_lacks_is_refused():
    from flowkern import _C

    config = cpp.build_config()
    for isa in set(config["isa_compiled"]) - set(config["isa_supported"]):
        with pytest.raises(ValueError, match=isa):
            _C.select_isa(isa)
    assert _C.build_config()["isa_active"] == config["isa_active"]
