"""The op layer: opcheck, gradients of the public forms, refusals, and the choice of a backend."""

import dataclasses
from functools import partial

import pytest
import torch

import flowkern
from flowkern import backend as backends
from flowkern import network, ops, reference
from flowkern.layers import CouplingNet, StepOfFlow
from flowkern.mix import compose


def state(*shape, dtype=torch.float32, grad=False):
    x = torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def mix(channels=4, dtype=torch.float32):
    return torch.eye(channels, dtype=dtype) + 0.3 * torch.randn(channels, channels, dtype=dtype), torch.randn(
        channels, dtype=dtype
    )


def raw_calls(backend):
    torch.manual_seed(0)
    x, g, h = state(2, 4, 3, 5), state(2, 4, 3, 5), state(2, 4, 3, 5)
    (matrix, offset), logdet, scalar = mix(), torch.randn(2), torch.tensor(0.3)
    inverse = torch.linalg.inv(matrix).contiguous()
    for flag in (False, True):
        yield "channel_mix", (x, matrix, offset, flag, backend)
        yield "couple", (x, h, "softclamp", 1.0, flag, backend)
        for given in (False, True):
            yield "couple_vjp", (x, g, h, logdet, "sigmoid", 1.0, flag, given, backend)
            yield "mix_vjp", (x, g, matrix, inverse, offset, flag, given, backend)
    yield "couple_vjp", (x, g, state(2, 2, 3, 5), logdet, "additive", 1.0, False, False, backend)
    yield "couple_mix", (x, h, matrix, offset, "softclamp", 1.0, backend)
    yield "mix_couple", (x, h, matrix, offset, "softclamp", 1.0, backend)
    yield "shrink", (x, scalar, backend)
    yield "shrink_vjp", (x, g, scalar, backend)
    yield "data_consistency", (x, g, scalar, backend)
    yield "data_consistency_vjp", (x, g, g, scalar, backend)


def test_opcheck_of_every_pixel_op(backend):
    seen = set()
    for name, arguments in raw_calls(backend):
        torch.library.opcheck(getattr(torch.ops.flowkern, name).default, arguments)
        seen.add(name)
    assert seen == set(backends.OPS)


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_chain(memory, reverse):
    torch.manual_seed(0)
    steps = [StepOfFlow(4, hidden=6) for _ in range(3)]
    with torch.no_grad():
        matrix, offset, inverse, _ = compose(steps)
    parameters = [p.detach() for s in steps for p in s.coupling.net.flat_parameters()]
    x, g, logdet = state(2, 4, 3, 5), state(2, 4, 3, 5), torch.randn(2)
    settings = (reverse, "softclamp", 1.0, "auto", torch.float32, memory, 2)
    torch.library.opcheck(torch.ops.flowkern.chain.default, (x, matrix, offset, inverse, parameters, *settings))
    out, _, kept = torch.ops.flowkern.chain(x, matrix, offset, inverse, parameters, *settings)
    need = [i % 9 != 4 for i in range(len(parameters))]
    stored = memory != "recompute"
    ends = (x, None) if stored else (None, out)
    for cotangent in (g, g.contiguous()):
        given = *ends, cotangent, logdet, kept, matrix, offset, inverse, parameters, need
        torch.library.opcheck(torch.ops.flowkern.chain_vjp.default, (*given, *settings))


def test_gradients_of_the_public_forms(backend):
    torch.manual_seed(0)
    x, h = (state(2, 4, 2, 3, dtype=torch.float64, grad=True) for _ in range(2))
    t = state(2, 2, 2, 3, dtype=torch.float64, grad=True)
    matrix, offset = (p.requires_grad_() for p in mix(dtype=torch.float64))
    scalar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    for inverse in (False, True):
        assert check(partial(ops.channel_mix, inverse=inverse, backend=backend), (x, matrix, offset))
        for scale, given in (("softclamp", h), ("sigmoid", h), ("additive", t)):
            assert check(partial(ops.couple, scale=scale, inverse=inverse, backend=backend), (x, given))
    for op in (ops.couple_mix, ops.mix_couple):
        assert check(partial(op, backend=backend), (x, h, matrix, offset))
    assert check(partial(ops.shrink, backend=backend), (x, scalar))
    assert check(
        partial(ops.shrink, backend=backend), (torch.randn(3, 7, dtype=torch.float64, requires_grad=True), scalar)
    )
    assert check(partial(ops.data_consistency, backend=backend), (x, h, scalar))


