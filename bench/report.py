"""`python -m bench.report`: Markdown tables and plots of a machine's stored figures, bench/results/<machine>-*.json.

--readme puts the training step's most telling rows between the README's marks, and the plots into docs/. A row that
failed its correctness check shows why, and no ratio.
"""

import argparse
import json
from pathlib import Path

from bench import plots
from bench.results import RESULTS, ROOT, machine

MIB = 1 << 20
TOPICS = ("models", "ops", "scaling")
README_ROWS = ("PyTorch", "PyTorch, torch.compile", "PyTorch, checkpoint", "normflows", "memcnn", "flowkern store",
               "flowkern recompute", "PyTorch, torch.compile, bf16 network", "flowkern recompute, bf16 network")
README_PLOTS = ("bench-memory-depth", "bench-memory-time")
START = "<!-- What follows is written by `python -m bench.report --readme`. -->"
END = "<!-- End of what `python -m bench.report --readme` writes. -->"


def markdown(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    rules = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *lines))


def duration(seconds: float, quartiles: tuple[float, ...] = ()) -> str:
    """In ms, or in µs where that is shorter to read, with quartiles in brackets."""
    scale, digits, unit = (1e6, 0, "µs") if seconds < 1e-3 else (1e3, 1 if seconds < 0.1 else 0, "ms")
    spread = f" ({'–'.join(f'{scale * q:.{digits}f}' for q in quartiles)})" if quartiles else ""
    return f"{scale * seconds:.{digits}f} {unit}{spread}"


def verdict(row: dict) -> str:
    """The speed-up of a row that was found correct, else why there is none; in brackets that over the fastest in bf16,
    where it is one.
    """
    if row.get("correct") is not True or "speedup" not in row:
        return row.get("why", "unchecked")
    in_bf16 = f" ({row['speedup in bf16']:.2f})" if "speedup in bf16" in row else ""
    return f"{row['speedup']:.2f}{in_bf16}"


def model_table(group: dict) -> str:
    """One group of models."""
    trains = any("held" in row for row in group["rows"])
    head = ["", "network", "time (quartiles)", "items/s", f"× {group['baseline']}", "of product peak",
            *(["held MiB"] if trains else []), "peak MiB", "error"]
    lines = []
    for row in group["rows"]:
        if "unavailable" in row:
            lines.append([row["name"], row["network"], row["unavailable"], *[""] * (len(head) - 3)])
            continue
        sizes = [f"{row[key] / MIB:.1f}" if row.get(key) is not None else "–"
                 for key in (("held", "peak") if trains else ("peak",))]
        lines.append([row["name"], row["network"], duration(row["median"], row["quartiles"]),
                      f"{row['per second']:.1f}", verdict(row), f"{row['of peak']:.0%}", *sizes,
                      error(row)])
    return markdown(head, lines, left=2)


def error(row: dict) -> str:
    """A dash for what was not finite: stored figures have no number for it."""
    return "–" if row["error"] is None else f"{row['error']:.1e}"


def notes(group: dict) -> str:
    """What is not the same in the libraries' rows."""
    found = {row["name"]: row["note"] for row in group["rows"] if row.get("note") and ", " not in row["name"]}
    return "; ".join(f"{name}: {note}" for name, note in found.items())


def model_caption(group: dict, figures: dict) -> str:
    setup = group["setup"]
    rates = ", ".join(f"{p} {rate / 1e9:.0f}" for p, rate in group["product flops per second"].items())
    images = "image" if setup["batch"] == 1 else "images"
    bf16 = group.get("bf16 baseline")
    brackets = f"; in brackets to {bf16}, the fastest in bf16" if bf16 else ""
    return (f"{group['what']}: L={setup['levels']}, K={setup['depth']}, hidden {setup['hidden']}, "
            f"{setup['batch']} {images} of {setup['size']}×{setup['size']}, {setup['scale']} scale. Medians of "
            f"{group['rounds']} rounds in which all rows take turns; a ratio is the median of the rounds' "
            f"ratios{brackets}. Of the product peak: the networks' operations as sums over taps, of which Winograd "
            f"needs fewer, recomputed ones included, against the fastest of the same rounds' matrix products ({rates} "
            f"GFLOP/s). {where(figures)}")


