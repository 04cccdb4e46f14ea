"""Table 1 and the ablations end to end: several small runs in one folder, interrupted, continued, compared."""

import json
import math
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from train_cases import FILES, TINY, Interrupted, names, network, options, rows, table

import flowkern
from train import ablations, callbacks, campaign, comparison, config, folder, report, run, table1

PROXES = ("resnet", "unet", "glow")
RATES = ("0.001", "0.1")


class Fits:
    """Stands in for `run.fit`: keeps what was trained, in order, and raises once before one run's training."""

    def __init__(self, interrupted=None):
        self.done, self.interrupted, self.fit = [], interrupted, run.fit

    def __call__(self, stage, data, folder):
        if folder.path.name == self.interrupted:
            self.interrupted = None
            raise Interrupted
        self.fit(stage, data, folder)
        self.done.append(folder.path.name)


@pytest.fixture(scope="module")
def line(pictures, tmp_path_factory):
    """A function from a folder and further settings to a command line with tiny ones."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"steps": 6, "prior_steps": 3, "eval_sigmas": [0.2, 0.3]}))
    return lambda out, **settings: options(preset="paper", config=path, data=pictures, out=out, **settings)


@pytest.fixture(scope="module")
def compared(line, tmp_path_factory):
    """Table 1's folder, its command, interrupted and given again, and the names of what was trained each time."""
    out = tmp_path_factory.mktemp("campaign") / "table1"
    words = line(out, seeds="[0,1]", trial_lrs=f"[{','.join(RATES)}]", trial_steps=3, figure_sigmas="[0.3]")
    with pytest.MonkeyPatch.context() as patched:
        fits = Fits(interrupted="unet-seed1")
        patched.setattr(run, "fit", fits)
        with pytest.raises(Interrupted):
            table1.main(words)
        before = list(fits.done)
        assert not (out / "results.json").exists()
        assert table1.main(words) == 0
    return out, words, before, fits.done[len(before) :]


def test_every_run_is_there_and_trained_once(compared):
    out, _, before, after = compared
    trials = [f"trial-{prox}-lr{rate}" for prox in PROXES for rate in RATES]
    runs = [f"{prox}-seed{seed}" for prox in PROXES for seed in (0, 1)]
    assert before + after == ["prior-seed0", "prior-seed1", *trials, *runs]
    assert after == runs[3:]
    assert names(out / "runs") == set(before + after)
    assert names(out) == {"runs", *FILES} - {"metrics.csv", "curves.png"}
    for name in [*trials, *runs]:
        assert len(rows(out / "runs" / name, "unfolded")) == (1 if name.startswith("trial") else 2)
        assert not rows(out / "runs" / name, "prior")


def test_runs_differ_in_what_they_should(compared):
    out = compared[0] / "runs"
    settings = {name: config.load(out / name / "config.yaml") for name in names(out)}
    for name, found in settings.items():
        prox = next((prox for prox in PROXES if prox in name), "glow")
        assert (found.prox, found.seed) == (prox, int(name.endswith("seed1")))
        assert bool(found.prior_checkpoint) == (prox == "glow" and not name.startswith("prior"))
        assert found.steps == (3 if name.startswith("trial") else 6)
        if name.startswith("trial"):
            assert found.lr == float(name.split("lr")[1])
    for seed in (0, 1):
        glow = network(out / f"glow-seed{seed}")
        assert settings[f"glow-seed{seed}"].prior_checkpoint == str(out / f"prior-seed{seed}")
        priors = (flowkern.Glow.from_pretrained(out / name / "checkpoints" / "prior").state_dict()
                  for name in (f"prior-seed{seed}", f"glow-seed{seed}"))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*(p.values() for p in priors), strict=True))
        assert isinstance(glow.proxes[0], flowkern.GlowProx)
    resnets = [network(out / f"resnet-seed{seed}").state_dict() for seed in (0, 1)]
    assert not torch.equal(*(weights["proxes.0.blocks.0.first.weight"] for weights in resnets))


def test_each_prox_has_the_learning_rate_with_the_best_validation_loss(compared):
    out = compared[0]
    trials = json.loads((out / "results.json").read_text())["trials"]
    chosen = {}
    for prox in PROXES:
        losses = {rate: min(float(r["val_loss"]) for r in rows(out / "runs" / f"trial-{prox}-lr{rate}"))
                  for rate in RATES}  # fmt: skip
        assert trials[prox] == losses
        chosen[prox] = min(losses, key=losses.get)
        for seed in (0, 1):
            assert config.load(out / "runs" / f"{prox}-seed{seed}" / "config.yaml").lr == float(chosen[prox])
    assert len(set(chosen.values())) == 2  # or a rate that is always taken would pass
    said = json.loads((out / "results.json").read_text())["protocol"]["learning rates"]
    for prox, rate in chosen.items():
        assert f"{comparison.TITLES[prox]} {rate} (best validation loss of those tried: " in said