def test_public_forms_take_any_layout(backend):
    x, y = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    matrix, offset = mix(6)
    scalar = torch.tensor(0.4)
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 12, 4, 10)[:, ::2, :, ::2]):
        wanted = torch.einsum("ij,njhw->nihw", matrix.T.contiguous(), given) + offset[:, None, None]
        torch.testing.assert_close(
            ops.channel_mix(given, matrix.T, offset, backend=backend), wanted, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(ops.data_consistency(given, y, scalar, backend=backend), given - 0.4 * (given - y))
        torch.testing.assert_close(ops.shrink(given, scalar, backend=backend), given / 1.4)


def test_raw_op_refuses_a_tensor_that_needs_gradients():
    x = state(1, 4, 2, 2, grad=True)
    with pytest.raises(RuntimeError, match="couple is a raw operator without a gradient; call the differentiable form"):
        torch.ops.flowkern.couple(x, x.detach(), "softclamp", 1.0, False, "reference")
    with torch.no_grad():
        torch.ops.flowkern.couple(x, x.detach(), "softclamp", 1.0, False, "reference")


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives(scale, inverse):
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "grad": True}
    x, h = state(1, 4, 2, 2, **double), state(1, 2 if scale == "additive" else 4, 2, 2, **double)
    matrix, offset = (t.requires_grad_() for t in mix(dtype=torch.float64))

    def mixed(x, h, matrix, offset):
        return (ops.mix_couple if inverse else ops.couple_mix)(x, h, matrix, offset, scale)

    def apart(x, h, matrix, offset):
        x, logdet = ops.couple(x, h, scale, inverse=inverse)
        return ops.channel_mix(x, matrix, offset, inverse), logdet

    for op in (mixed, apart):
        assert torch.autograd.gradgradcheck(op, (x, h, matrix, offset))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_are_laid_out_as_the_fake_kernels_promise(backend):
    """However the gradient that comes in lies in memory: compiled code takes strides for granted."""
    if flowkern.backends()[backend] is not True:
        pytest.skip(flowkern.backends()[backend])
    z, other = state(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    for op, args in (("shrink_vjp", (z, other, torch.tensor(0.3))),
                     ("data_consistency_vjp", (z, z + 1, other, torch.tensor(0.3)))):
        torch.library.opcheck(getattr(torch.ops.flowkern, op).default, (*args, backend), test_utils="test_faketensor")


def test_reductions_are_laid_out_as_the_fake_kernels_promise(backend):
    """However the parameters lie in memory."""
    torch.manual_seed(0)
    x, g, (matrix, offset) = state(2, 4, 3, 5), state(2, 4, 3, 5), mix()
    check = partial(torch.library.opcheck, test_utils="test_faketensor")
    for inverse in (False, True):
        check(torch.ops.flowkern.mix_vjp.default, (x, g, matrix.T, matrix.T, offset, inverse, False, backend))
    lower, upper = torch.randn(2, 2, 4, 4).mT
    log_s, log_scale, bias, sign = torch.ones(4, 4, 2).mT
    parameters = lower, upper, log_s, log_scale, bias, sign, torch.arange(4).repeat(2, 1)
    check(torch.ops.flowkern.compose.default, (*parameters, backend))
    check(torch.ops.flowkern.compose_vjp.default, (*parameters, lower, bias, torch.tensor(1.0), backend))


def test_second_derivatives_of_a_folds_steps():
    x, y = (state(1, 4, 2, 2, dtype=torch.float64, grad=True) for _ in range(2))
    for shape in ((), (1,)):
        weight = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
        for op, inputs in ((ops.shrink, (x, weight)), (ops.data_consistency, (x, y, weight))):
            assert torch.autograd.gradcheck(op, inputs) and torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: ops.couple(x, x[:, :2]), r"h of shape \(2, 4, 3, 3\), got \(2, 2, 3, 3\)"),
        (lambda x: ops.couple(x, x, "additive"), r"h of shape \(2, 2, 3, 3\)"),
        (lambda x: ops.couple(x, x, "exp"), "unknown scale 'exp'"),
        (lambda x: ops.couple(x[:, :3], x[:, :3]), "an even number of channels"),
        (
            lambda x: ops.channel_mix(x, torch.eye(3), torch.zeros(3)),
            r"wants matrix \(4, 4\) and offset \(4,\), got \(3, 3\)",
        ),
        (lambda x: ops.channel_mix(x[0], torch.eye(4), torch.zeros(4)), r"shape \(N, C, H, W\), got \(4, 3, 3\)"),
        (lambda x: ops.data_consistency(x, x[:1], torch.tensor(0.1)), "must have the same shape"),
        (lambda x: ops.couple(x, x, backend="nonsense"), "unknown backend 'nonsense'"),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(state(2, 4, 3, 3))


