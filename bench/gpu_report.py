"""`python -m bench.gpu_report FILE`: what `bench.gpu` and `bench.gpu_network` measured, as docs/gpu-figures.md and, of
memory against depth, docs/gpu-memory.svg.
"""

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
    return list(found.values())


def by_form(rows: list[dict]) -> list[dict]:
    """One row a network's precision and sizes, with each form's microseconds, forward / backward."""
    found: dict = {}
    for row in rows:
        if "forward us" in row and "backward us" in row:
            sizes = {name: row[name] for name in ("precision", "hidden", "batch", "channels")}
            entry = found.setdefault(tuple(sizes.values()), sizes)
            times = f"{row['forward us']:.0f} / {row['backward us']:.0f}"
            entry[row["form"]] = times if row.get("correct", True) else f"wrong by {row['error']:.1e}"
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
        copied, *ops = figures["ops"]
        (what, speed), *_ = copied.items()
        parts.append(
            f"## Pixel ops\n\nGB/s read and written; (raw_s, t) in bf16. For comparison, {what}: {speed:.0f}.\n\n"
            + markdown(by_backend(ops), {
                "op": "{op}", "C": "{channels}", "PyTorch": "{reference:.0f}", "Triton": "{triton:.0f}",
                "CUDA": "{cuda:.0f}",
            }) + "\n"
        )  # fmt: skip
    if networks := by_form(figures.get("networks", ())):
        parts.append(
            "## Coupling networks\n\nOne step's, forward / what backward does in recompute mode, microseconds, from a "
            "CUDA graph.\n\"cuDNN + ReLU\" is PyTorch's convolution with bias and ReLU fused."
            + (f" Cut short {told}: what is missing was not measured." if (told := figures.get("networks cut short"))
               else "") + "\n\n"
            + markdown(networks, {
                "network": "{precision}", "hidden": "{hidden}", "batch": "{batch}", "C": "{channels}",
                "PyTorch (cuDNN)": "{cudnn}", "cuDNN + ReLU": "{cudnn_relu}", "Triton": "{triton}",
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
        columns = {"": "{name}", "network": "{precision}", "MiB an image": "{MiB_per_image:.1f}", "batch": "{largest}"}
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
    network = arguments.file.with_name(arguments.file.name.replace("gpu-", "network-", 1))
    if network.is_file():
        found = json.loads(network.read_text())
        figures["networks"], figures["networks cut short"] = found["rows"], found.get("cut short")
    (arguments.folder / "gpu-figures.md").write_text(report(figures))
    if figures.get("depths"):
        plot(figures, arguments.folder / "gpu-memory.svg")


if __name__ == "__main__":
    main()
