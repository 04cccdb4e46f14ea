"""The command `python -m train.unfolded` from its options to its folder, on settings small enough for seconds."""

import csv
import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import flowkern
from train import budget, callbacks, config, drift, evaluation, extras, figures, folder, report, run, stages, unfolded
from train.config import Config

FILES = {"config.yaml", "metrics.csv", "table.md", "results.json", "denoised.png", "curves.png", "checkpoints"}
TINY = {
    "size": 8,
    "batch": 4,
    "epoch_images": 12,
    "levels": 1,
    "depth": 2,
    "hidden": 8,
    "folds": 2,
    "prior_steps": 5,
    "prior_lr": 1e-3,
    "steps": 8,
    "lr": 1e-3,
    "eval_sigmas": [0.1, 0.2, 0.25],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of smooth pictures, already split."""
    path = tmp_path_factory.mktemp("pictures")
    ramp = np.linspace(0, 1, 16)
    for split, count in (("train", 6), ("val", 3), ("test", 5)):
        (path / split).mkdir()
        for i in range(count):
            rng = np.random.default_rng([i, count])
            waves = rng.random(3) * np.sin(rng.uniform(1, 6, 3) * ramp[:, None, None] + ramp[None, :, None]) / 2 + 0.5
            Image.fromarray((255 * waves).astype(np.uint8)).save(path / split / f"{i}.png")
    return path


def tiny(pictures, out, **settings):
    return Config(data=str(pictures), out=str(out), **(TINY | settings))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The folder of one whole run."""
    return run.prepare(tiny(pictures, tmp_path_factory.mktemp("runs") / "whole")).train()


def weights(path):
    return flowkern.Unfolded.from_pretrained(Path(path) / "checkpoints" / "unfolded").state_dict()


# The folder of a run


def test_the_folder_is_complete(finished):
    assert {p.name for p in finished.iterdir()} == FILES
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"prior", "unfolded"}
    for name in ("denoised.png", "curves.png"):
        with Image.open(finished / name) as image:
            image.load()
            assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 50
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert Config(**saved) == tiny(saved["data"], saved["out"])


def test_results_hold_the_numbers_and_their_protocol(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {
        "levels", "protocol", "network", "training", "config", "machine", "versions", "commit",
    }  # fmt: skip
    assert [level["sigma"] for level in results["levels"]] == [0.1, 0.2, 0.25]
    for level in results["levels"]:
        assert level["gain_over_tv"]["n"] == 5
        difference = level["unfolded"]["psnr"] - level["tv"]["psnr"]
        assert level["gain_over_tv"]["mean"] == pytest.approx(difference, abs=1e-4)
        assert level["noisy"]["psnr"] == pytest.approx(-20 * math.log10(level["sigma"]), abs=0.5)
        assert level["tv"]["psnr"] > level["noisy"]["psnr"] and 0.02 <= level["tv_weight"] <= 2
    assert set(results["protocol"]) >= {"sigma", "clipping", "psnr", "noise", "tv", "gain", "trained_at_sigma", "data"}
    assert len(results["network"]["mu"]) == len(results["network"]["lambda"]) == 2
    training = results["training"]
    assert (training["prior"]["steps"], training["unfolded"]["steps"]) == (5, 8)
    assert all(stage["images_per_second"] > 0 and stage["peak_mib"] > 50 for stage in training.values())
    assert results["versions"]["torch"] == torch.__version__ and results["machine"]["cores"] >= 1


def test_the_table_repeats_the_results(finished):
    lines = (finished / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["σ", "Noisy", "Total variation", "Unfolded Glow", "Gain over TV"]
    levels = json.loads((finished / "results.json").read_text())["levels"]
    for row, level in zip(rows[2:], levels, strict=True):
        gain = level["gain_over_tv"]
        assert row[0] == f"{level['sigma']:.2f}"
        assert row[1:4] == [f"{level[m]['psnr']:.2f} ({level[m]['ssim']:.3f})" for m in evaluation.METHODS]
        assert row[4] == f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}"
    assert any(line.startswith("- clipping: ") for line in lines)


def test_metrics_have_a_row_per_epoch(finished):
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["stage"], int(r["epoch"]), int(r["step"])) for r in rows] == [
        ("prior", 0, 3), ("prior", 1, 5), ("unfolded", 0, 3), ("unfolded", 1, 6), ("unfolded", 2, 8),
    ]  # fmt: skip
    assert all(math.isfinite(float(r[k])) for r in rows for k in ("loss", "val_loss", "seconds", "images_per_second"))
    assert all(float(r["val_psnr"]) > 5 and float(r["val_ssim"]) <= 1 for r in rows if r["stage"] == "unfolded")


