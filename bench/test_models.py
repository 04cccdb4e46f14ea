"""One step of flow, Glow's training step, log_prob, inverse and samples, the unfolded denoiser, and a small model."""

import functools

import pytest

from bench.contenders import FAMILIES, chosen
from bench.models import Family
from bench.workload import Setup

GLOW = Setup(scale="sigmoid")                   # the scale that the rivals have
WIDE = Setup(scale="sigmoid", depth=4, hidden=512, batch=4)
SMALL = Setup(scale="sigmoid", levels=1, depth=2, size=8, batch=1)
DENOISER = Setup(depth=4, hidden=64, size=32, batch=4)
INFERENCE = ("log_prob", "inverse", "sample")
# Name of the group -> family, set-up, work, and the works that share the group's models.
GROUPS = {
    **{f"step C={12 * 2 ** (levels - 1)}": ("step", Setup(scale="sigmoid", levels=levels, depth=1), "step", ("step",))
       for levels in (1, 2, 3)},
    **{work: ("glow", GLOW, work, ("train", *INFERENCE)) for work in ("train", *INFERENCE)},
    "denoise": ("unfolded", DENOISER, "denoise", ("denoise",)),
    "small log_prob": ("small", SMALL, "log_prob", ("log_prob",)),
}
FULL_GROUPS = {
    **{f"wide {work}": ("glow", WIDE, work, ("train", "log_prob", "inverse"))
       for work in ("train", "log_prob", "inverse")},
    "small train": ("small", SMALL, "train", ("train",)),
}


def groups(full: bool) -> dict:
    return GROUPS | (FULL_GROUPS if full else {})


def rows(full: bool) -> list[tuple[str, str]]:
    return [(group, name) for group, (family, _, work, _) in groups(full).items()
            for name, contender in chosen(family, full).items() if contender.does(work, full)]


@functools.lru_cache(maxsize=1)
def family(*arguments) -> Family:
    """One at a time, so that only its models are in memory."""
    return Family(*arguments)


def test_models(row, book, full, report):
    group, name = row
    kind, setup, work, works = groups(full)[group]
    assert name in FAMILIES[kind]

    def measure() -> dict:
        return family(kind, setup, works, full).measure(work, 25 if full else 7)

    found = book.group("models", group, measure, groups(full))
    report(group, next(r for r in found["rows"] if r["name"] == name))


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    family.cache_clear()
