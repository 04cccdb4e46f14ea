"""Time against depth, batch and image size, and memory against depth (`--full` alone)."""

from bench import scaling


def rows(full: bool) -> list[tuple[str]]:
    return [(sweep,) for sweep in (*scaling.SWEEPS, "memory")] if full else []


def test_scaling(row, book, benchmark):
    (sweep,) = row

    def measure() -> dict:
        run = scaling.memory if sweep == "memory" else lambda: scaling.times(sweep)
        book.group("scaling", sweep, run, [sweep for (sweep,) in rows(True)])

    benchmark.pedantic(measure, rounds=1)
