"""Table 1 from trained runs: scores averaged over seeds, differences between proxes, the paper's figures beside."""

import math
from dataclasses import replace
from statistics import stdev

import torch

from train import evaluation, figures, report
from train.evaluation import Evaluation, Scores
from train.run import Run, load_network, method_of, references

# Wei et al., Table 1, in dB, at sigma 0.10, 0.15, 0.20, 0.25.
PAPER = {
    "resnet": {0.10: 28.567, 0.15: 28.029, 0.20: 27.054, 0.25: 25.489},
    "unet": {0.10: 29.228, 0.15: 28.920, 0.20: 28.180, 0.25: 25.770},
    "glow": {0.10: 29.423, 0.15: 29.009, 0.20: 28.236, 0.25: 26.633},
}
TITLES = {"resnet": "ResNet", "unet": "U-Net", "glow": "Glow"}
PAIRS = (("glow", "unet"), ("unet", "resnet"), ("glow", "resnet"))


def report_runs(campaign, settings, runs: dict[str, list[Run]], trials: dict[str, dict[float, float]]) -> None:
    """Evaluate all runs of each prox and the references; print the table, and leave it with denoised.png (Figure 1)."""
    base, folder = campaign.base, campaign.folder
    methods = references(base, runs["glow"][0].folder)
    for prox, repeated in runs.items():
        for i, run in enumerate(repeated):
            made = method_of(run.config, run.folder, load_network(run.config, run.folder))
            methods.append(replace(made, key=f"{prox}-{i}", title=f"{TITLES[prox]} prox"))
    images = campaign.images
    single = evaluation.evaluate(
        methods, images.val, images.test, base.eval_sigmas, base.figure_images, progress=True
    )
    pooled = pool(single, list(runs))
    header, rows = report.table(pooled, against=None)
    rows += comparisons(single, pooled, {prox: len(repeated) for prox, repeated in runs.items()})
    notes = report.protocol(pooled) | {
        "data": images.describe(),
        "rows of proxes": f"mean over seeds {settings.seeds}, each trained from scratch; the figure shows the first",
        "learning rates": _chosen(runs, trials),
        "differences": "per image and averaged over seeds: mean ± standard error over images; and the standard "
        "deviation over seeds of the difference of mean PSNR",
        "paper": "Wei et al., Table 1: CelebA-HQ, other training pictures, until validation stops improving: not the "
        "same experiment",
    }
    shown = [sigma for sigma in settings.figure_sigmas if sigma in single.sigmas] or None
    figures.denoised(folder.denoised, pooled, shown)
    title = "PSNR in dB (SSIM)"
    folder.table.write_text(report.markdown(title, header, rows, notes))
    results = {
        "methods": report.scores_as_json(pooled),
        "seeds": report.scores_as_json(single),
        "trials": {prox: {f"{lr:g}": loss for lr, loss in tried.items()} for prox, tried in trials.items()},
        "training": {r.folder.path.name: report.training(r.folder) for repeated in runs.values() for r in repeated},
        "paper": {prox: {f"{s:.2f}": value for s, value in row.items()} for prox, row in PAPER.items()},
        "protocol": notes,
        "config": settings.of_run(),
        **report.circumstances(),
    }
    report.finish(folder.results, results)
    report.show(header, rows, title)
    print(f"results in {folder.path}")


def pool(single: Evaluation, proxes: list[str]) -> Evaluation:
    """The evaluation with the runs of each prox in one: scores of each image averaged over seeds."""
    scores = {key: found for key, found in single.scores.items() if key.rsplit("-", 1)[0] not in proxes}
    for prox in proxes:
        repeated = [found for key, found in single.scores.items() if key.rsplit("-", 1)[0] == prox]
        facts = {name: sum(r.method.facts[name] for r in repeated) / len(repeated) for name in repeated[0].method.facts}
        scores[prox] = Scores(
            replace(repeated[0].method, key=prox, facts=facts),
            *({s: torch.stack([getattr(r, what)[s] for r in repeated]).mean(0) for s in single.sigmas}
              for what in ("psnr", "ssim")),
            shown=repeated[0].shown,
            seconds_per_image=sum(r.seconds_per_image for r in repeated) / len(repeated),
        )  # fmt: skip
    return replace(single, scores=scores)


def comparisons(single: Evaluation, pooled: Evaluation, repeats: dict[str, int]) -> list[list[str]]:
    """Rows below the scores: each pair of proxes, with both spreads, and the paper's figures."""
    blank = [""] * (len(report.table(pooled, against=None)[0]) - 1 - len(single.sigmas))
    rows = []
    for a, b in PAIRS:
        cells = []
        for sigma in single.sigmas:
            gain = pooled.gain(a, b, sigma)
            seeds = [
                (single.scores[f"{a}-{i}"].psnr[sigma].mean() - single.scores[f"{b}-{i}"].psnr[sigma].mean()).item()
                for i in range(min(repeats[a], repeats[b]))
            ]
            spread = f", seeds ± {stdev(seeds):.2f}" if len(seeds) > 1 else ""
            cells.append(f"{report.gain_in_words(gain)}{spread}")
        rows.append([f"{TITLES[a]} − {TITLES[b]}", *cells, *blank])
    for prox, known in PAPER.items():
        cells = ["".join(f"{db:.2f}" for level, db in known.items() if math.isclose(s, level)) for s in single.sigmas]
        rows.append([f"Paper: {TITLES[prox]} prox", *cells, *blank])
    return rows


def _chosen(runs: dict[str, list[Run]], trials: dict[str, dict[float, float]]) -> str:
    told = []
    for prox, repeated in runs.items():
        tried = ", ".join(f"{lr:g}: {loss:.3g}" for lr, loss in trials[prox].items())
        tried = f" (best validation loss of those tried: {tried})" if tried else ""
        told.append(f"{TITLES[prox]} {repeated[0].config.lr:g}{tried}")
    return "; ".join(told)
