"""The pixel ops of each backend and instruction set against the fastest eager form and the bound of this run."""

import pytest

from bench import ops
from bench.native import not_compiled
from bench.pixels import implementations, measure
from flowkern import cpp


def rows(full: bool) -> list[tuple[str, str]]:
    return [(str(case), name) for case in ops.cases(full) for name in (*implementations(full), "PyTorch")]


def test_ops(row, book, full, report):
    case, name = row
    if why := cpp.probe() or not_compiled():
        pytest.skip(why)
    cases = {str(case): case for case in ops.cases(full)}
    found = book.group("ops", case, lambda: measure(cases[case], 25 if full else 11, implementations(full)), cases)
    report(case, next(r for r in found["rows"] if r["name"] == name))
