"""Every pixel op of every backend that runs here, against the specification; and the specification against autograd.

Errors are judged from data: a backend's error against the fp64 reference may be at most twice that of the reference in
the same precision, plus a few units in the last place. Errors are pooled over shapes, so that no budget hangs on one
lucky number.
"""

import functools
import itertools

import pytest
import torch
from conftest import RUNNABLE

from flowkern import backend as backends
from flowkern import cpp, reference
from flowkern.reference import SCALES

CPU = torch.device("cpu")
FLOAT, DOUBLE = torch.float32, torch.float64
SHAPES = ((1, 2, 1, 1), (3, 4, 1, 1), (2, 6, 5, 3), (3, 10, 1, 7), (1, 12, 9, 11), (2, 24, 5, 13), (1, 48, 7, 9),
          (2, 96, 6, 7), (2, 34, 8, 8))
MANY_PIXELS = ((2, 12, 64, 96),)
PRECISIONS = {"fp32": (FLOAT, FLOAT), "bf16": (FLOAT, torch.bfloat16), "fp16": (FLOAT, torch.float16),
              "fp64": (DOUBLE, DOUBLE)}
SPREADS = {"moderate": 1.0, "extreme": 40.0}
COUPLINGS = [op for op in backends.OPS if "couple" in op]
MIXES = ("channel_mix", "couple_mix", "mix_couple", "mix_vjp")
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
    from flowkern import _C

    before = _C.build_config()["isa_active"]
    _C.select_isa(isa)
    yield backends.table(CPU, name)
    _C.select_isa(before)