def test_training_lowers_both_losses(pictures, tmp_path):
    settings = tiny(pictures, tmp_path, prior_steps=30, steps=40, prior_lr=5e-3, lr=5e-3)
    rows = callbacks.read_metrics(run.prepare(settings).train() / "metrics.csv")
    for stage in ("prior", "unfolded"):
        losses = [float(r["val_loss"]) for r in rows if r["stage"] == stage]
        assert losses[-1] < losses[0]
    before = flowkern.Glow.from_pretrained(tmp_path / "checkpoints" / "prior").state_dict()
    after = weights(tmp_path)
    name = "levels.0.steps.0.coupling.net.weight1"
    folds = [after[f"proxes.{k}.glow.{name}"] for k in range(2)]
    assert not torch.equal(folds[0], before[name]) and not torch.equal(folds[0], folds[1])
    assert (after["mu"] != 0.5).all() and after["proxes.0.raw_lam"] != after["proxes.1.raw_lam"]


# Resuming and starting again


class Interrupted(Exception):
    """Stands in for a machine that goes away."""


@pytest.mark.parametrize(("stage", "epoch"), [("prior", 1), ("unfolded", 1)])
def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(
    stage, epoch, pictures, finished, tmp_path, monkeypatch
):
    batch_end = callbacks.Recorder.on_train_batch_end

    def interrupt(self, trainer, module, *arguments):
        if module.name == stage and trainer.current_epoch == epoch:
            raise Interrupted
        batch_end(self, trainer, module, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Recorder, "on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            run.prepare(tiny(pictures, tmp_path / "run")).train()
    assert (tmp_path / "run" / "checkpoints" / f"{stage}-last.ckpt").exists()
    again = tiny(pictures, tmp_path / "run")
    with pytest.raises(FileExistsError, match="exists and is not empty: pass --resume to continue it"):
        run.prepare(again)
    run.prepare(replace(again, resume=True)).train()
    resumed, whole = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    columns = ("stage", "epoch", "step", "loss", "val_loss", "val_psnr")
    rows = [[r[c] for c in columns] for r in callbacks.read_metrics(tmp_path / "run" / "metrics.csv")]
    assert rows == [[r[c] for c in columns] for r in callbacks.read_metrics(finished / "metrics.csv")]


def test_resuming_a_finished_run_only_reports_again(finished, monkeypatch):
    monkeypatch.setattr(run, "fit", None)
    table = (finished / "table.md").read_text()
    settings = Config(**yaml.safe_load((finished / "config.yaml").read_text()))
    (finished / "table.md").unlink()
    run.prepare(replace(settings, resume=True)).train()
    assert (finished / "table.md").read_text() == table


def test_resuming_with_other_settings_names_them(finished, pictures):
    with pytest.raises(ValueError, match="was started with other settings: folds was 2 and is now 3"):
        run.prepare(tiny(pictures, finished, folds=3, resume=True))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_resuming_from_a_truncated_state_is_one_sentence(content, pictures, tmp_path):
    settings = tiny(pictures, tmp_path / "run")
    path = run.prepare(settings).folder.last("prior")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="prior-last.ckpt is truncated or not a checkpoint; remove it to start"
    ) as caught:
        run.prepare(replace(settings, resume=True))
    assert "\n" not in str(caught.value)


