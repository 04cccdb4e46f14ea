"""`python -m bench.gpu_report FILE`: what `bench.gpu` measured, as docs/gpu.md and docs/gpu-memory.svg."""

import argparse
import json
from pathlib import Path

from bench.results import ROOT


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a table. columns: heading -> a format string over the row's fields; one that is absent shows a dash."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(row, template) for template in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: dict, template: str) -> str:
    try:
        return template.format(**{k.replace(" ", "_").replace("/", "_"): v for k, v in row.items()})
    except (KeyError, TypeError):
        return "–"


def by_backend(rows: list[dict]) -> list[dict]:
    """One row an op and channel count, with each backend's GB/s."""
    found: dict = {}
    for row in rows:
        entry = found.setdefault((row["op"], row["channels"]), {"op": row["op"], "channels": row["channels"]})
        entry[row["backend"]] = row["GB/s"]
        entry[f"{row['backend']} share"] = row["of copy"]
    return list(found.values())


def report(figures: dict) -> str:
    """The page."""
    where = figures["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    parts = [f"# On a GPU\n\n{where['device']}; {versions}; commit {where['commit']}. Made by `make gpu` and "
             "`python -m bench.gpu_report`.\n"]  # fmt: skip
    if "cut short" in figures:
        parts.append(f"Cut short {figures['cut short']}: what is missing was not measured.\n")
    if figures.get("ops"):
        copy, *ops = figures["ops"]
        parts.append(
            "## Pixel ops\n\nGB/s, and the share of the copy bandwidth of the same run "
            f"({copy['copy GB/s']:.0f} GB/s read and written); (raw_s, t) in bf16.\n\n"
            + markdown(by_backend(ops), {
                "op": "{op}", "C": "{channels}", "PyTorch": "{reference:.0f} ({reference_share:.0%})",
                "Triton": "{triton:.0f} ({triton_share:.0%})", "CUDA": "{cuda:.0f} ({cuda_share:.0%})",
            }) + "\n"
        )  # fmt: skip
    if steps := [row for row in figures.get("steps", ()) if "name" in row]:
        steps = sorted([*steps, *figures.get("compiled", ())], key=lambda row: row["precision"])
        peaks = [f"{r['precision']} {r['product TFLOP/s']:.0f}" for r in figures["steps"] if "product TFLOP/s" in r]
        parts.append(
            "## Training step\n\nForward, negative log-likelihood, backward; L=4, K=32, hidden 512, 64 images of "
            "64×64.\nLaunched from Python, and replayed from a CUDA graph. TFLOP/s: of the networks, in the faster of "
            "the two,\nwithout what backward computes again; matrix products of the same run reach "
            f"{', '.join(peaks)}.\n\n"
            + markdown(steps, {
                "": "{name}", "network": "{precision}", "launched, ms": "{ms:.0f}",
                "replayed, ms": "{graph_ms:.0f}", "TFLOP/s": "{network_TFLOP_s:.1f}", "held MiB": "{held_MiB:.0f}",
                "peak MiB": "{peak_MiB:.0f}", "gradient error": "{gradient_error:.1e}",
            }) + "\n"
        )  # fmt: skip
    if figures.get("batches"):
        columns = {"": "{name}", "network": "{precision}", "MiB an image": "{MiB_per_image:.1f}", "batch": "{batch}"}
        parts.append(f"## Largest batch of that model\n\n{markdown(figures['batches'], columns)}\n")
    if figures.get("depths"):
        columns = {"": "{name}", "K": "{depth}", "allocated GB": "{all_GB:.2f}", "published GB": "{published_GB}",
                   "ms": "{ms:.0f}"}  # fmt: skip
        parts.append(
            "## Memory against depth\n\n256×256, batch 8, L=3, width 256, fp32; published: normflows' Glow, measured "
            "by InvertibleNetworks.jl's authors on a GPU with 40 GB, on which K=64 did not fit.\n\n"
            "![](gpu-memory.svg)\n\n"
            + markdown(figures["depths"], columns) + "\n"
        )  # fmt: skip
    return "\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """Allocated memory against depth, the published curve beside ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = [row for row in figures["depths"] if row.get("all GB") is not None]
    for name in dict.fromkeys(row["name"] for row in rows):
        axes.plot(*zip(*[(r["depth"], r["all GB"]) for r in rows if r["name"] == name], strict=True), "o-", label=name)
    if published := sorted({(r["depth"], r["published GB"]) for r in rows if r.get("published GB")}):
        axes.plot(*zip(*published, strict=True), "x--", color="grey", label="normflows, published")
    axes.set(xlabel="steps of flow per level, K", ylabel="allocated at the peak, GB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("file", type=Path, help="bench/results/gpu-<device>.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the page and the plot go")
    arguments = parser.parse_args()
    figures = json.loads(arguments.file.read_text())
    (arguments.folder / "gpu.md").write_text(report(figures))
    if figures.get("depths"):
        plot(figures, arguments.folder / "gpu-memory.svg")


if __name__ == "__main__":
    main()
