"""The benchmarks' plots, in docs/: memory against depth, time against depth, batch and size, memory against time."""

from pathlib import Path

import numpy as np

MIB = 1 << 20
OURS = {"flowkern store": "#1b6ca8", "flowkern recompute": "#c0392b", "flowkern checkpoint": "#7d3c98",
        "flowkern recompute, budget 24 MiB": "#d98880", "flowkern recompute, budget 48 MiB": "#76448a",
        "flowkern recompute, bf16 network": "#e67e22", "flowkern store, bf16 network": "#16a085"}
RIVALS = "#555555"
MARKERS = "osD^vP*XhHp<>8d"


def line_fit(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and the largest deviation from the line, as a fraction of the value there."""
    slope, intercept = np.polyfit(xs, ys, 1, w=1 / np.array(ys))
    fitted = slope * np.array(xs) + intercept
    return float(slope), float(intercept), float(np.max(np.abs(np.array(ys) / fitted - 1)))


def bend(xs: list[float], seconds: list[list[float]]) -> tuple[float, float, float]:
    """What x^2 has of the time at the largest x, where a parabola is fitted to each round: quartiles and median, lower
    quartile first. Nothing, for what grows linearly; all of it, for what grows with the square.
    """
    found = []
    for ys in zip(*seconds, strict=True):
        square, *_ = np.polyfit(xs, ys, 2, w=1 / np.array(ys))
        found.append(square * max(xs) ** 2 / ys[int(np.argmax(xs))])
    return tuple(float(q) for q in np.percentile(found, [25, 50, 75]))


def abscissa(sweep: str, value: str) -> float:
    """What the cost should be proportional to: for an image's side, its pixels."""
    return float(value) ** 2 / 1000 if sweep == "size" else float(value)


def style(name: str, index: int) -> dict:
    color = OURS.get(name, RIVALS)
    return {"color": color, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "label": name}


def memory_against_depth(group: dict, path: Path) -> None:
    figure, axes = _figure(1, 6.4)
    for index, (name, points) in enumerate(group["points"].items()):
        found = [(int(k), p["peak"] / MIB) for k, p in points.items() if p.get("peak")]
        if found:
            axes.plot(*zip(*found, strict=True), linewidth=1.2, **style(name, index))
    axes.set(xscale="log", yscale="log", xlabel="steps of flow a level, K", ylabel="peak above the model, MiB")
    axes.set_xticks(depths := sorted({int(k) for p in group["points"].values() for k in p}), map(str, depths))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def time_against(groups: list[dict], path: Path) -> None:
    """A panel a sweep; the line through each contender's points is their fit."""
    figure, panels = _figure(len(groups), 4.2 * len(groups))
    labels = {"depth": "steps of flow a level, K", "batch": "images a batch", "size": "pixels an image, thousands"}
    for axes, group in zip(np.atleast_1d(panels), groups, strict=True):
        for index, (name, points) in enumerate(group["points"].items()):
            xs = [abscissa(group["sweep"], value) for value in points]
            ys = [1e3 * p["median"] for p in points.values()]
            slope, intercept, _ = line_fit(xs, ys)
            look = style(name, index)
            axes.plot(xs, ys, linestyle="none", **look)
            axes.plot([0, max(xs)], [intercept, slope * max(xs) + intercept], color=look["color"], linewidth=0.8)
        axes.set(xlabel=labels[group["sweep"]], ylabel="ms a training step", xlim=(0, None), ylim=(0, None))
    np.atleast_1d(panels)[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def memory_against_time(group: dict, path: Path) -> None:
    """Every row of the training step a point: left is fast, low is lean."""
    figure, axes = _figure(1, 7.2)
    rows = [row for row in group["rows"] if row.get("correct") and row.get("peak")]
    for index, row in enumerate(rows):
        look = style(row["name"], index)
        low, high = (abs(q - row["median"]) * 1e3 for q in row["quartiles"])
        axes.errorbar(1e3 * row["median"], row["peak"] / MIB, xerr=[[low], [high]], linestyle="none", linewidth=0.8,
                      **look)
    axes.set(yscale="log", xlabel="ms a training step (median and quartiles)", ylabel="peak above the model, MiB",
             xlim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _figure(panels: int, width: float):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flowkern"        # the same figures make the same file
    from matplotlib import pyplot as plt

    return plt.subplots(1, panels, figsize=(width + 2, 4), layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)
