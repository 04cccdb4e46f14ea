"""Runs that several processes train together. `torchrun distributed.py JSON`: a list of settings, run by run.

Each process leaves in its own file how often the hooks of each parameter's gradient ran in a step, and what its
ActNorms were initialised to.
"""

import json
import sys
from pathlib import Path

import torch

from train import ranks, run, stages
from train.config import Config


def steady_adam(stage, *groups):
    """Adam whose epsilon is far above rounding: else its first steps, from zero, are rounding."""
    return torch.optim.Adam([{"params": p, "lr": lr, "initial_lr": lr} for p, lr in groups], eps=1e-2)


def main():
    torch.set_num_threads(1)
    ranks.start()
    stages._Stage.adam = steady_adam
    for settings in json.loads(sys.argv[1]):
        fired, initialised, setup = {}, {}, stages.UnfoldedStage.configure_optimizers

        def configure(stage, fired=fired, setup=setup):
            for name, parameter in stage.model.named_parameters():
                fired[name] = 0
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, name=name: fired.update({name: fired[name] + 1})
                    )
            return setup(stage)

        def initialise(glow, x, original=run.Glow.initialize, initialised=initialised):
            original(glow, x)
            initialised["scales"] = [s.actnorm.log_scale.tolist() for level in glow.levels for s in level.steps]

        stages.UnfoldedStage.configure_optimizers, run.Glow.initialize = configure, initialise
        prepared = run.prepare(Config(**settings))
        prepared.train()
        stages.UnfoldedStage.configure_optimizers = setup
        run.Glow.initialize = initialise.__defaults__[0]
        found = {"fired": fired, "initialised": initialised}
        Path(f"{settings['out']}.{ranks.rank()}.json").write_text(json.dumps(found))
    ranks.stop()


if __name__ == "__main__":
    main()