def test_ctrl_c_says_how_to_continue(pictures, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(callbacks.Recorder, "on_train_batch_end", interrupt)
    with pytest.raises(SystemExit):
        run.prepare(tiny(pictures, tmp_path / "run")).train()
    signal.signal(signal.SIGINT, handler)  # Lightning switches it off while it shuts down
    assert f"--resume --out {tmp_path / 'run'} continues" in capsys.readouterr().err


def test_new_runs_are_numbered_and_the_latest_is_resumed(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (run.prepare(replace(tiny(pictures, ""), out=None)).folder.path for _ in range(2))
    assert [str(p) for p in (first, second)] == ["runs/unfolded-001", "runs/unfolded-002"]
    assert run.prepare(replace(tiny(pictures, ""), out=None, resume=True)).folder.path == second
    with pytest.raises(FileNotFoundError, match="nothing to resume: elsewhere holds no run"):
        run.prepare(tiny(pictures, "elsewhere", resume=True))


def test_nothing_is_written_when_preparation_fails(tmp_path):
    with pytest.raises(FileNotFoundError):
        run.prepare(tiny(tmp_path / "no pictures", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# A prior from a checkpoint


def test_prior_from_a_checkpoint_skips_pre_training(pictures, finished, tmp_path):
    for source in (finished, finished / "checkpoints" / "prior"):
        out = tmp_path / source.name
        prepared = run.prepare(tiny(pictures, out, prior_checkpoint=str(source), depth=7, hidden=5, steps=3))
        assert (prepared.config.depth, prepared.config.hidden) == ([2], 8)
        prepared.train()
        assert {r["stage"] for r in callbacks.read_metrics(out / "metrics.csv")} == {"unfolded"}
        kept = flowkern.Glow.from_pretrained(out / "checkpoints" / "prior").state_dict()
        given = flowkern.Glow.from_pretrained(finished / "checkpoints" / "prior").state_dict()
        assert all(torch.equal(kept[name], given[name]) for name in given)


def damaged(finished, tmp_path, how):
    """A copy of the finished prior with something wrong."""
    path = tmp_path / "prior"
    glow = flowkern.Glow.from_pretrained(finished / "checkpoints" / "prior")
    if how == "missing":
        return path
    if how == "grey":
        glow = flowkern.Glow((1, 8, 8), levels=1, depth=1, hidden=4)
    glow.save_pretrained(path)
    if how == "truncated":
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "of another configuration":
        saved = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(saved | {"hidden": 16}))
    elif how == "unfolded":
        return finished / "checkpoints" / "unfolded"
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is not a saved Glow: it has no config.json"),
        ("truncated", "is truncated or not a safetensors file"),
        ("of another configuration", "don't fit this configuration: .* of another shape"),
        ("unfolded", "does not hold the configuration of a Glow"),
        ("grey", "is for images of 1 channels; training wants 3"),
    ],
)
def test_unusable_prior_is_one_sentence(how, message, pictures, finished, tmp_path):
    path = damaged(finished, tmp_path, how)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        run.prepare(tiny(pictures, tmp_path / "out", prior_checkpoint=str(path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# The command line


def command(*arguments, check=False):
    return subprocess.run(
        [sys.executable, "-m", "train.unfolded", *arguments], capture_output=True, text=True, check=check, timeout=300
    )


def test_the_command_end_to_end(pictures, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(TINY | {"steps": 100}))
    done = command(
        "--config", str(settings), "--data", str(pictures), "--steps", "2", "--out", str(tmp_path / "run"), check=True
    )
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    assert "prior  epoch   1  step     5" in done.stdout and "images/s" in done.stdout and "MiB" in done.stdout
    assert "Unfolded Glow" in done.stdout and "Gain over TV" in done.stdout
    refused = command("--config", str(settings), "--data", str(pictures), "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1 and "--resume" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--preset", "huge"], "unknown preset 'huge'; choose one of demo, faces64, paper"),
        (["--size", "20"], "size must be a positive multiple of 2^levels = 8, got 20"),
        (["--eval-size", "20"], "eval_size must be a positive multiple of 2^levels = 8, got 20"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--steps", "0"], "steps must be positive, got 0"),
        (["--sigma", "-1"], "sigma must be positive, got -1.0"),
        (["--sigma-max", "0.1"], "sigma_max must be at least sigma = 0.15, got 0.1"),
        (["--prior-noise", "-1"], "prior_noise must be 0 or more, got -1.0"),
        (["--eval-sigmas", "[]"], "eval_sigmas must be one or more positive numbers, got []"),
        (["--alpha", "0"], "alpha must be positive, got 0.0"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--depth", "[1,2]"], "depth wants one int, or one per level (3), got 2"),
        (["--seconds", "null", "--steps", "null"], "schedule='cosine' needs steps or seconds"),
        (["--resume", "--out", "nowhere"], "nothing to resume: nowhere holds no run"),
        (["--prior-checkpoint", "nowhere"], "nowhere is not a saved Glow"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, capsys):
    assert unfolded.main(arguments) == 2
    assert message in (error := capsys.readouterr().err)
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--sizes", "3"], ["--size", "big"], ["--config", "nowhere.yaml"]])
def test_unknown_options_exit_as_argparse_does(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        unfolded.main(arguments)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_options_override_files_which_override_presets(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("batch: 5\nlr: 0.5\n")
    demo = config.parse([])
    mine = config.parse(["--config", str(path), "--lr", "0.25", "--depth", "[1, 2, 3]"])
    assert (mine.batch, mine.lr, mine.depth, mine.hidden) == (5, 0.25, [1, 2, 3], demo.hidden)
    assert config.parse(["--preset", "paper"]).levels != demo.levels
    (tmp_path / "saved.yaml").write_text("")
    config.save(mine, tmp_path / "saved.yaml")
    assert config.parse(["--config", str(tmp_path / "saved.yaml")]) == mine


@pytest.mark.parametrize("preset", config.presets())
def test_presets_are_valid_and_only_set_known_options(preset):
    settings = config.parse(["--preset", preset])
    assert set(yaml.safe_load((config.PRESETS / f"{preset}.yaml").read_text())) <= {f.name for f in fields(Config)}
    assert settings.sigma <= 0.2 <= (settings.sigma_max or settings.sigma)
    assert settings.eval_sigmas == [0.1, 0.15, 0.2, 0.25] and settings.memory == "recompute"


def test_the_paper_preset_is_the_paper():
    paper = config.parse(["--preset", "paper"])
    assert (paper.size, paper.folds, paper.patience) == (64, 4, 5)
    assert (paper.sigma, paper.sigma_max) == (0.2, None)
    assert (paper.lr, paper.lr_steps, paper.schedule) == (1e-5, 1e-2, "constant")


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split()[0] in text


def test_missing_packages_are_one_sentence_that_names_the_extra(monkeypatch, capsys):
    with pytest.raises(
        ModuleNotFoundError, match=r"training needs lightning, rich: .* `pip install flowkern\[train\]`"
    ):
        extras.require(find=lambda name: None if name in ("lightning", "rich") else object())
    monkeypatch.setattr(extras.require, "__defaults__", (lambda name: None,))
    assert unfolded.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Parts


def test_budget_stops_by_steps_or_seconds_and_shapes_the_rate():
    limits = budget.Budget(steps=10, seconds=100.0)
    assert limits.progress == 0 and limits.factor("cosine", 0) == 1
    limits.load_state_dict({"steps": 5, "seconds": 20.0})
    assert limits.progress == 0.5 and limits.factor("cosine", 0) == pytest.approx(0.5)
    assert limits.factor("constant", 0) == 1 and limits.factor("constant", 12) == pytest.approx(0.5)
    limits.load_state_dict({"steps": 5, "seconds": 100.0})
    assert limits.progress == 1 and limits.factor("cosine", 0) == pytest.approx(0)
    assert budget.Budget(None, None).progress == 0


def test_seconds_end_a_stage(pictures, tmp_path):
    settings = tiny(pictures, tmp_path, prior_steps=None, prior_seconds=0.5, steps=2, patience=10**6)
    rows = callbacks.read_metrics(run.prepare(settings).train() / "metrics.csv")
    seconds = [float(r["seconds"]) for r in rows if r["stage"] == "prior"]
    assert 0.5 <= seconds[-1] < 10


def test_early_stopping_keeps_the_best_weights(pictures, tmp_path):
    """With a rate far too high the validation loss soon rises: training ends, and the best epoch's weights are kept."""
    settings = tiny(pictures, tmp_path, steps=500, lr=1e-7, lr_steps=0.3, patience=2)
    prepared = run.prepare(settings)
    prepared.train()
    rows = [r for r in callbacks.read_metrics(tmp_path / "metrics.csv") if r["stage"] == "unfolded"]
    losses = [float(r["val_loss"]) for r in rows]
    assert len(losses) < 500 // 3 and losses.index(min(losses)) == len(losses) - 3
    net = flowkern.Unfolded.from_pretrained(tmp_path / "checkpoints" / "unfolded")
    stage = stages.UnfoldedStage(net, settings, budget.Budget(None, None))
    found = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False)
    found = found.validate(stage, torch.utils.data.DataLoader(prepared.data.val, 4), verbose=False)[0]["val_loss"]
    assert found == pytest.approx(min(losses), rel=1e-5)


def test_noise_is_drawn_from_the_range_or_fixed(pictures, tmp_path):
    clean, noise = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    batch = {"clean": clean, "noise": noise, "level": torch.tensor([0.0, 0.5, 1.0])}
    for settings, wanted in (({}, [0.2, 0.2, 0.2]), ({"sigma": 0.1, "sigma_max": 0.3}, [0.1, 0.2, 0.3])):
        config_ = tiny(pictures, tmp_path, **settings)
        stage = stages.UnfoldedStage(torch.nn.Identity(), config_, budget.Budget(None, None))
        noisy, target = stage._estimate(batch)
        torch.testing.assert_close(noisy[:, 0, 0, 0], torch.tensor(wanted))
        assert torch.equal(target, clean)
    assert (tiny(pictures, "").trained_at(), config_.trained_at()) == ("0.20", "0.10 to 0.30")


def test_rates_are_the_paper_s_two_groups(pictures, tmp_path):
    net = flowkern.Unfolded(flowkern.GlowProx(flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4)), folds=2)
    stage = stages.UnfoldedStage(net, tiny(pictures, tmp_path, lr=1e-5, lr_steps=1e-2), budget.Budget(None, None))
    weights, steps = stage.configure_optimizers().param_groups
    assert (weights["lr"], steps["lr"]) == (1e-5, 1e-2)
    assert {id(p) for p in steps["params"]} == {id(net.mu), *(id(prox.raw_lam) for prox in net.proxes)}
    assert len(weights["params"]) + 3 == len(list(net.parameters()))
    assert (weights["betas"], weights["eps"]) == ((0.9, 0.999), 1e-8)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flowkern.Glow, "bits_per_dim", lambda self, x: x.sum(dim=(1, 2, 3)) * math.nan)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(TINY))
    assert unfolded.main(["--config", str(path), "--data", str(pictures), "--out", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert "error: the prior loss became nan at step 0: lower the learning rate" in error


def test_training_warns_when_a_level_drifts_and_names_it(pictures, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(drift, "DRIFT_LIMIT", 0.0)
    run.prepare(tiny(pictures, tmp_path, levels=2, depth=1, final="consistency")).train()
    told = [str(w.message).split(" drifts")[0] for w in recwarn.list if "drifts: inverse(forward(x))" in str(w.message)]
    # The last fold's flow does not run, so it has nothing to drift.
    assert sorted(told) == ["fold 1, level 1", "fold 1, level 2", "level 1", "level 2"]


def test_drift_is_measured_on_what_each_fold_gets(pictures, tmp_path):
    prepared = run.prepare(tiny(pictures, tmp_path))
    y = torch.stack([prepared.data.val[i]["clean"] for i in range(3)])
    prepared.prior.initialize(y)
    net = flowkern.Unfolded(flowkern.GlowProx(prepared.prior), folds=2)
    (first, x1), (second, x2) = drift.fold_inputs(net, y)
    assert (first, second) == tuple(net.proxes)
    torch.testing.assert_close(x1, 0.5 * net.proxes[0].mode(y) + 0.5 * y)
    torch.testing.assert_close(x2, 0.5 * first(x1) + 0.5 * y)
    assert not any(prox._forward_pre_hooks for prox in net.proxes)


def test_evaluation_scores_what_it_says(pictures, tmp_path):
    """A network that knows nothing but to return its input scores as the noisy image, clipped."""
    prepared = run.prepare(tiny(pictures, tmp_path, eval_sigmas=[0.2], figure_images=2))

    class Unchanged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, y):
            return y

    (level,) = evaluation.evaluate(Unchanged(), prepared.data, prepared.config)
    samples = [prepared.data.test[i] for i in range(5)]
    for i, sample in enumerate(samples):
        noisy = sample["clean"] + 0.2 * sample["noise"]
        clipped_error = (noisy.clamp(0, 1) - sample["clean"]).square().mean()
        assert level.psnr["unfolded"][i].item() == pytest.approx(-10 * math.log10(clipped_error), abs=1e-3)
        assert level.psnr["noisy"][i].item() == pytest.approx(
            -10 * math.log10((noisy - sample["clean"]).square().mean()), abs=1e-3
        )
        tv = evaluation.total_variation(noisy[None], level.tv_weight)[0].clamp(0, 1)
        assert level.psnr["tv"][i].item() == pytest.approx(
            -10 * math.log10((tv - sample["clean"]).square().mean()), abs=1e-3
        )
    difference = np.array([(level.psnr["unfolded"][i] - level.psnr["tv"][i]).item() for i in range(5)])
    gain = level.gain()
    assert gain["mean"] == pytest.approx(difference.mean(), abs=1e-5) and gain["n"] == 5
    assert gain["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(5), abs=1e-5)
    assert level.shown["tv"].shape == (2, 3, 8, 8)


def test_total_variation_is_tuned_on_the_validation_images(pictures, tmp_path):
    prepared = run.prepare(tiny(pictures, tmp_path))
    clean, noise = (torch.stack([prepared.data.val[i][k] for i in range(3)]) for k in ("clean", "noise"))
    noisy = clean + 0.2 * noise

    def score(weight):
        return stages.psnr(evaluation.total_variation(noisy, weight).clamp(0, 1), clean).mean()

    best = evaluation.tune_total_variation(clean, noisy)
    assert all(score(best) >= score(best * factor) - 0.02 for factor in (0.25, 0.5, 0.8, 1.25, 2, 4))


def test_figures_show_the_two_highest_noise_levels(tmp_path):
    image = torch.rand(3, 3, 8, 8)
    levels = []
    for sigma in (0.25, 0.1, 0.2):
        level = evaluation.Level(sigma, 0.1, shown={m: image for m in figures.COLUMNS})
        level.psnr = {m: torch.tensor([20.0, 21.0, 22.0]) for m in evaluation.METHODS}
        levels.append(level)
    figures.denoised(tmp_path / "a.png", levels)
    figures.denoised(tmp_path / "b.png", [levels[0], levels[2]])
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size == b.size and a.tobytes() == b.tobytes()


def test_peak_memory_counts_what_was_touched():
    touched = torch.ones(512 * 2**20 // 4)
    peak = callbacks.peak_memory_mib(torch.device("cpu"))
    assert touched.nbytes / 2**20 < peak < 2**20
    del touched
    assert callbacks.peak_memory_mib(torch.device("cpu")) >= peak


def test_commit_of_this_checkout_and_of_none(tmp_path, monkeypatch):
    found = report.commit()
    assert found is None or len(found.removesuffix("-modified")) == 40
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() is None


def test_folder_says_which_stages_are_complete(tmp_path):
    made = folder.Folder(tmp_path)
    assert not made.is_complete("prior")
    flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4).save_pretrained(made.model("prior"))
    assert made.is_complete("prior") and not made.is_complete("unfolded")
    assert set(asdict(Config())) - set(Config().of_run()) == {"out", "resume"}
