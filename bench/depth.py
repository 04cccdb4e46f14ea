"""`python -m bench.depth`: memory of a training step over the depth K, ours and rivals.

Writes bench/results/memory.json and prints the table of docs/memory.md.
"""

from bench import results
from bench.contenders import CONTENDERS, NORMFLOWS, SETUP, memory
from bench.memory import measure

DEPTHS = (4, 8, 16, 32)
NAMES = (NORMFLOWS, "PyTorch", "PyTorch, checkpoint", "flowkern store", "flowkern checkpoint", "flowkern recompute",
         "flowkern recompute, bf16 network")
MIB = 1 << 20


def table(rows: list[dict]) -> str:
    """Held and peak MiB for each depth, as Markdown."""
    head = " | ".join(f"K={depth}" for depth in DEPTHS)
    lines = [f"| held / peak, MiB | {head} |", "|---|" + "---:|" * len(DEPTHS)]
    for row in rows:
        cells = [f"{found['held'] / MIB:.1f} / {found['peak'] / MIB:.1f}" for found in row["depths"].values()]
        lines.append(f"| {row['name']} | {' | '.join(cells or [row['unavailable']])} |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for name in NAMES:
        row = {"name": name, "depths": {}}
        rows.append(row)
        try:
            CONTENDERS[name].make(SETUP)
        except ImportError as error:
            row["unavailable"] = f"not measured: {error}"
            continue
        for depth in DEPTHS:
            row["depths"][depth] = measure(memory, name=name, depth=depth)
    results.write("memory", {"what": "allocated bytes of a training step without the parameters' gradients",
                             "setup": vars(SETUP) | {"depth": DEPTHS}, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
