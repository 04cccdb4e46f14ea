"""Time against depth, batch and image size, and memory against depth (`--full` alone)."""

from bench import scaling


def rows(full: bool) -> list[tuple[str]]:
    return [(sweep,) for sweep in (*scaling.SWEEPS, "memory")] if full else []


def test_scaling(row, book, benchmark):
    (sweep,) = row

    def measure() -> dict:
        book.group("scaling", sweep, scaling.memory if sweep == "memory" else lambda: scaling.times(sweep))

    benchmark.pedantic(measure, rounds=1)