class TestBackendChoice:
    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch):
        monkeypatch.setattr(backends, "_registry", dict(backends._registry))
        monkeypatch.setattr(backends, "_tables", {})
        self.calls = []

        class Spy:
            def __getattr__(_, op):
                if op not in backends.OPS:
                    raise AttributeError(op)

                def run(*arguments):
                    self.calls.append(op)
                    return getattr(flowkern.reference, op)(*arguments)

                return run

        backends.register(backends.Backend("spy", ("cpu",), lambda: None, Spy))
        backends.register(
            backends.Backend("absent", ("cpu",), lambda: "it was left at home", Spy, preferred={"cpu": backends.OPS})
        )
        backends.register(backends.Backend("elsewhere", ("cuda",), lambda: None, Spy))

    def run(self, **options):
        self.calls.clear()
        ops.channel_mix(state(1, 2, 2, 2), *mix(2), **options)
        return self.calls == ["channel_mix"]

    def test_argument_context_and_environment(self, monkeypatch):
        assert not self.run()
        assert self.run(backend="spy")
        with flowkern.use_backend("spy"):
            assert self.run()
            assert not self.run(backend="reference")
            with flowkern.use_backend("auto"):
                assert not self.run()
        assert not self.run()
        monkeypatch.setenv("FLOWKERN_BACKEND", "spy")
        assert self.run()
        with flowkern.use_backend("reference"):
            assert not self.run()

    def test_glow_takes_a_backend(self):
        glow = flowkern.Glow((1, 4, 4), levels=1, depth=1, hidden=2, backend="spy")
        glow.eval()(torch.rand(1, 1, 4, 4))
        assert self.calls == ["channel_mix", "couple"]

    def test_an_explicit_choice_never_falls_back(self):
        with pytest.raises(RuntimeError, match="backend 'absent' can't run here: it was left at home"):
            self.run(backend="absent")
        with pytest.raises(RuntimeError, match="'absent' can't run here"), flowkern.use_backend("absent"):
            pass
        with pytest.raises(RuntimeError, match="backend 'elsewhere' runs on cuda tensors, got one on cpu"):
            self.run(backend="elsewhere")
        assert flowkern.backends()["absent"] == "it was left at home"

    def test_auto_on_a_gpu(self, monkeypatch):
        """Native kernels for the pixel ops; for the network Triton, or in fp64 PyTorch's convolutions."""
        for name in ("triton", "cuda"):
            here = dataclasses.replace(backends._registry[name], probe=lambda: None)
            monkeypatch.setitem(backends._registry, name, here)
        gpu = torch.device("cuda")
        single, double = (backends.table(gpu, "auto", dtype) for dtype in (torch.float32, torch.float64))
        for op in (*backends.OPS, "compose", "compose_vjp"):
            assert getattr(single, op).__module__ == getattr(double, op).__module__ == "flowkern.cuda", op
        for op in ("network_fold", "network_trace", "network_vjp", "squeeze_mix"):
            assert getattr(single, op).__module__.startswith("flowkern.kernels"), op
        assert double.network_trace is network.trace

        def without(name):
            here = dataclasses.replace(backends._registry[name], probe=lambda: "it was left at home")
            with monkeypatch.context() as patch:
                patch.setitem(backends._registry, name, here)
                backends._tables.clear()
                return backends.table(gpu, "auto")

        assert without("triton").network_trace is network.trace
        assert without("cuda").couple_mix.__module__.startswith("flowkern.kernels")

    def test_auto_takes_the_latest_backend_that_prefers_the_op(self):
        backends.register(
            backends.Backend(
                "picky", ("cpu",), lambda: None, backends._registry["spy"].load, preferred={"cpu": ("channel_mix",)}
            )
        )
        assert self.run()
        self.calls.clear()
        ops.shrink(torch.rand(2), torch.tensor(0.1))
        assert self.calls == []


# Dtypes