def where(figures: dict) -> str:
    found = figures["environment"]
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items()
                          if version and name in ("torch", "normflows", "FrEIA", "nflows", "memcnn"))
    busy = f"; {figures['load before']:.1f} processes of others were running" \
        if figures.get("load before", 0) > 0.5 else ""
    return (f"{found['processor']}, {found['threads']} threads, {found['instruction set']}; {libraries}; commit "
            f"{found['commit']}{busy}.")


def ops_table(figures: dict) -> str:
    head = ["op", "C", "pixels", "backend", "time", "GB/s", "× eager", "of the bound", "bound by", "error",
            "eager form"]
    lines = []
    for group in figures["groups"].values():
        case = group["case"]
        for row in group["rows"]:
            name = case["op"] if case["scale"] == "softclamp" else f"{case['op']}, {case['scale']}"
            lines.append([f"`{name}`", str(case["channels"]), f"{case['batch']}·{case['side']}²", row["name"],
                          duration(row["median"]), f"{row['bytes per second'] / 1e9:.0f}", verdict(row),
                          f"{row['of bound']:.0%}", row["bound by"], error(row),
                          row["form"] if row["rival"] else ""])
    return markdown(head, lines, left=1)


# What all machines are shown by: a column's head -> work and row.
SHOWN = {"training step, stored": ("train", "flowkern store"), "recomputed": ("train", "flowkern recompute"),
         "recomputed, bf16 network": ("train", "flowkern recompute, bf16 network"),
         "log_prob": ("log_prob", "flowkern recompute"), "inverse": ("inverse", "flowkern recompute"),
         "unfolded training step": ("denoise", "flowkern recompute")}


def machines_table(folder: Path) -> str:
    """Every machine that has figures of models, by its files' name: ratios to the fastest rival in single precision,
    and to the fastest in bf16. A star: other programs kept as many processors busy as there are.
    """
    suffix, lines = "-models.json", []
    for name in sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")):
        figures = json.loads((folder / f"{name}{suffix}").read_text())
        found = {(work, r["name"]): verdict(r) for work, group in figures["groups"].items() for r in group["rows"]
                 if "unavailable" not in r}
        ratios = [found.get(shown, "–") for shown in SHOWN.values()]
        about = figures["environment"]
        busy = figures.get("load before", 0) >= about["threads"]
        lines.append([name + "\\*" * busy, *ratios, about["commit"][:7]])
    return markdown(["machine", *SHOWN, "commit"], lines)


def scaling_tables(groups: dict) -> str:
    """Memory against depth; and, for each time sweep, the fit."""
    parts = []
    if "memory" in groups:
        points = groups["memory"]["points"]
        depths = sorted({int(k) for found in points.values() for k in found})
        lines = [[name, *(f"{p['held'] / MIB:.1f} / {p['peak'] / MIB:.1f}" if (p := found.get(str(k))) else "–"
                          for k in depths)] for name, found in points.items()]
        parts.append(markdown(["held / peak, MiB", *(f"K={k}" for k in depths)], lines))
    for sweep, group in groups.items():
        if sweep == "memory":
            continue
        values, lines = list(next(iter(group["points"].values()))), []
        for name, points in group["points"].items():
            xs = [plots.abscissa(sweep, v) for v in points]
            slope, intercept, off = plots.line_fit(xs, [1e3 * p["median"] for p in points.values()])
            low, bend, high = plots.bend(xs, [p["seconds"] for p in points.values()])
            lines.append([name, *(f"{1e3 * p['median']:.0f}" for p in points.values()),
                          f"{intercept:.0f} + {slope:.2g} {sweep if sweep != 'size' else 'kilopixels'}", f"{off:.0%}",
                          f"{bend:+.0%} ({low:+.0%} to {high:+.0%})"])
        head = [f"ms against {sweep}", *values, "fit, ms", "furthest from it", "bend (quartiles)"]
        parts.append(markdown(head, lines))
    return "\n\n".join(parts)


