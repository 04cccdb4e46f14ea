"""The pixel ops of each backend and instruction set against the fastest eager form and the bound of this run."""

import flowkern
from bench import ops
from bench.pixels import implementations, measure


def rows(full: bool) -> list[tuple[str, str]]:
    return [(str(case), name) for case in ops.cases(full) for name in (*implementations(full), "PyTorch")]


def test_ops(row, book, full, report):
    case, name = row
    cases = {str(case): case for case in ops.cases(full)}
    found = book.group("ops", case, lambda: measure(cases[case], 25 if full else 11, implementations(full)))
    report(next(r for r in found["rows"] if r["name"] == name))


def test_every_backend_of_this_machine_is_measured(benchmark):
    """A backend that runs on the CPU has a row."""
    benchmark.pedantic(lambda: None, rounds=1)
    measured = {name.split()[0] for name in implementations(full=True)}
    runs = {name for name, state in flowkern.backends().items() if state is True}
    assert runs - {"reference", "triton", "cuda"} <= measured
