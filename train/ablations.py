"""`python -m train.ablations`: what each choice that the paper leaves open is worth, one changed at a time."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train import command

if TYPE_CHECKING:
    from train.config import Config  # needs the extra, for which `command.run` looks first

# What is changed of the settings given, by the name that the table has for it.
VARIANTS: dict[str, dict] = {
    "as given": {},
    "pre-trained on clean images": {"prior_noise": 0.0},
    "not pre-trained": {"pretrain": False},
    "sigmoid scale": {"scale": "sigmoid"},
    "tied folds": {"tied": True},
    "starts at y": {"init": "adjoint"},
    "ends with data consistency": {"final": "consistency"},
    "lambda starts at 0.05": {"lam": 0.05},
    "likelihood trained along": {"likelihood": 1e-3},
    "likelihood not trained along": {"likelihood": 0.0},
    "activations stored": {"memory": "store"},
}
# The settings on which pre-training depends: variants that agree in them share a prior.
OF_PRIOR = ("prior_noise", "scale", "pretrain")


def work(campaign, settings: "Config") -> Path:
    """All variants, then one table: what is done already is left alone."""
    from train import ranks, run
    from train.evaluation import Method

    methods, failed, priors = [], {}, {}
    for title, changes in VARIANTS.items():
        if changes and all(getattr(campaign.base, k) == v for k, v in changes.items()):
            continue  # as given
        name = title.replace(" ", "-")
        prior = {k: v for k, v in changes.items() if k in OF_PRIOR}
        key = tuple(prior.items())
        if key not in priors:
            priors[key] = campaign.attempt(campaign.prior, f"prior-{name}", **prior)
        start = {"prior_checkpoint": str(priors[key])}
        made = priors[key] and campaign.attempt(campaign.network, name, **changes, **start)
        if made is None:
            failed[title] = "diverged: no result"
        elif ranks.is_first():
            net = run.load_network(made.config, made.folder)
            method: Method = run.method_of(made.config, made.folder, net)
            methods.append(replace(method, key=name, title=title))
    if ranks.is_first():
        base = campaign.base
        methods = [*run.references(base, campaign.folder), *methods]
        more = {"config": base.of_run(), "failed": failed}
        run.compare(methods, campaign.images, base, campaign.folder, more, against="as-given")
        for title, why in failed.items():
            print(f"{title}: {why}")
    return campaign.folder.path


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def prepare():
        from train.config import Command

        settings = Command(
            "ablations",
            "Train the unfolded Glow with the settings given and with one of them changed at a time: pre-training, its "
            f"noise, the coupling's scale, tied folds, the start, the readout, the loss, memory "
            f"({', '.join(VARIANTS)}). The same command continues where an interruption left off.",
            hidden=("start", "comparison", "problems"),
            glow=True,
        ).parse(arguments)
        settings = replace(settings, pretrain=True, prior_checkpoint=None, network_checkpoint=None)
        if "map" in settings.references:
            raise ValueError("the reference 'map' belongs to one prior; ablations have several")
        settings.check_schedule("prior", "unfolded")
        from train import campaign

        made = campaign.prepare(settings, "ablations")
        return lambda: made.keep(lambda: work(made, settings))

    return command.run(prepare)


if __name__ == "__main__":
    sys.exit(main())
