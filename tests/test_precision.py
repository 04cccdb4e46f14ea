"""The bars that recomputation has to meet on trained weights, on a Glow small enough to be trained here.

`python -m bench.precision` is the same on L=4, K=32 after 600 steps; its figures are in docs/precision.md.
"""

import pytest

from bench import precision


@pytest.fixture(scope="module", params=precision.SCALES)
def trained(request):
    bits = []
    glow = precision.train(16, 2, 8, 8, request.param, steps=60, batch=16, report=lambda step, b: bits.append(b))
    assert sum(bits[-10:]) < sum(bits[:10]) - 5, "60 steps of training must get somewhere"
    return glow


def test_recomputed_gradient_is_as_good_as_the_stored_one(trained):
    for batch in range(3):
        errors = precision.gradient_errors(trained, precision.crops("test", 16, 16, epoch=batch))
        assert errors["recomputed"] <= max(2 * errors["stored"], 1e-4)
        assert errors["anchors every 2"] <= max(2 * errors["stored"], 1e-4)


def test_inverse_is_as_exact_as_the_reference(trained):
    errors = [precision.inversion_errors(trained, precision.crops("test", 16, 16, epoch=batch)) for batch in range(3)]
    assert max(e["fp32"]["ours"] for e in errors) <= 2 * max(e["fp32"]["reference"] for e in errors)
    assert max(e["fp64"]["ours"] for e in errors) <= 1e-9


def test_errors_are_seen_to_grow_with_stress_and_anchors_to_bound_them(trained):
    x = precision.crops("test", 16, 16)
    moved = precision.stressed(trained, 2.0)
    before, after = (precision.inversion_errors(glow, x)["fp32"]["ours"] for glow in (trained, moved))
    assert after > before
    free, anchored = precision.growth(moved, x, None), precision.growth(moved, x, 2)
    assert len(free) == 9 and free[0] == 0 and free[-1] > free[1] > 0
    assert anchored[1:3] == free[1:3] and anchored[-1] < free[-1]
