"""Allocated bytes of a training step, for K = 4 to 32 steps a level at L=3, hidden 128, 64x64, batch 8.

Counted above images, parameters and buffers; the parameters' gradients and the composed mixes stand apart, and are
bounded here too, so that nothing can hide among them. Native scratch is counted.
"""

import pytest
from helpers import footprints_of

from bench.workload import Setup, footprints

MIB = 1 << 20
BOOKKEEPING = 6553      # bytes of a step
DEPTHS = (4, 8, 16, 32)
BUDGETED = {
    **{f"{k}": {"depth": k} for k in (8, 16)},
    **{f"reverse {k}": {"depth": k, "reverse": True} for k in (8, 16)},
    "learned": {"depth": 8, "split_prior": "learned", "top_prior": "learned"},
    "bf16": {"depth": 16, "compute_dtype": "bfloat16"},
    "reference": {"depth": 8, "reverse": True, "backend": "reference"},
    "anchors": {"depth": 16, "anchor_every": 4},
}
CASES = {
    **{f"recompute {k}": {"depth": k} for k in DEPTHS},
    **{f"reverse {k}": {"depth": k, "reverse": True} for k in (4, 32)},
    **{f"own {k}": {"depth": k, "own": True} for k in (4, 16)},
    **{f"bf16 {k}": {"depth": k, "compute_dtype": "bfloat16"} for k in (4, 16)},
    "checkpoint": {"depth": 8, "memory": "checkpoint"},
    "anchors": {"depth": 16, "anchor_every": 4},
    "store": {"depth": 32, "memory": "store"},
    "store reverse": {"depth": 32, "memory": "store", "reverse": True},
    "store bf16": {"depth": 16, "memory": "store", "compute_dtype": "bfloat16"},
    **{
        f"budget {mib} {name}": {"memory_budget": mib * MIB, **case}
        for name, case in BUDGETED.items()
        for mib in (22, 40, 64)
    },
    "budget 1 8": {"depth": 8, "memory_budget": MIB},
    "budget all 16": {"depth": 16, "memory_budget": 1 << 40},
    "reference recompute": {"depth": 32, "backend": "reference"},
}


@pytest.fixture(scope="module")
def seen() -> dict[str, dict]:
    return footprints_of(footprints, CASES)


def state_bytes() -> int:
    """One state at each level."""
    setup = Setup()
    return sum(4 * setup.batch * c * (setup.size >> i + 1) ** 2 for i, c in enumerate(setup.channels()))


@pytest.mark.parametrize("lean, storing", [("recompute 32", "store"), ("reverse 32", "store reverse"),
                                           ("reference recompute", "store")])
def test_recompute_holds_and_peaks_at_a_fraction_of_store(seen, lean, storing):
    assert seen[lean]["held"] <= seen[storing]["held"] / 30
    assert seen[lean]["peak"] <= seen[storing]["peak"] / 15


def test_a_bf16_network_is_lean_too(seen):
    assert seen["bf16 16"]["held"] <= seen["store bf16"]["held"] / 30
    assert seen["bf16 16"]["peak"] < seen["recompute 16"]["peak"]


@pytest.mark.parametrize("direction", ["recompute", "reverse", "own", "bf16"])
def test_the_peak_does_not_grow_with_depth(seen, direction):
    """But for the objects of a step's 14 parameters and their gradients, a tenth of the smallest state."""
    peaks = {k: seen[f"{direction} {k}"]["peak"] for k in DEPTHS if f"{direction} {k}" in seen}
    (least, first), *_, (most, last) = peaks.items()
    assert most > least and last - first <= (most - least) * len(Setup().channels()) * BOOKKEEPING


def test_store_keeps_what_its_contract_says_and_no_more(seen):
    """Per step x, (raw_s, t) and two hidden activations; beside it the latents, their parts and small change."""
    for name, case in CASES.items():
        if case.get("memory") == "store" and "compute_dtype" not in case:
            contract = Setup(depth=case["depth"]).stored_bytes()
            assert contract <= seen[name]["held"] <= contract + 3 * state_bytes(), name
    setup = Setup(depth=16)
    half = (setup.stored_bytes() + setup.depth * state_bytes()) / 2     # x stays fp32, the network's tensors are bf16
    assert half <= seen["store bf16"]["held"] <= half + 3 * state_bytes()


def test_checkpoint_keeps_one_state_a_step(seen):
    contract = 8 * state_bytes()
    assert contract <= seen["checkpoint"]["held"] <= contract + 3 * state_bytes()


def test_anchors_cost_one_state_each(seen):
    anchors = 16 // 4 - 1
    extra = seen["anchors"]["held"] - seen["recompute 16"]["held"]
    assert extra == pytest.approx(anchors * state_bytes(), abs=0.1 * MIB)
    assert seen["anchors"]["peak"] - seen["recompute 16"]["peak"] <= extra + 0.1 * MIB


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_kept_and_used(seen, name):
    """The peak stays within it, and what fits is kept, but for a step and the margin of the model."""
    cases = [(mib, seen[f"budget {mib} {name}"]) for mib in (22, 40, 64)]
    step = Setup(depth=1).stored_bytes()
    for mib, found in cases:
        assert found["peak"] <= mib * MIB
        assert found["peak"] >= mib * MIB - 1.1 * step - 5 * MIB or name == "bf16"
    held = [found["held"] for _, found in cases]
    assert held == sorted(held) and held[-1] > held[0] + 20 * MIB


def test_a_budget_that_cannot_be_met_is_recompute(seen):
    assert seen["budget 1 8"]["held"] == pytest.approx(seen["recompute 8"]["held"], abs=0.05 * MIB)
    assert seen["budget 1 8"]["peak"] == pytest.approx(seen["recompute 8"]["peak"], abs=0.3 * MIB)


def test_a_budget_for_everything_is_store(seen):
    assert seen["budget all 16"]["held"] == pytest.approx(Setup(depth=16).stored_bytes(), abs=3 * state_bytes())


def test_what_stands_apart_is_no_more_than_it_should_be(seen):
    for name, case in CASES.items():
        numbers = sum(4 * case["depth"] * c * c for c in Setup().channels())
        assert seen[name]["mixes"] <= 4 * numbers, name
        assert seen[name]["gradients"] == pytest.approx(seen[name]["parameters"], rel=0.02), name


def test_nothing_outlives_the_step_but_gradients(seen):
    for name, found in seen.items():
        assert found["gradient objects"] <= (64 << 10) + 1024 * found["parameter count"], name
