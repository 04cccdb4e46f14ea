"""What a training step of the unfolded network keeps for backward: flat in depth, a few images a fold, any operator."""

import pytest

from bench import folds, memory


@pytest.fixture(scope="module")
def kept():
    """Images kept for each image, by (operator, memory mode, folds, depth)."""
    keys = [(name, "recompute", k, depth) for name in folds.OPERATORS for k, depth in ((1, 2), (3, 2), (3, 6))]
    keys += [("blur", "store", k, depth) for k, depth in ((1, 2), (3, 2), (3, 6))]
    cases = [{"operator": name, "memory": mode, "folds": k, "depth": depth} for name, mode, k, depth in keys]
    return dict(zip(keys, memory.measure(folds.per_image, cases=cases), strict=True))


@pytest.mark.parametrize("name", folds.OPERATORS)
def test_memory_is_flat_in_depth_and_a_few_images_a_fold(name, kept):
    assert kept[name, "recompute", 3, 6] == pytest.approx(kept[name, "recompute", 3, 2], abs=0.5)
    # Fold boundaries, latents, and what autograd keeps of the measurement: the step in mu, FFTs, mirrored borders.
    a_fold = (kept[name, "recompute", 3, 2] - kept[name, "recompute", 1, 2]) / 2
    assert 4 < a_fold < (10 if name == "blur, reflect" else 8)


def test_stored_it_grows_with_depth(kept):
    assert kept["blur", "store", 3, 6] > 2 * kept["blur", "store", 3, 2] > 3 * kept["blur", "recompute", 3, 2]


def test_the_table_prints(capsys, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda function, cases, timeout: [1.5] * len(cases))
    folds.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 3 * len(folds.OPERATORS) and lines[-1].endswith("| 1.5 | 1.5 | 1.5 | 1.5 |")
