"""`python -m train.pretrain`: train a Glow by likelihood; bits per dimension, samples, a prior for `train.unfolded`."""

import sys
from dataclasses import replace

from train import command


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def prepare():
        from train import config

        settings = config.Command(
            "pretrain",
            "Train a Glow by likelihood on dequantised images, report bits per dimension of held-out images and show "
            "samples at several temperatures. The run's folder serves `train.unfolded --prior-checkpoint`. The same "
            "command continues a run that was interrupted.",
            hidden=("measurement", "unfolded", "start", "denoising", "evaluation", "comparison", "problems"),
            glow=True,
        ).parse(arguments)
        settings = replace(settings, prior_checkpoint=None, network_checkpoint=None, pretrain=True)
        settings.check_schedule("prior")
        from train import run

        return run.prepare(settings, kind="pretrain").pretrain

    return command.run(prepare)


if __name__ == "__main__":
    sys.exit(main())
