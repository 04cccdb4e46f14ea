"""`python -m bench.report [FILE ...]`: Markdown tables of result files (default: bench/results/step.json)."""

import argparse
import json
from pathlib import Path

from bench.results import RESULTS

MIB = 1 << 20
VERDICTS = {True: "{:.2f}", False: "wrong gradient", None: "unchecked gradient"}


def table(figures: dict) -> str:
    """The training-step benchmark as Markdown. A row that failed its correctness check shows no ratio."""
    head = ["", "network", "ms (quartiles)", "images/s", f"× {figures['pacemaker']}", "of matmul peak", "held MiB",
            "peak MiB", "gradient error"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for row in figures["rows"]:
        if "unavailable" in row:
            lines.append([row["name"], row["network"], f"not measured: {row['unavailable']}", *[""] * (len(head) - 3)])
            continue
        low, high = (1e3 * q for q in row["quartiles"])
        useful = figures["flops"] / row["median"] / figures["matmul flops per second"][row["network"]]
        lines.append([row["name"], row["network"], f"{1e3 * row['median']:.0f} ({low:.0f}-{high:.0f})",
                      f"{row['images_per_second']:.1f}", VERDICTS[row.get("correct")].format(row["speedup"]),
                      f"{useful:.0%}", f"{row['held'] / MIB:.1f}", f"{row['peak'] / MIB:.1f}",
                      f"{row['gradient_error']:.1e}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(figures: dict) -> str:
    """One paragraph on what was measured where."""
    where, setup = figures["environment"], figures["setup"]
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in figures["matmul flops per second"].items())
    return (f"{figures['what']}; L={setup['levels']}, K={setup['depth']}, hidden {setup['hidden']}, "
            f"batch {setup['batch']}, {setup['size']}x{setup['size']}, {setup['scale']} scale; medians of "
            f"{setup['rounds']} steps, each beside one of {figures['pacemaker']}; {figures['flops'] / 1e9:.1f} GFLOP a "
            f"step when nothing is recomputed, matrix products in the same run (GFLOP/s): {peaks}. "
            f"{where['processor']}, {where['threads']} threads, {where['instruction set']}, "
            f"torch {where['versions']['torch']}, commit {where['commit']}.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / "step.json"], metavar="FILE")
    for file in parser.parse_args().files:
        figures = json.loads(file.read_text())
        print(f"{table(figures)}\n\n{caption(figures)}")


if __name__ == "__main__":
    main()
