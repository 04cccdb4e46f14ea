"""What a training step of the unfolded network keeps for backward: an image a fold, whatever the depth and operator."""

import pytest
from helpers import footprints_of

from bench import folds, memory

EXACT = [name for name in folds.OPERATORS if name != "blur, reflect"]


@pytest.fixture(scope="module")
def kept():
    """Images kept for each image, by (operator, consistency, memory mode, folds, depth)."""
    sizes = ((2, 2), (4, 2), (4, 6))
    keys = [(name, "gradient", "recompute", k, depth) for name in folds.OPERATORS for k, depth in sizes]
    keys += [(name, "exact", "recompute", k, 2) for name in EXACT for k in (2, 4)]
    keys += [("blur", "gradient", "store", k, depth) for k, depth in sizes]
    names = ("operator", "consistency", "memory", "folds", "depth")
    cases = {key: dict(zip(names, key, strict=True)) for key in keys}
    flat = {"depth": 2, "kept_images": 1}
    cases |= {(n, "flat", k): flat | {"operator": n, "folds": k} for n in folds.OPERATORS for k in (2, 5)}
    return footprints_of(folds.per_image, cases)


@pytest.mark.parametrize("name", folds.OPERATORS)
def test_it_is_flat_in_depth_and_an_image_a_fold(name, kept):
    few, many, deep = (kept[name, "gradient", "recompute", k, depth] for k, depth in ((2, 2), (4, 2), (4, 6)))
    assert deep == pytest.approx(many, abs=0.05)
    assert (many - few) / 2 == pytest.approx(1, abs=0.05)  # the fold's result, where the next one starts
    assert few < 5.1  # beside folds: the start, the measurement as the proxes lay it out, and what the loss keeps


@pytest.mark.parametrize("name", EXACT)
def test_it_is_an_image_a_fold_with_exact_consistency(name, kept):
    few, many = (kept[name, "exact", "recompute", k, 2] for k in (2, 4))
    assert (many - few) / 2 == pytest.approx(1, abs=0.05) and few < 4.1


@pytest.mark.parametrize("name", folds.OPERATORS)
def test_with_one_image_kept_it_is_flat_in_folds(name, kept):
    assert kept[name, "flat", 5] == pytest.approx(kept[name, "flat", 2], abs=0.05)
    assert kept[name, "flat", 5] < 5.1


def test_the_peak_is_flat_in_folds_with_one_image_kept():
    """Tied: untied, each fold adds its parameters' own bookkeeping, whatever is kept."""
    case = {"operator": "blur", "tied": True, "depth": 2, "hidden": 32}
    cases = {(kept, k): case | {"folds": k, "kept_images": kept} for kept in (1, None) for k in (4, 12)}
    peak = footprints_of(folds.peaks, cases)
    image = 8 * 3 * 64**2 * 4 / 2**20
    assert peak[1, 12] - peak[1, 4] < image / 2  # eight folds more
    assert peak[None, 12] - peak[None, 4] > 8 * image


def test_stored_it_grows_with_depth(kept):
    few, many, deep = (kept["blur", "gradient", "store", k, depth] for k, depth in ((2, 2), (4, 2), (4, 6)))
    assert deep > 2 * many > 2 * few > 20 * kept["blur", "gradient", "recompute", 4, 2]


def test_the_table_prints(capsys, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda function, cases, timeout: [1.5] * len(cases))
    folds.main()
    lines = capsys.readouterr().out.splitlines()
    held, peaks, times = 5 * len(folds.OPERATORS) - 1, 2 * len(folds.OPERATORS) + 6, 3
    assert len(lines) == 4 + held + 5 + peaks + 5 + times
    assert lines[-times - 6].endswith("| 1.5 | 1.5 | 1.5 | 1.5 |") and lines[-1].endswith("|" + " 1.50 |" * 4)