def draw(topics: dict[str, dict], folder: Path, suffix: str = "svg") -> list[Path]:
    """Every plot that the figures allow, into a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    scaling, models = (topics.get(t, {}).get("groups", {}) for t in ("scaling", "models"))
    sweeps = [scaling[s] for s in ("depth", "batch", "size") if s in scaling]
    plans = [("bench-memory-depth", plots.memory_against_depth, scaling.get("memory")),
             ("bench-time", plots.time_against, sweeps),
             ("bench-memory-time", plots.memory_against_time, models.get("train"))]
    made = []
    for name, plot, data in plans:
        if data:
            plot(data, folder / f"{name}.{suffix}")
            made.append(folder / f"{name}.{suffix}")
    return made


def load(folder: Path, name: str) -> dict[str, dict]:
    """Topic -> figures of one machine."""
    return {t: json.loads(p.read_text()) for t in TOPICS if (p := folder / f"{name}-{t}.json").exists()}


def chosen(folder: Path, name: str | None) -> str:
    """The machine of that name, or this one. Raises FileNotFoundError where it has no figures."""
    names = sorted(p.name.removesuffix("-models.json") for p in folder.glob("*-models.json"))
    if not names:
        raise FileNotFoundError(f"no figures in {folder}: run pytest bench --benchmark-only")
    if (name or machine()) not in names:
        raise FileNotFoundError(f"no figures of {name or machine()} in {folder}; --machine takes {', '.join(names)}")
    return name or machine()


def readme_block(topics: dict[str, dict], plots_made: list[Path]) -> str:
    """The training step's table, its caption, and pictures."""
    group, growth = topics["models"]["groups"]["train"], topics.get("scaling", {}).get("environment", {})
    shown = {**group, "rows": [row for row in group["rows"] if row["name"] in README_ROWS]}
    pictures = "\n".join(f"![]({p.relative_to(ROOT)})" for p in plots_made
                         if p.is_relative_to(ROOT) and p.stem in README_PLOTS)
    pictures += f"\n\nMemory against depth was measured at commit {growth['commit']}." if growth else ""
    parts = (model_table(shown), model_caption(group, topics["models"]), notes(shown), pictures)
    return "\n\n".join(part for part in parts if part)


def with_block(text: str, block: str) -> str:
    """`text` with what stands between the marks replaced. Raises ValueError where there are none."""
    if START not in text or END not in text:
        raise ValueError(f"no {START} and {END}")
    before, rest = text.split(START, 1)
    return f"{before}{START}\n\n{block}\n\n{END}{rest.split(END, 1)[1]}"


def page(topics: dict[str, dict], folder: Path) -> str:
    """Everything that is stored of a machine, and all machines side by side, as one page."""
    parts = []
    for name, group in topics.get("models", {}).get("groups", {}).items():
        parts.append(f"## {name}\n\n{model_table(group)}\n\n{model_caption(group, topics['models'])}\n\n{notes(group)}")
    if "ops" in topics:
        parts.append(f"## Pixel ops\n\n{ops_table(topics['ops'])}\n\n{where(topics['ops'])}")
    if "scaling" in topics:
        parts.append(f"## Growth\n\n{scaling_tables(topics['scaling']['groups'])}\n\n{where(topics['scaling'])}")
    parts.append("## Machines\n\nSpeed-up over the fastest rival in single precision, in brackets over the fastest in "
                 f"bf16 where that was measured.\n\n{machines_table(folder)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result files")
    parser.add_argument("--machine", help="the first part of the files' names (default: this machine)")
    parser.add_argument("--readme", action="store_true", help="write the README's table, and the plots into docs/")
    parser.add_argument("--plots", type=Path, help="a folder for the plots")
    parser.add_argument("--png", action="store_true", help="plots as PNG")
    arguments = parser.parse_args()
    try:
        topics = load(arguments.results, chosen(arguments.results, arguments.machine))
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.readme and "train" not in topics["models"]["groups"]:
        parser.error("these figures have no training step, which the README's table shows")
    folder = arguments.plots or (ROOT / "docs" if arguments.readme else None)
    made = draw(topics, folder, "png" if arguments.png else "svg") if folder else []
    if arguments.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_block(readme.read_text(), readme_block(topics, made)))
    else:
        print(page(topics, arguments.results), end="")


if __name__ == "__main__":
    main()
