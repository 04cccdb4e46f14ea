"""`python -m train.table1`: the paper's Table 1 and Figure 1. Three proxes, trained alike, beside reference methods."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train import command

if TYPE_CHECKING:
    from train.config import Config  # needs the extra, for which `command.run` looks first

PROXES = ("resnet", "unet", "glow")


def work(campaign, settings: "Config") -> Path:
    """Pre-training, trials of learning rates, all runs, then table and figure: what is done already is left alone."""
    from train import comparison, ranks

    priors = {seed: campaign.prior(f"prior-seed{seed}", seed=seed) for seed in settings.seeds}
    start = {"glow": lambda seed: {"prior_checkpoint": str(priors[seed])}}
    rates, trials, tried = {}, {}, settings.trial_lrs or [settings.lr]
    for prox in PROXES:
        options = _options(prox) | start.get(prox, lambda seed: {})(settings.seeds[0])
        trials[prox] = _trials(campaign, settings, prox, options) if len(tried) > 1 else {}
        rates[prox] = min(trials[prox], key=trials[prox].get, default=tried[0])
    runs = {
        prox: [
            campaign.network(
                f"{prox}-seed{seed}",
                seed=seed,
                lr=rates[prox],
                **_options(prox),
                **start.get(prox, lambda seed: {})(seed),
            )
            for seed in settings.seeds
        ]
        for prox in PROXES
    }
    if ranks.is_first():
        comparison.report_runs(campaign, settings, runs, trials)
    return campaign.folder.path


def _options(prox: str) -> dict:
    return {"prox": prox} if prox == "glow" else {"prox": prox, "init": None, "references": ["tv"]}


def _trials(campaign, settings: "Config", prox: str, options: dict) -> dict[float, float]:
    """The best validation loss that each learning rate reached."""
    from train import report

    losses = {}
    for lr in settings.trial_lrs:
        changes = {"seed": settings.seeds[0], "lr": lr, "steps": settings.trial_steps or settings.steps}
        tried = campaign.attempt(campaign.network, f"trial-{prox}-lr{lr:g}", **changes, **options)
        # Where its rows could not be written, there is no loss that it could be chosen by.
        found = report.training(tried.folder).get("unfolded", {}) if tried else {}
        losses[lr] = found.get("best_val_loss", float("inf"))
    return losses


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def prepare():
        from train.config import Command

        settings = Command(
            "table1",
            "Reproduce Table 1 and Figure 1 of Wei et al.: pre-train a Glow, choose each prox's learning rate on "
            "validation images with equal trials, train the unfolded network with a ResNet, a U-Net and a Glow under "
            "equal budgets, and compare them with reference methods on the same test images. The same command "
            "continues where an interruption left off.",
            hidden=("start", "measurement", "problems", "seed"),
            glow=True,
        ).parse(arguments)
        settings = replace(settings, pretrain=True, prior_checkpoint=None, network_checkpoint=None)
        if not settings.measurement.is_identity:
            raise ValueError(f"Table 1 is about denoising; the operator is {settings.operator!r}: see train.inverse")
        for prox in PROXES:
            replace(settings, **_options(prox))  # raises what another prox can't
        settings.check_schedule("prior", "unfolded")
        trial = settings.trial_steps or settings.steps
        if len(settings.trial_lrs or []) > 1 and trial and trial <= settings.warmup:
            raise ValueError(f"a trial of {trial} steps ends within a warm-up of {settings.warmup}: set --trial-steps")
        from train import campaign

        made = campaign.prepare(settings, "table1")
        return lambda: made.keep(lambda: work(made, settings))

    return command.run(prepare)


if __name__ == "__main__":
    sys.exit(main())
