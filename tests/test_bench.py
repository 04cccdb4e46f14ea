"""What the benchmark compares must be the same function; what its report prints must follow from its checks."""

import copy

import pytest
import torch

from bench import contenders, report
from bench.rivals import NormFlows, Reference
from bench.workload import Setup

SMALL = Setup(levels=2, depth=2, hidden=16, size=16, batch=4, scale="sigmoid")


@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_every_row_computes_the_same_likelihood(name):
    contender, x = contenders.CONTENDERS[name], SMALL.images()
    model = contender.make(SMALL)
    expected = SMALL.glow().double().log_prob(x.double())
    tolerance = 1e-5 if contender.network == "fp32" else 1e-2
    assert torch.allclose(model.log_prob(x).double(), expected, rtol=tolerance)
    contenders.step(model, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_normflows_has_the_same_parameters_but_the_last_scales():
    glow = SMALL.glow()
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (glow, NormFlows(glow)))
    assert ours - theirs == SMALL.depth * sum(SMALL.channels())
    with pytest.raises(ValueError, match="sigmoid"):
        NormFlows(Setup(levels=1, depth=1, hidden=4, size=8).glow())


def test_checkpointed_and_plain_reference_have_the_same_gradient():
    glow, x = SMALL.glow().double(), SMALL.images().double()
    plain = contenders.gradient(Reference(glow), x)
    assert torch.allclose(contenders.gradient(Reference(glow, checkpointed=True), x), plain, rtol=1e-12)
    before = copy.deepcopy(glow.state_dict())
    assert all(torch.equal(before[name], value) for name, value in glow.state_dict().items())


def figures(**row):
    row = {"name": "ours", "network": "fp32", "median": 0.1, "quartiles": [0.09, 0.12], "images_per_second": 80.0,
           "speedup": 3.21, "held": 1 << 20, "peak": 3 << 20, "gradient_error": 2e-5} | row
    return {"pacemaker": "normflows", "flops": 10**9, "matmul flops per second": {"fp32": 10**11}, "rows": [row]}


def test_a_row_shows_its_ratio_only_when_its_gradient_was_checked():
    assert "| 3.21 |" in report.table(figures(correct=True)) and "| 10% |" in report.table(figures(correct=True))
    for row in (figures(correct=False), figures()):
        assert "3.21" not in report.table(row) and "gradient |" in report.table(row).splitlines()[2]
    assert "not measured: no module" in report.table(figures(unavailable="no module"))
