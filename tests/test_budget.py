"""memory_budget: as many steps as fit keep their activations, with the same gradients. Bytes are in test_memory.py."""

import copy

import pytest
import torch
from helpers import gradients, random_steps, relative, small_glow
from test_chain import ConvNet
from unfolded_cases import make_net

import flowkern
from flowkern import budget, ops
from flowkern.audit import audit
from flowkern.layers import StepOfFlow, run_steps

SIZE, ALL = (8, 12), 1 << 40
LEVELS = (
    budget.Level(8, 8, 8192, 12, 12, 128, 4, 4, False),
    budget.Level(8, 8, 2048, 24, 24, 128, 4, 4, False),
    budget.Level(8, 8, 512, 48, 48, 128, 4, 4, False),
)
MACHINE = budget.Machine(threads=1, copies=0, tiled=False)


def made(**options):
    return small_glow((3, *SIZE), depth=3, **options)


def images(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.rand(4, 3, *SIZE, dtype=dtype)


def run(glow, reverse):
    """The Glow in a direction, as a function of (image or latent) -> (out, logdet)."""
    return (lambda z: glow.inverse(z.flatten(1), size=SIZE, return_logdet=True)) if reverse else glow


def partly(glow, reverse):
    """A budget in which a level keeps some of its steps."""
    return next(b for plan, b in every_plan(copy.copy(glow), reverse).items() if 1 in plan)


def every_plan(glow, reverse):
    """A budget for each way to keep steps that budgets lead to."""
    found = {}
    for bytes_ in range(0, 4 << 20, 1 << 11):
        glow.memory_budget = bytes_
        found.setdefault(glow.kept_steps(4, SIZE, inverse=reverse), bytes_)
    return found


@pytest.mark.parametrize("network", [None, ConvNet], ids=["standard", "own network"])
@pytest.mark.parametrize("kept_steps, anchor_every", [(1, None), (2, 1), (3, None)])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_a_chain_that_keeps_steps(network, kept_steps, anchor_every, reverse):
    steps, parameters = random_steps(3, 4, network=network)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        return run_steps(steps, x, reverse=reverse, kept_steps=kept_steps, anchor_every=anchor_every)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_recompute_and_of_store(backend, reverse):
    glow = made(backend=backend)
    function, parameters = run(glow, reverse), list(glow.parameters())
    recomputed = gradients(function, images(), parameters)
    glow.memory = "store"
    stored = gradients(function, images(), parameters)
    glow.memory = "recompute"
    plans = every_plan(glow, reverse)
    assert set(plans) >= {(0, 0), (0, 3), (1, 3), (3, 3)}
    for plan, glow.memory_budget in plans.items():
        found = gradients(function, images(), parameters)
        exact = {(0, 0): recomputed, (3, 3): stored}.get(plan)
        for mine, a, b in zip(found, recomputed, stored, strict=True):
            assert relative(mine, a) < 1e-9 and relative(mine, b) < 1e-9
        assert exact is None or all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_level_that_keeps_steps_is_a_recomputed_chain_and_then_a_stored_one(reverse, dtype):
    torch.manual_seed(0)
    steps = torch.nn.ModuleList(StepOfFlow(4, hidden=6) for _ in range(4))
    for p in steps.parameters():
        torch.nn.init.normal_(p, std=0.2)
    options = {"reverse": reverse, "compute_dtype": dtype, "anchor_every": 1}

    def in_two(x):
        first, last = (steps[3:], steps[:3]) if reverse else (steps[:1], steps[1:])
        x, first_logdet = run_steps(first, x, **options)
        x, logdet = run_steps(last, x, memory="store", **options)
        return x, first_logdet + logdet

    x, parameters = torch.randn(2, 4, 6, 5), list(steps.parameters())
    found = gradients(lambda x: run_steps(steps, x, kept_steps=3, **options), x, parameters)
    for a, b in zip(found, gradients(in_two, x, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kept_steps_are_not_evaluated_again():
    torch.manual_seed(0)
    evaluations = []
    steps = torch.nn.ModuleList(StepOfFlow(4, network=ConvNet) for _ in range(5))
    for step in steps:
        step.coupling.net.register_forward_hook(lambda *_: evaluations.append(1))
    out, logdet = run_steps(steps, torch.randn(2, 4, 3, 3), kept_steps=2)
    assert len(evaluations) == 5
    (out.sum() + logdet.sum()).backward()
    assert len(evaluations) == 5 + 3


def test_without_gradients_a_level_is_one_chain(monkeypatch):
    glow, calls = made(memory_budget=ALL), []
    chain = ops.raw.chain
    monkeypatch.setattr(ops.raw, "chain", lambda *arguments: calls.append(arguments[-2]) or chain(*arguments))
    with torch.no_grad():
        glow(images())
    frozen = copy.deepcopy(glow).requires_grad_(False)
    frozen(images())
    assert calls == ["recompute"] * 4
    glow(images())
    assert calls[4:] == ["store"] * 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("anchor_every", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_beside_a_budget(monkeypatch, reverse, anchor_every, dtype):
    """Gradients are the same whichever steps are kept; budgets of so small a Glow don't lead to all of these."""
    glow = made(dtype=torch.float32, anchor_every=anchor_every, compute_dtype=dtype)
    function, parameters = run(glow, reverse), list(glow.parameters())
    wanted = gradients(function, images(torch.float32), parameters)
    glow.memory_budget = ALL
    for plan in ((0, 0), (1, 2), (0, 3), (2, 0), (3, 1), (3, 3)):
        monkeypatch.setattr(budget, "plan", lambda *_, plan=plan: plan)
        assert glow.kept_steps(4, SIZE, inverse=reverse) == plan
        found = gradients(function, images(torch.float32), parameters)
        for a, b in zip(found, wanted, strict=True):
            # Where rounding to bf16 falls otherwise, gradients differ by its precision.
            assert relative(a, b) < (1e-4 if dtype == torch.float32 else 0.05)


def test_autocast_is_what_the_plan_reckons_with():
    glow = flowkern.Glow((3, 64, 64), depth=8, hidden=128, memory_budget=40 << 20)
    single = glow.kept_steps(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert glow.kept_steps(8) != single
    glow.compute_dtype = torch.float64
    assert sum(glow.kept_steps(8)) < sum(single)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_larger_budget_keeps_no_step_less(reverse):
    seen = [budget._plan(LEVELS, mib << 20, 0, reverse, MACHINE) for mib in range(120)]
    assert seen[0] == (0, 0, 0) and seen[-1] == (8, 8, 8) and len(set(seen)) > 12
    for less, more in zip(seen, seen[1:], strict=False):
        assert all(a <= b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_plan_stays_within_its_budget_and_the_next_one_does_not(reverse):
    plans = list(budget.plans(LEVELS))
    for mib in range(30, 90, 7):
        plan = budget._plan(LEVELS, mib << 20, 0, reverse, MACHINE)
        assert budget.peak(LEVELS, plan, 0, reverse, MACHINE) <= mib << 20
        following = plans[plans.index(plan) + 1]
        assert budget.peak(LEVELS, following, 0, reverse, MACHINE) > mib << 20


def test_what_costs_memory_counts():
    """More threads, unfolded convolutions and anchors leave less; small levels are free forwards."""
    plain = budget.peak(LEVELS, (0, 0, 0), 0, False, MACHINE)
    assert budget.peak(LEVELS, (0, 0, 0), 0, False, MACHINE._replace(threads=8)) > plain
    assert budget.peak(LEVELS, (0, 0, 0), 0, False, MACHINE._replace(copies=9)) > 2 * plain
    assert budget.peak(LEVELS, (0, 0, 0), 0, False, MACHINE._replace(tiled=True)) < plain
    assert budget.peak(LEVELS, (0, 0, 0), 2, True, MACHINE) > plain
    assert budget.peak(LEVELS, (0, 0, 8), 0, False, MACHINE) == plain
    assert budget.peak(LEVELS, (0, 0, 8), 0, True, MACHINE) == plain + 8 * LEVELS[2].kept


def test_steps_are_kept_where_a_byte_saves_most_work():
    plans = list(budget.plans(LEVELS))
    assert plans[8] == (0, 0, 8) and plans[16] == (0, 8, 8) and plans[24] == (8, 8, 8) and len(plans) == 25


def test_a_budget_is_changed_at_run_time_and_not_saved(tmp_path):
    glow = made(dtype=torch.float32)
    assert glow.memory_budget is None and glow.kept_steps(4) == (0, 0)
    glow.memory_budget = ALL
    assert glow.kept_steps(4) == glow.kept_steps(4, SIZE, inverse=True) == (3, 3)
    assert copy.deepcopy(glow).memory_budget == ALL
    glow.save_pretrained(tmp_path)
    assert flowkern.Glow.from_pretrained(tmp_path).memory_budget is None
    assert flowkern.Glow.from_pretrained(tmp_path, memory_budget=1000).memory_budget == 1000
    assert glow.kept_steps(0) == (3, 3) and glow(images(torch.float32)[:0])[0].shape == (0, 288)
    glow.memory_budget = None
    glow.memory = "store"


def test_an_audit_measures_a_glow_with_a_budget():
    glow = made(memory_budget=ALL)
    assert audit(glow, images()).gradient < 1e-9 and glow.memory_budget == ALL


@pytest.mark.parametrize("reverse, sizes, dynamic", [(False, (4, 5), None), (True, (4,), None), (False, (4,), True)])
def test_compiled_whole(reverse, sizes, dynamic):
    glow = small_glow((3, *SIZE), levels=1, depth=2, hidden=128, dtype=torch.float32)
    glow.memory_budget = partly(glow, reverse)
    function, parameters = run(glow, reverse), list(glow.parameters())

    def value(x):
        out, logdet = function(x)
        return out.square().sum() + logdet.sum()

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in sizes:
        x = torch.randn(n, 3, *SIZE)
        for a, b in zip(*(torch.autograd.grad(f(x), parameters) for f in (compiled, value)), strict=True):
            torch.testing.assert_close(a, b)
    glow.memory_budget = 0
    torch.testing.assert_close(compiled(x), value(x))


def test_each_flow_of_an_unfolded_network_has_its_budget():
    net = make_net(folds=2)
    parameters = list(net.parameters())
    wanted = torch.autograd.grad(net(images()).square().sum(), parameters)
    for prox in net.proxes:
        prox.glow.memory_budget = partly(prox.glow, False)
    found = torch.autograd.grad(net(images()).square().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_second_derivatives_are_refused_unless_everything_is_kept():
    glow = made(memory_budget=0)
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="memory='recompute'.*use memory='store'"):
        torch.autograd.grad(glow.log_prob(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory_budget": True}, "memory_budget wants an int, in bytes, or None, got True"),
        ({"memory_budget": 1e6}, "memory_budget wants an int, in bytes, or None, got 1000000.0"),
        ({"memory_budget": "1G"}, "memory_budget wants an int, in bytes, or None, got '1G'"),
        ({"memory_budget": -1}, "memory_budget wants an int >= 0, got -1"),
        ({"memory_budget": 1, "memory": "store"}, "is for memory='recompute', and this Glow has memory='store'"),
        ({"memory_budget": 1, "memory": "checkpoint"}, "is for memory='recompute'"),
        ({"memory_budget": 1, "network": ConvNet}, "this Glow has another one; use memory='checkpoint' or 'store'"),
        ({"memory_budget": 1, "context_channels": 2}, "this Glow has another one"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        flowkern.Glow((2, 8, 8), levels=1, depth=1, hidden=2, **options)
    assert "\n" not in str(error.value)


def test_another_mode_beside_a_budget_is_refused():
    glow = made(memory_budget=1000)
    with pytest.raises(ValueError, match="memory='store' has no use for a memory_budget; set memory_budget to None"):
        glow.memory = "store"
    assert glow.memory == "recompute"
    for n in (-1, True, 2.0):
        with pytest.raises((TypeError, ValueError), match="n wants an int >= 0, got"):
            glow.kept_steps(n)
