"""`python -m train.unfolded`: pre-train a Glow, unfold it, train the denoiser end to end, evaluate it, report."""

import sys

from train import command


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def prepare():
        from train import config

        settings = config.Command(
            "unfolded",
            "Train a deep-unfolded denoiser (Wei et al.) with a Glow, a ResNet or a U-Net as its proximal map, "
            "evaluate it beside reference methods, and write a run folder with the table, figures, metrics and "
            "checkpoints. The same command continues a run that was interrupted. Under torchrun, several processes "
            "share each batch.",
        ).parse(arguments)
        settings.check_schedule(*(["prior"] if settings.has_prior_stage else []), "unfolded")
        if settings.prior_checkpoint and settings.prox != "glow":
            raise ValueError(f"--prior-checkpoint is a Glow to start from; --prox is {settings.prox}")
        from train import run  # takes seconds to import, so --help and mistakes in options come first

        return run.prepare(settings).train

    return command.run(prepare)


if __name__ == "__main__":
    sys.exit(main())
