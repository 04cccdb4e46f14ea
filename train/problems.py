"""One table and one figure of several inverse problems from trained runs: what was measured, each method, its gain."""

from dataclasses import replace
from pathlib import Path

from train import data, evaluation, figures, report
from train.evaluation import MEASURED, PROTOCOL, Evaluation
from train.folder import Folder
from train.run import Run, load_network, method_of, references


def report_runs(campaign, problems: dict[str, dict], runs: dict[str, list[Run]], prior: Path) -> None:
    """Evaluate all runs and the references; leave table.md, results.json and reconstructed.png, and print the table.

    problems: their settings, by name. runs: those of each problem. prior: the folder of the Glow that MAP uses.
    """
    base, folder = campaign.base, campaign.folder
    found = {}
    for problem, of_it in problems.items():
        settings = replace(base, **of_it)
        methods = references(settings, Folder(prior))
        for run in runs[problem]:
            made = method_of(run.config, run.folder, load_network(run.config, run.folder))
            methods.append(replace(made, key=run.config.prox))
        images = data.arrange(campaign.images.pictures, settings)
        print(problem, flush=True)
        found[problem] = evaluation.evaluate(
            methods, images.val, images.test, base.eval_sigmas, base.figure_images, progress=True
        )
    header, rows = table(found)
    title = f"PSNR in dB (SSIM), {next(iter(found.values())).images} test images; gains: mean ± standard error."
    of_all = {"data": campaign.images.describe(), "images": report.images(next(iter(found.values())))}
    notes = PROTOCOL | MEASURED | of_all | protocol(found)
    shown = [(problem, e, max(e.sigmas), image) for problem, e in found.items() for image in range(len(e.clean))]
    figures.panels(folder.reconstructed, shown)
    folder.table.write_text(report.markdown(title, header, rows, notes))
    results = {
        "problems": {
            problem: {"measured": e.measurement.describe(), "methods": report.scores_as_json(e)}
            for problem, e in found.items()
        },
        "training": {r.folder.path.name: report.training(r.folder) for made in runs.values() for r in made},
        "protocol": notes,
        "config": base.of_run(),
        **report.circumstances(),
    }
    report.finish(folder.results, results)
    report.show(header, rows, title)
    print(f"results in {folder.path}")


def table(found: dict[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each problem a row that says what is measured, then those of `report.table`."""
    rows = []
    for problem, evaluated in found.items():
        header, own = report.table(evaluated)
        rows += [[f"{problem}: {evaluated.measurement.describe()}", *[""] * (len(header) - 1)], *own]
    return header, rows


def protocol(found: dict[str, Evaluation]) -> dict[str, str]:
    """What each row is: references once, networks for each problem."""
    notes = {}
    for problem, evaluated in found.items():
        for scores in list(evaluated.scores.values())[1:]:
            method = scores.method
            notes[f"{method.title}, {problem}" if "parameters" in method.facts else method.title] = method.protocol
    return notes