class Inputs:
    """Random operands for one shape, in the precisions of a call."""

    def __init__(self, shape, dtype, h_dtype, spread=1.0):
        self.shape, self.dtype, self.h_dtype, self.spread = shape, dtype, h_dtype, spread
        self.generator = torch.Generator().manual_seed(sum(shape))

    def normal(self, *shape, dtype=None):
        values = torch.randn(*shape, generator=self.generator, dtype=DOUBLE).to(dtype or self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def state(self):
        return self.normal(*self.shape)

    def network(self, scale):
        """(raw, t), or t. The raw values have a mean, so that log-determinants are not sums that cancel."""
        n, c, height, width = self.shape
        if scale == "additive":
            return self.normal(n, c // 2, height, width, dtype=self.h_dtype)
        h = self.normal(n, c, height, width, dtype=DOUBLE)
        h[:, : c // 2] = (h[:, : c // 2] + 0.5) * self.spread
        return h.to(self.h_dtype)

    def mix(self):
        """A well-conditioned matrix, its inverse (in transposed memory, as torch.linalg.inv returns it), an offset."""
        c = self.shape[1]
        stretch = torch.exp(0.2 * self.normal(c, dtype=DOUBLE))
        matrix = torch.linalg.qr(self.normal(c, c, dtype=DOUBLE))[0] * stretch
        inverse = torch.linalg.inv(matrix)
        return matrix.to(self.dtype), inverse.mT.contiguous().to(self.dtype).mT, self.normal(c)


def arguments(op, shape, dtype, h_dtype, spread=1.0):
    """Every kind of call of one op, as (label, positional arguments); the same labels for every shape."""
    make = Inputs(shape, dtype, h_dtype, spread)
    flags = (False, True)
    if op == "channel_mix":
        matrix, inverse_matrix, offset = make.mix()
        yield "forward", (make.state(), matrix, offset, False)
        yield "inverse", (make.state(), inverse_matrix, offset, True)
    elif op == "mix_vjp":
        matrix, inverse_matrix, offset = make.mix()
        for inverse, given in itertools.product(flags, flags):
            yield (f"inverse={inverse} given={given}",
                   (make.state(), make.state(), matrix, inverse_matrix, offset, inverse, given))
    elif op in ("shrink", "shrink_vjp", "data_consistency", "data_consistency_vjp"):
        strength = torch.tensor(0.3, dtype=dtype)
        for label, flat in (("image", False), ("latent", True)):
            x, y, noise = (make.state().flatten(1) if flat else make.state() for _ in range(3))
            # Cotangents resemble what they meet in the sum over all elements, so that the sum does not cancel.
            yield label, {"shrink": (x, strength), "shrink_vjp": (x, x + noise, strength),
                          "data_consistency": (x, y, strength),
                          "data_consistency_vjp": (x, y, x - y + noise, strength)}[op]
    else:
        for scale, alpha in [("softclamp", 1.0), ("softclamp", 0.7), ("sigmoid", 1.0), ("additive", 1.0)]:
            label, x, h = f"{scale} alpha={alpha}", make.state(), make.network(scale)
            if op == "couple":
                for inverse in flags:
                    yield f"{label} inverse={inverse}", (x, h, scale, alpha, inverse)
            elif op == "couple_vjp":
                g, glogdet = make.state(), make.normal(shape[0])
                for inverse, given in itertools.product(flags, flags):
                    yield f"{label} inverse={inverse} given={given}", (x, g, h, glogdet, scale, alpha, inverse, given)
            else:
                matrix, inverse_matrix, offset = make.mix()
                yield label, (x, h, matrix if op == "couple_mix" else inverse_matrix, offset, scale, alpha)


def converted(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def results(function, args):
    out = function(*args)
    return out if isinstance(out, tuple) else (out,)


@functools.cache
def cases(op, dtype, h_dtype, spread, shapes):
    """For each label: its arguments, the reference's results in their precision, and in fp64, each one per shape."""
    calls = {}
    for shape in shapes:
        for label, args in arguments(op, shape, dtype, h_dtype, spread):
            calls.setdefault(label, []).append(args)
    run = functools.partial(results, getattr(reference, op))
    return {label: (many, [run(args) for args in many], [run(converted(args, DOUBLE)) for args in many])
            for label, many in calls.items()}


def errors(op, values, exact, where):
    """The largest and the root-mean-square error over all tensors, where the reference is finite.

    Relative to a number's own size plus the typical size; after a matrix product, to the largest channel of its pixel.
    """
    typical = torch.cat([e[w] for e, w in zip(exact, where, strict=True)]).abs().quantile(0.5)
    relative = []
    for value, e, w in zip(values, exact, where, strict=True):
        size = e.abs().nan_to_num(posinf=0)
        size = size.amax(dim=1, keepdim=True).expand_as(e) if op in MIXES and e.dim() == 4 else size
        relative.append(((value.double() - e).abs() / (size + typical + 1e-300))[w])
    relative = torch.cat(relative)
    return torch.stack([relative.max(), relative.square().mean().sqrt()])


def assert_within_budget(op, got, same, exact, label):
    """Lists of one result over shapes: `got` against `exact`, judged by `same`, the reference in got's precision."""
    where = [s.isfinite() & e.isfinite() for s, e in zip(same, exact, strict=True)]
    for g, s, w in zip(got, same, where, strict=True):
        assert g.shape == s.shape and g.dtype == s.dtype, label
        assert g.isfinite()[w].all(), f"{label}: not finite where the reference is"
    if not any(w.any() for w in where):
        return
    ours, theirs = errors(op, got, exact, where), errors(op, same, exact, where)
    budget = 2 * theirs + 3 * torch.finfo(got[0].dtype).eps
    assert (ours <= budget).all(), f"{label}: errors (max, rms) {ours.tolist()}, the reference's {theirs.tolist()}"


def assert_doubles_within_budget(op, got, exact, single, exact_single, label):
    """In fp64 the reference is its own judge, so the yardstick is its fp32 error on such numbers, scaled to fp64."""
    where = [s.isfinite() & e.isfinite() for s, e in zip(single, exact_single, strict=True)]
    assert all(g.shape == e.shape and g.dtype == DOUBLE for g, e in zip(got, exact, strict=True)), label
    if not any(w.any() for w in where):
        return
    ours, theirs = errors(op, got, exact, where), errors(op, single, exact_single, where)
    ulp = torch.finfo(DOUBLE).eps
    budget = 3 * theirs * ulp / torch.finfo(FLOAT).eps + 3 * ulp
    assert (ours <= budget).all(), f"{label}: errors (max, rms) {ours.tolist()}, budget {budget.tolist()}"


def compare(implementation, op, precision, spread, shapes):
    dtype, h_dtype = PRECISIONS[precision]
    single = cases(op, FLOAT, FLOAT, spread, shapes)
    for label, (many, same, exact) in cases(op, dtype, h_dtype, spread, shapes).items():
        got = [results(getattr(implementation, op), args) for args in many]
        for i in range(len(same[0])):
            mine, reference32, reference64 = ([r[i] for r in runs] for runs in (got, same, exact))
            for g, s in zip(mine, reference32, strict=True):
                assert g.stride() == s.stride() or 1 in s.shape, f"{op} {label} result {i}: strides"
            where = f"{op} {precision} {label} result {i}"
            if dtype == DOUBLE:
                yardstick = ([r[i] for r in runs] for runs in single[label][1:])
                assert_doubles_within_budget(op, mine, reference64, *yardstick, where)
            else:
                assert_within_budget(op, mine, reference32, reference64, where)


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
    compare(implementation, op, "fp32", 1.0, MANY_PIXELS)


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


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("raw", [-200.0, -88.5, -30.0, 0.0, 1e-30, 30.0, 200.0, float("inf"), float("nan")])
def test_special_raw_values(implementation, scale, raw):
    """Overflow and NaN come out where the reference has them: nothing is clamped in silence."""
    make = Inputs((1, 4, 3, 3), FLOAT, FLOAT)
    x, h = make.state(), make.network(scale)
    h[:, :1] = raw
    for inverse in (False, True):
        args = (x, h, scale, 1.0, inverse)
        for got, expected in zip(implementation.couple(*args), reference.couple(*args), strict=True):
            assert torch.equal(got.isnan(), expected.isnan())
            torch.testing.assert_close(got, expected, rtol=3e-5, atol=1e-5, equal_nan=True)


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
