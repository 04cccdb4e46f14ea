"""`python -m train.evaluate RUN...`: finished runs on the same test images, in one table and one figure."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from train import command
from train.measurement import GROUP, NAMES, MeasurementSettings
from train.options import add_settings, setting

# What must agree for runs to be compared: where the images come from and how they become test images.
IMAGES = ("data", "fit", "eval_size", "val_images", "test_images")


@dataclass
class Settings(MeasurementSettings):
    """The settings of an evaluation. None: as in the runs."""

    operator: Literal["identity", "inpaint", "blur", "sr", "cs"] | None = setting(
        GROUP, None, "What is measured (default: as the runs were trained; with --operator, its defaults)."
    )
    data: str | None = setting("evaluation", None, "Evaluate on these images (default: those of the runs).")
    fit: Literal["resize", "crop"] | None = setting("evaluation", None, "How images become square (default: as runs).")
    eval_size: int | None = setting("evaluation", None, "Side of the test images (default: as the runs).")
    val_images: int | None = setting("evaluation", None, "Images to tune references on (default: as the runs).")
    test_images: int | None = setting("evaluation", None, "Test images (default: as the runs).")
    references: list[Literal["tv", "vtv", "smooth", "denoiser", "map"]] | None = setting(
        "evaluation",
        None,
        "Methods to compare with: total variation of each channel; of all together; the smoothest image that fits the "
        "measurement; BM3D where installed, else non-local means, for denoising alone; the MAP estimate in the latent "
        "space of the first Glow's prior (default: tv, and denoiser for denoising).",
    )
    eval_sigmas: list[float] | None = setting("evaluation", None, "Noise levels (default: those of the first run).")
    figure_images: int = setting("evaluation", 4, "Test images shown in the figure.")
    out: str | None = setting("evaluation", None, "Folder of the results (default: the next free number in runs/).")


def prepare(runs: list[str], settings: Settings):
    """Read the runs and the images. Returns what evaluates them.

    Raises FileNotFoundError for what is no finished run, ValueError for runs that can't be compared and bad settings.
    """
    from train import data, folder, run

    found = [(config, where) for config, where in map(_read, runs)]
    common = _common(found, settings)
    glow = next(((config, where) for config, where in found if config.prox == "glow"), None)
    if "map" in (settings.references or ()) and glow is None:
        raise ValueError("the reference 'map' needs the prior of a Glow; none of the runs has one")
    chosen = {name: getattr(settings, name) for name in (*IMAGES, "references", "eval_sigmas", "figure_images")}
    chosen = common | {k: v for k, v in chosen.items() if v is not None} | _measured(found, settings)
    chosen.setdefault("references", ["tv", "denoiser"] if chosen["operator"] == "identity" else ["tv"])
    chosen.setdefault("eval_sigmas", found[0][0].eval_sigmas)
    for config, _ in found:  # every network has to take images of this size, and what was measured of them
        replace(config, references=[], **{name: chosen[name] for name in ("eval_size", *NAMES)})
    base = replace(glow[0] if glow else found[0][0], **chosen)
    target = folder.fresh(settings.out, "evaluate")
    images = data.prepare(base, splits=("val", "test"))
    if settings.data is None:
        held_out = {split: images.pictures.listing[split] for split in ("val", "test")}
        for _, where in found:
            folder.check_pictures(where, held_out, "say with --data which to evaluate on")
    networks = [run.load_network(config, where) for config, where in found]
    methods = run.references(base, glow[1] if glow else target)
    folder.claim(target)

    def work() -> Path:
        names = _names([config.prox for config, _ in found], [where.path for _, where in found])
        configs = [config for config, _ in found]
        names = [(key, title + _trained(c, base, configs)) for (key, title), c in zip(names, configs, strict=True)]
        for (config, where), net, (key, title) in zip(found, networks, names, strict=True):
            methods.append(replace(run.method_of(config, where, net), key=key, title=title))
        run.compare(methods, images, base, target, {"runs": [str(where.path) for _, where in found]})
        target.unlock()
        return target.path

    return work


def _read(path: str):
    from train import config
    from train.folder import Folder

    where = Folder(Path(path))
    if not where.config.is_file() or not where.is_complete("unfolded"):
        raise FileNotFoundError(f"{path} holds no trained network: pass the folder of a finished run")
    return config.load(where.config), where


def _common(found: list, settings: Settings) -> dict:
    """Where the first run's images come from, if it is the same in the others."""
    (base, first), *others = found
    for config, where in others:
        for name in IMAGES:
            a, b = (getattr(c, name) or (c.size if name == "eval_size" else None) for c in (base, config))
            if getattr(settings, name) is None and a != b:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{first.path} has {name} = {a!r} and {where.path} {b!r}: say which with {option}")
    return {name: getattr(base, name) for name in IMAGES} | {"eval_size": base.eval_size or base.size}


def _measured(found: list, settings: Settings) -> dict:
    """What is measured, as settings: what was asked for, over what all runs were trained for.

    Raises ValueError if they were trained for different measurements and nothing was asked for.
    """
    given = {name: getattr(settings, name) for name in NAMES if getattr(settings, name) is not None}
    if "operator" in given:
        return dict.fromkeys(NAMES) | given
    (base, first), *others = found
    for config, where in others:
        if config.measurement != base.measurement:
            raise ValueError(
                f"{first.path} was trained for {base.measurement.describe()} and {where.path} for "
                f"{config.measurement.describe()}: say with --operator what to measure"
            )
    return {name: getattr(base, name) for name in NAMES} | given


def _trained(config, tested, others: list) -> str:
    """What a network was trained for, as far as it is tested on something else, or others were trained for that."""
    differ = []
    if config.measurement != tested.measurement:
        differ.append(config.measurement.describe())
    low, high = config.sigma, config.sigma_max or config.sigma
    # Denoisers are tested on noise around what they are trained for by default.
    outside = [not low <= sigma <= high for sigma in tested.eval_sigmas]
    elsewhere = all(outside) if tested.measurement.is_identity else any(outside)
    if elsewhere or any((other.sigma, other.sigma_max) != (config.sigma, config.sigma_max) for other in others):
        differ.append(f"σ = {config.trained_at()}")
    if config.data != tested.data:
        differ.append(f"images of {Path(config.data).name}")
    return f", trained on {', '.join(differ)}" if differ else ""


def _names(proxes: list[str], folders: list[Path]) -> list[tuple[str, str]]:
    """A key and a title for each run; runs with the same prox have their folder's name in it, or its path where names
    are the same.
    """
    from train.run import TITLES

    own = [path.name if all(p == path for p in folders if p.name == path.name) else str(path) for path in folders]
    return [
        (f"{prox}-{i}", TITLES[prox] + (f" ({own[i]})" if proxes.count(prox) > 1 else ""))
        for i, prox in enumerate(proxes)
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""

    def start():
        import jsonargparse

        parser = jsonargparse.ArgumentParser(
            prog="python -m train.evaluate",
            allow_abbrev=False,
            description="Evaluate trained runs on the same test images, as they were trained or out of distribution "
            "(other measurements, noise levels, images): PSNR and SSIM at several noise levels beside reference "
            "methods, parameters, time per image, memory of a training step; table.md, results.json and a figure, "
            "with the protocol.",
        )
        parser.add_argument("runs", metavar="RUN", nargs="+", type=str, help="Folders of finished runs.")
        add_settings(parser, Settings)
        values = parser.parse_args(arguments)
        return prepare(values.runs, Settings(**{f.name: values[f.name] for f in fields(Settings)}))

    return command.run(start)


if __name__ == "__main__":
    sys.exit(main())
