"""`python -m train.inverse`: inpainting, deblurring, super-resolution and compressed sensing, Glow beside U-Net."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train import command

if TYPE_CHECKING:
    from train.config import Config  # needs the extra, for which `command.run` looks first

PROBLEMS: dict[str, dict] = {
    "inpainting": {"operator": "inpaint", "inpaint_keep": 0.5},
    "hole": {"operator": "inpaint", "inpaint_hole": 20},
    "deblurring": {"operator": "blur", "blur_sigma": 1.5},
    "super-resolution": {"operator": "sr", "sr_factor": 2},
    "compressed-sensing": {"operator": "cs", "cs_ratio": 0.25},
}
PROXES = ("unet", "glow")


def work(campaign, settings: "Config") -> Path:
    """The prior, a denoiser of each kind if asked for, both networks for every problem, then one table and figure: what
    is trained already is left alone.
    """
    from train import problems, ranks

    prior = campaign.prior("prior")
    start = {
        "glow": {"prior_checkpoint": str(prior)},
        "unet": {"references": ["tv"], "lr": settings.unet_lr or settings.lr},
    }
    if settings.denoise_steps:
        for prox in PROXES:
            given = start[prox] | denoising(settings, prox, campaign.images.epoch_images)
            denoiser = campaign.network(f"denoising-{prox}", prox=prox, **given)
            start[prox]["network_checkpoint"] = str(denoiser.folder.path)
    runs = {
        problem: [campaign.network(f"{problem}-{prox}", prox=prox, **of_it, **start[prox]) for prox in PROXES]
        for problem, of_it in PROBLEMS.items()
    }
    if ranks.is_first():
        problems.report_runs(campaign, PROBLEMS, runs, prior)
    return campaign.folder.path


def check_denoiser(settings: "Config") -> None:
    """Raise ValueError in one sentence if a denoiser is to be trained and its crops don't fit."""
    side, unit = settings.denoise_size, 2**settings.levels
    if settings.denoise_steps and side and (side % unit or settings.size % side):
        raise ValueError(f"denoise_size must be a multiple of {unit} that divides size = {settings.size}, got {side}")


def denoising(settings: "Config", prox: str, epoch_images: int) -> dict:
    """What differs in the settings of the denoiser that the problems of a prox start from."""
    given = {"operator": "identity", "init": "adjoint", "steps": settings.denoise_steps}
    if prox != "glow":
        return given
    given |= {"lr": settings.denoise_lr or settings.lr, "lam": settings.denoise_lam or settings.lam}
    if settings.denoise_size:
        more = (settings.size // settings.denoise_size) ** 2  # images, for the same number of pixels
        given |= {"size": settings.denoise_size, "eval_size": settings.eval_size or settings.size}
        given |= {"batch": settings.batch * more, "epoch_images": epoch_images * more}
    return given


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def prepare():
        from train.config import Command

        settings = Command(
            "inverse",
            f"Train the unfolded network with a Glow and with a U-Net, in equal numbers of steps, for {len(PROBLEMS)} "
            f"inverse problems ({', '.join(PROBLEMS)}), and compare them with reference methods on the same test "
            "images: one table, one figure. The same command continues where an interruption left off.",
            hidden=("start", "measurement", "comparison"),
            preset="inverse",
            glow=True,
        ).parse(arguments)
        settings = replace(settings, pretrain=True, prior_checkpoint=None, network_checkpoint=None)
        if not settings.measurement.is_identity:
            raise ValueError(f"train.inverse has its own operators; got operator {settings.operator!r}")
        for of_it in PROBLEMS.values():
            for prox in PROXES:
                references = settings.references if prox == "glow" else ["tv"]
                replace(settings, **of_it, prox=prox, references=references)
        check_denoiser(settings)
        settings.check_schedule("prior", "unfolded")
        from train import campaign

        made = campaign.prepare(settings, "inverse")
        return lambda: made.keep(lambda: work(made, settings))

    return command.run(prepare)


if __name__ == "__main__":
    sys.exit(main())