def test_rows_of_the_table(compared):
    out = compared[0]
    header, *cells = table(out)
    assert header[:3] == ["", "σ = 0.20", "σ = 0.30"]
    assert [row[0] for row in cells] == [
        "Noisy", "Total variation", "ResNet prox", "U-Net prox", "Glow prox",
        "Glow − U-Net", "U-Net − ResNet", "Glow − ResNet",
        "Paper: ResNet prox", "Paper: U-Net prox", "Paper: Glow prox",
    ]  # fmt: skip
    assert [row[1:3] for row in cells[-3:]] == [["27.05", ""], ["28.18", ""], ["28.24", ""]]
    assert {len(row) for row in cells} == {len(header)}
    results = json.loads((out / "results.json").read_text())
    for row, prox in zip(cells[2:5], PROXES, strict=True):
        levels = results["methods"][prox]["levels"]
        seeds = [results["seeds"][f"{prox}-{i}"]["levels"] for i in range(2)]
        for i in range(2):
            assert levels[i]["psnr"] == pytest.approx(mean(s[i]["psnr"] for s in seeds), abs=1e-4)
            assert row[1 + i] == f"{levels[i]['psnr']:.2f} ({levels[i]['ssim']:.3f})"
        assert seeds[0][0]["psnr"] != seeds[1][0]["psnr"]
    glow, unet = (results["methods"][prox]["levels"][0]["psnr"] for prox in ("glow", "unet"))
    by_seed = [results["seeds"][f"glow-{i}"]["levels"][0]["psnr"] - results["seeds"][f"unet-{i}"]["levels"][0]["psnr"]
               for i in range(2)]  # fmt: skip
    assert cells[5][1].startswith(f"{glow - unet:+.2f} ± ")
    assert cells[5][1].endswith(f", seeds ± {np.std(by_seed, ddof=1):.2f}")


def test_results_say_what_was_compared_with_what(compared):
    out = compared[0]
    results = json.loads((out / "results.json").read_text())
    assert results["paper"]["glow"] == {"0.10": 29.423, "0.15": 29.009, "0.20": 28.236, "0.25": 26.633}
    assert list(results["methods"]) == ["noisy", "tv", *PROXES]
    assert list(results["seeds"]) == ["noisy", "tv", *(f"{prox}-{i}" for prox in PROXES for i in range(2))]
    assert results["training"]["unet-seed1"]["unfolded"]["steps"] == 6
    assert results["config"]["seeds"] == [0, 1]
    for note in ("data", "psnr", "differences", "paper", "rows of proxes", "ResNet prox", "Glow prox"):
        assert results["protocol"][note] and f"- {note}: " in (out / "table.md").read_text()
    assert (out / "denoised.png").stat().st_size > 10_000


def test_a_finished_table_is_reported_again_without_training(compared, monkeypatch, capsys):
    out, words, *_ = compared
    assert table1.main(words) == 2
    assert "holds a finished run: pass --resume" in capsys.readouterr().err
    monkeypatch.setattr(run, "fit", None)
    scores = json.loads((out / "results.json").read_text())["methods"]
    (out / "table.md").unlink()
    assert table1.main([*words, "--resume"]) == 0
    again = json.loads((out / "results.json").read_text())["methods"]
    assert [again[p]["levels"] for p in PROXES] == [scores[p]["levels"] for p in PROXES]
    assert (out / "table.md").exists()
    assert table1.main([*words, "--resume", "--steps", "7"]) == 2
    assert "was started with other settings: steps was 6 and is now 7" in capsys.readouterr().err


def test_one_rate_needs_no_trials_and_a_diverging_one_is_not_taken(line, tmp_path, monkeypatch):
    """Which runs there would be, without training any."""
    asked = []

    class Stub:
        def prior(self, name, **overrides):
            return tmp_path

        def network(self, name, **overrides):
            asked.append((name, overrides["lr"]))

        def attempt(self, work, name, **overrides):
            found = None if overrides["lr"] > 0.5 else overrides["lr"]
            return found and type("Run", (), {"folder": found})

    monkeypatch.setattr(comparison, "report_runs", lambda *arguments: None)
    monkeypatch.setattr(report, "training", lambda lr: {"unfolded": {"best_val_loss": 1 / lr}})
    settings = config.Config(trial_lrs=[0.1, 0.9, 0.4], seeds=[5], steps=3)
    Stub.folder = type("Folder", (), {"path": tmp_path})
    table1.work(Stub(), settings)
    assert asked == [("resnet-seed5", 0.4), ("unet-seed5", 0.4), ("glow-seed5", 0.4)]
    asked.clear()
    monkeypatch.setattr(Stub, "attempt", None)
    for given in ({"trial_lrs": [0.3]}, {"trial_lrs": None, "lr": 0.3}):
        asked.clear()
        table1.work(Stub(), replace(settings, **given))
        assert {lr for _, lr in asked} == {0.3}


# Ablations


