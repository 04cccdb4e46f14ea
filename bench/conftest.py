"""`pytest bench --benchmark-only`: quick, or everything with `--full`; results go to bench/results/<machine>-*.json.

Rows of a group are measured taking turns, before the first of them is reported; pytest-benchmark is then told the
times. With FLOWKERN_CPU_ISA=avx2 in the environment PyTorch and its libraries are held to AVX2, too; the files are then
<machine>-as-avx2-*.json.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

if os.environ.get("FLOWKERN_CPU_ISA") == "avx2":    # before anything imports torch
    os.environ.update(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")

from bench import results  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="benchmarks: every row and size, more rounds, the sweeps")
    parser.addoption("--results", type=Path, default=results.RESULTS, help="benchmarks: the folder of the result files")


def pytest_generate_tests(metafunc):
    """Parametrise `row` by the module's `rows(full)`."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.module.rows(metafunc.config.getoption("--full"))
        metafunc.parametrize("row", rows, ids=["-".join(map(str, row)) for row in rows])


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


class Book:
    """Groups by name, measured once, and written into the result file of their topic as soon as they are.

    What is there from another commit gives way to all groups together: until they are measured, and where only some
    are asked for, the new ones are in a file beside it, *-partial.json. Groups of the same code are added to.
    """

    def __init__(self, folder: Path, full: bool):
        self._folder = folder
        # Processes that other programs keep busy: with as many as there are cores, no figure means anything.
        self._about = {"full": full, "load before": os.getloadavg()[0]}
        self._groups: dict[str, dict[str, dict]] = {}
        self.written: set[Path] = set()

    def group(self, topic: str, name: str, measure: Callable[[], dict], every: Collection[str]) -> dict:
        """every: the names of all groups of the topic."""
        groups = self._groups.setdefault(topic, {})
        if name not in groups:
            groups[name] = measure()
            self._write(topic, groups, every)
        return groups[name]

    def _write(self, topic: str, groups: dict[str, dict], every: Collection[str]) -> None:
        whole, partial = (f"{results.machine()}-{topic}{end}" for end in ("", "-partial"))
        stored = {name: json.loads(path.read_text()) if (path := self._folder / f"{name}.json").exists() else None
                  for name in (whole, partial)}
        alike = [name for name, found in stored.items() if found is not None and results.same(found, self._about)]
        for name in alike:
            groups = stored[name]["groups"] | groups
        groups = {name: groups[name] for name in every if name in groups}
        replaces = stored[whole] is None or whole in alike or len(groups) == len(every)
        self.written.add(results.write(whole if replaces else partial, self._about | {"groups": groups}, self._folder))
        if replaces:
            (self._folder / f"{partial}.json").unlink(missing_ok=True)
            self.written = {path for path in self.written if path.exists()}


BOOK = pytest.StashKey[Book]()


def pytest_terminal_summary(terminalreporter, config):
    for path in sorted(config.stash[BOOK].written) if BOOK in config.stash else ():
        terminalreporter.write_line(f"figures: {path}")


@pytest.fixture(scope="session")
def book(request, full) -> Book:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.exit("benchmarks take turns in one process: leave out -n", 4)
    folder = request.config.getoption("--results")
    try:        # before anything is measured
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        pytest.exit(f"--results {folder} can't be written: {error}", 4)
    gc.freeze()     # collections before each group don't search through what was imported
    request.config.stash[BOOK] = Book(folder, full)
    return request.config.stash[BOOK]


class Clock:
    """A clock for pytest-benchmark on which each call of `tick` takes as long as a measurement did."""

    def __init__(self) -> None:
        self._now, self._seconds = 0.0, iter(())

    def __call__(self) -> float:
        return self._now

    def load(self, seconds: list[float]) -> None:
        self._seconds = iter(seconds)

    def tick(self) -> None:
        self._now += next(self._seconds, 0.0)


CLOCK = Clock()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def report(benchmark):
    """Hand a measured row to pytest-benchmark, with its other figures; skips one that can't run here, fails one that is
    wrong."""

    def hand_over(group: str, row: dict) -> None:
        benchmark.group = group
        if "unavailable" in row:
            pytest.skip(row["unavailable"])
        CLOCK.load(row["seconds"])
        benchmark.extra_info.update({k: v for k, v in row.items() if isinstance(v, int | float | str)})
        benchmark.pedantic(CLOCK.tick, rounds=len(row["seconds"]))
        assert row["correct"] or row["rival"], row["why"]

    return hand_over