@pytest.mark.parametrize("wide", [False, True])
def test_native_ops_refuse_what_is_not_of_the_state_s_dtype(wide):
    """They read memory by its address: other dtypes would be other numbers, or memory of someone else's."""
    torch.manual_seed(0)
    own, other = (torch.float64, torch.float32) if wide else (torch.float32, torch.float64)
    x, h = state(2, 4, 3, 5, dtype=own), state(2, 4, 3, 5, dtype=own)
    (matrix, offset), (odd, odd_offset) = mix(dtype=own), mix(dtype=other)
    rest, table = (torch.zeros(2, dtype=own), "softclamp", 1.0), backends.table(x.device, "cpp", own)
    calls = [
        lambda: ops.channel_mix(x, odd, offset, backend="cpp"),
        lambda: ops.channel_mix(x, matrix, odd_offset, backend="cpp"),
        lambda: ops.couple(x, h.to(other if not wide else torch.bfloat16), backend="cpp"),
        lambda: ops.couple_mix(x, h, odd, offset, backend="cpp"),
        lambda: ops.mix_couple(x, h, matrix, odd_offset, backend="cpp"),
        lambda: table.couple_vjp(x, x.to(other), h, *rest),
        lambda: table.mix_vjp(x, x, matrix, odd, offset),
        lambda: table.shrink(x, torch.tensor(0.3, dtype=other)),
        lambda: table.shrink_vjp(x, x, torch.tensor(0.3, dtype=other)),
        lambda: table.data_consistency(x, x.to(other), torch.tensor(0.3, dtype=own)),
        lambda: table.data_consistency_vjp(x, x, x, torch.tensor(0.3, dtype=other)),
        lambda: table.shrink(x.half(), torch.tensor(0.3).half()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected torch.float|must be torch.float|must be float"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_and_measurements_may_be_of_another_dtype(backend, dtype):
    """A weight is taken in the image's dtype; image and measurement promote, as in PyTorch. So are gradients."""
    torch.manual_seed(0)
    x = state(2, 4, 3, 5, dtype=dtype, grad=True)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="computes states in float32"):
            ops.shrink(x, torch.tensor(0.25), backend)
        return
    for other in (torch.float32, torch.float64):
        weight = torch.tensor(0.25, dtype=other, requires_grad=True)
        shrunk = ops.shrink(x, weight, backend)
        torch.testing.assert_close(shrunk, x / 1.25)
        shrunk.sum().backward()
        assert weight.grad.dtype == other
        torch.testing.assert_close(weight.grad, -(x.detach() / 1.25**2).sum().to(other), rtol=1e-5, atol=1e-5)
    for other in (torch.bfloat16, torch.float32):
        y = state(2, 4, 3, 5).to(other)
        found = ops.data_consistency(x, y, torch.tensor(0.25), backend)
        assert found.dtype == dtype
        torch.testing.assert_close(found, 0.75 * x + 0.25 * y.to(dtype))


@pytest.mark.parametrize("op", [lambda x, w: ops.shrink(x, w), lambda x, w: ops.data_consistency(x, x, w)])
def test_weights_of_more_than_one_number_are_refused(op):
    with pytest.raises(ValueError, match=r"(lam|mu) must be a tensor of one number, got \(4, 1, 1\)"):
        op(state(2, 4, 3, 5), torch.rand(4, 1, 1))


def widened(step, name):
    """A step whose named parameter has a row too many."""
    *path, last = name.split(".")
    owner = step.get_submodule(".".join(path))
    shape = getattr(owner, last).shape
    setattr(owner, last, torch.nn.Parameter(torch.randn(shape[0] + 1, *shape[1:])))
    return step


NETWORK = ("weight1", "norm1.log_scale", "norm1.bias", "weight2", "norm2.log_scale", "norm2.bias", "weight3", "bias3",
           "logs")  # fmt: skip


@pytest.mark.parametrize("memory", ["recompute", "store", "checkpoint"])
@pytest.mark.parametrize("name", NETWORK)
def test_a_network_s_parameter_of_another_size_is_refused(backend, memory, name):
    """Where kernels would read or write beyond it."""
    step = widened(StepOfFlow(4, hidden=6), f"coupling.net.{name}").eval()
    with pytest.raises(ValueError, match="^a coupling network from 2 to 4 channels with [67] hidden ones wants"):
        step(state(1, 4, 3, 3), memory=memory, backend=backend)


@pytest.mark.parametrize(("few", "out"), [(1, 4), (4, 4), (2, 2), (2, 8)])
def test_a_network_for_another_number_of_channels_is_refused(backend, few, out):
    step = StepOfFlow(4, network=lambda i, o: CouplingNet(few, out, 6)).eval()
    with pytest.raises(ValueError, match="^a coupling network from 2 to 4 channels with 6 hidden ones wants weights"):
        step(state(1, 4, 3, 3), backend=backend)


@pytest.mark.parametrize("name", ["conv.lower", "conv.upper", "conv.log_s", "actnorm.log_scale", "actnorm.bias"])
def test_factors_of_another_size_are_refused(backend, name):
    step = widened(StepOfFlow(4, hidden=6), name).eval()
    with pytest.raises(ValueError, match="want"):
        step(state(1, 4, 3, 3), backend=backend)


def test_raw_operators_refuse_shapes_that_do_not_fit(backend):
    """A size at a time: none may be taken for another's."""
    for name, call in raw_calls(backend):
        shaped = [i for i, a in enumerate(call) if isinstance(a, torch.Tensor) and a.dim()]
        for i in shaped[1:]:
            other = [*call[:i], torch.cat([call[i], call[i]]), *call[i + 1 :]]
            if name != "data_consistency":  # torch.lerp, which raises for itself
                with pytest.raises(ValueError, match="wants"):
                    getattr(ops.raw, name)(*other)