@pytest.fixture(scope="module")
def ablated(line, tmp_path_factory):
    """The ablations' folder and the names of what was trained for it, by a command interrupted and given again."""
    out = tmp_path_factory.mktemp("campaign") / "ablations"
    with pytest.MonkeyPatch.context() as patched:
        variants = {
            "as given": {},
            "not pre-trained": {"pretrain": False},
            "tied folds": {"tied": True},
            "far too fast": {"lr": 1e30},
        }
        patched.setattr(ablations, "VARIANTS", variants)
        fits = Fits(interrupted="tied-folds")
        patched.setattr(run, "fit", fits)
        with pytest.raises(Interrupted):
            ablations.main(line(out))
        assert ablations.main(line(out)) == 0
    return out, fits.done


def test_ablations_change_one_choice_at_a_time_and_share_priors(ablated):
    out, trained = ablated
    assert trained == ["prior-as-given", "as-given", "not-pre-trained", "tied-folds"]
    assert names(out / "runs") == {*trained, "prior-not-pre-trained", "far-too-fast"}
    settings = {n: config.load(out / "runs" / n / "config.yaml").of_run() for n in names(out / "runs")}
    given = settings["as-given"]
    for name, changed in (("tied-folds", {"tied"}), ("not-pre-trained", {"pretrain", "prior_checkpoint"})):
        assert {k for k, v in settings[name].items() if v != given[k]} == changed
    assert given["prior_checkpoint"] == str(out / "runs" / "prior-as-given")
    assert not rows(out / "runs" / "prior-not-pre-trained")


def test_the_ablations_table_has_gains_over_the_settings_given_and_tells_of_failures(ablated):
    out, _ = ablated
    assert [row[0] for row in table(out)[1:]] == [
        "Noisy", "Total variation", "as given", "not pre-trained", "tied folds",
        "Total variation − as given", "not pre-trained − as given", "tied folds − as given",
    ]  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == ["noisy", "tv", "as-given", "not-pre-trained", "tied-folds"]
    assert results["failed"] == {"far too fast": "diverged: no result"}
    methods = results["methods"]
    gain = methods["tied-folds"]["levels"][0]["gain_over_as-given"]["mean"]
    apart = methods["tied-folds"]["levels"][0]["psnr"] - methods["as-given"]["levels"][0]["psnr"]
    assert gain == pytest.approx(apart, abs=1e-4) and gain != 0
    assert methods["tied-folds"]["parameters"] < 0.6 * methods["as-given"]["parameters"]
    assert "not pre-trained;" in results["protocol"]["not pre-trained"]
    assert "tied folds trained" in results["protocol"]["tied folds"]
    assert names(out) == {"runs", *FILES} - {"metrics.csv", "curves.png"}


def test_the_variants_are_settings_and_one_prior_serves_all_that_agree_in_it():
    given = config.Config(prior_noise=0.2, lam=0.3)
    changed = [replace(given, **changes) for changes in ablations.VARIANTS.values()]
    same = [t for t, other in zip(ablations.VARIANTS, changed, strict=True) if other == given]
    assert same == ["as given", "likelihood not trained along"]  # which is left out then, and the other one is not
    assert len({title.replace(" ", "-") for title in ablations.VARIANTS}) == len(changed)
    flows = {"levels", "depth", "hidden", "coupling", "scale", "alpha", "split_prior"}
    of_prior = flows | {"pretrain", "seed", *(f for f in vars(given) if f.startswith("prior_"))}
    for changes in ablations.VARIANTS.values():
        assert set(changes) & of_prior <= set(ablations.OF_PRIOR)


def test_what_diverged_before_an_interruption_is_not_tried_again(tmp_path):
    made, tried = campaign.Campaign(folder.Folder(tmp_path), None, None), []
    (tmp_path / "runs" / "fast").mkdir(parents=True)

    def diverges(name):
        tried.append(name)
        raise FloatingPointError("the loss became nan")

    assert made.attempt(diverges, "fast") is None and made.attempt(diverges, "fast") is None
    assert tried == ["fast"]


def test_the_best_loss_is_the_lowest(tmp_path):
    rows_ = [
        dict.fromkeys(callbacks.COLUMNS, "1") | {"stage": "unfolded", "epoch": str(i), "val_loss": loss}
        for i, loss in enumerate("312")
    ]
    lines = [",".join(callbacks.COLUMNS), *(",".join(row.values()) for row in rows_)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = report.training(folder.Folder(tmp_path))["unfolded"]
    assert (found["best_val_loss"], found["val_loss"]) == (1, 2)


def test_a_trial_whose_losses_could_not_be_written_is_not_chosen(tmp_path):
    """A full disk leaves out rows of metrics.csv."""
    where = folder.Folder(tmp_path)
    where.metrics.write_text(",".join(callbacks.COLUMNS) + "\n")
    tried = SimpleNamespace(network=None, attempt=lambda *_, **__: SimpleNamespace(folder=where))
    settings = SimpleNamespace(trial_lrs=[0.1], seeds=[0], trial_steps=1, steps=1)
    assert table1._trials(tried, settings, "glow", {}) == {0.1: math.inf}
