"""A run and its folder: what it leaves, how it is continued, where its prior comes from."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from train_cases import FILES, TINY, Interrupted, names, network, rows, table, tiny

import flowkern
from train import callbacks, config, fitting, folder, report, run
from train.config import Config

# The folder of a run


def test_the_folder_is_complete(finished):
    assert names(finished) == FILES
    assert names(finished / "checkpoints") == {"prior", "unfolded"}
    for name in ("denoised.png", "curves.png"):
        with Image.open(finished / name) as image:
            image.load()
            assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 50
    saved = config.load(finished / "config.yaml")
    assert saved == replace(tiny(saved.data, saved.out), depth=[2])


def test_results_hold_the_numbers_and_their_protocol(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {
        "methods", "protocol", "network", "training", "config", "machine", "versions", "commit",
    }  # fmt: skip
    methods = results["methods"]
    assert list(methods) == ["noisy", "tv", "unfolded"]
    levels = zip(*(method["levels"] for method in methods.values()), strict=True)
    for sigma, (noisy, tv, unfolded) in zip(TINY["eval_sigmas"], levels, strict=True):
        assert noisy["sigma"] == tv["sigma"] == unfolded["sigma"] == sigma
        gain = unfolded["gain_over_tv"]
        assert gain["n"] == 5 and gain["mean"] == pytest.approx(unfolded["psnr"] - tv["psnr"], abs=1e-4)
        assert noisy["psnr"] == pytest.approx(-20 * math.log10(sigma), abs=0.5)
        assert tv["psnr"] > noisy["psnr"] and 0.02 <= tv["setting"] <= 2
        assert "gain_over_tv" not in noisy and "gain_over_tv" not in tv
    assert set(results["protocol"]) >= {
        "sigma", "clipping", "psnr", "ssim", "noise", "gain", "time", "memory", "images", "data",
    }  # fmt: skip
    assert "at each sigma maximises the mean PSNR on validation images" in results["protocol"]["Total variation"]
    assert results["protocol"]["Unfolded Glow"] == (
        "2 untied folds trained at σ = 0.20, pre-trained on clean images; 8 steps of 4 images of 16x16, "
        "learning rate 0.001"
    )
    net = network(finished)
    assert results["network"]["mu"] == net.mu.tolist()
    assert results["network"]["lambda"] == [prox.lam.item() for prox in net.proxes]
    assert methods["unfolded"]["parameters"] == sum(p.numel() for p in net.parameters())
    assert methods["unfolded"]["training_mib"] > 0 and methods["tv"]["seconds_per_image"] > 0
    training = results["training"]
    assert (training["prior"]["steps"], training["unfolded"]["steps"]) == (5, 8)
    assert all(stage["images_per_second"] > 0 and stage["process_peak_mib"] > 50 for stage in training.values())
    for name, stage in training.items():
        losses = [float(r["val_loss"]) for r in rows(finished, name)]
        assert (stage["val_loss"], stage["best_val_loss"]) == (losses[-1], min(losses))
    minutes = sum(stage["seconds"] for stage in training.values()) / 60
    assert methods["unfolded"]["training_minutes"] == pytest.approx(minutes)
    assert results["versions"]["torch"] == torch.__version__ and results["machine"]["cores"] >= 1
    assert results["config"]["folds"] == 2 and "out" not in results["config"]


def test_the_table_repeats_the_results(finished):
    header, *found = table(finished)
    assert header == [
        "", "σ = 0.10", "σ = 0.20", "σ = 0.25", "ms per image", "Parameters", "Training MiB", "Training min",
    ]  # fmt: skip
    methods = json.loads((finished / "results.json").read_text())["methods"]
    assert [row[0] for row in found] == [
        "Noisy", "Total variation", "Unfolded Glow", "Unfolded Glow − Total variation",
    ]  # fmt: skip
    for row, method in zip(found, methods.values(), strict=False):
        assert row[0] == method["title"]
        assert row[1:4] == [f"{level['psnr']:.2f} ({level['ssim']:.3f})" for level in method["levels"]]
    gains = [level["gain_over_tv"] for level in methods["unfolded"]["levels"]]
    assert found[3][1:4] == [f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}" for gain in gains]
    unfolded = methods["unfolded"]
    assert found[2][4:7] == [
        f"{1000 * unfolded['seconds_per_image']:.1f}",
        f"{unfolded['parameters'] / 1e6:.2f} M",
        f"{unfolded['training_mib']:.1f}",
    ]
    assert "- clipping: " in (finished / "table.md").read_text()


def test_metrics_have_a_row_per_epoch(finished):
    with (finished / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(r["stage"], int(r["epoch"]), int(r["step"])) for r in found] == [
        ("prior", 0, 3), ("prior", 1, 5), ("unfolded", 0, 3), ("unfolded", 1, 6), ("unfolded", 2, 8),
    ]  # fmt: skip
    assert all(math.isfinite(float(r[k])) for r in found for k in ("loss", "val_loss", "seconds", "images_per_second"))
    assert all(float(r["val_psnr"]) > 5 and float(r["val_ssim"]) <= 1 for r in found if r["stage"] == "unfolded")


def test_event_files_are_written_unless_declined(pictures, finished, tmp_path):
    assert not list(finished.rglob("events.out.*"))
    made = run.prepare(tiny(pictures, tmp_path / "run", prior_steps=1, tensorboard=True))
    made.trained_prior()
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.*"))


# Continuing and starting again


@pytest.mark.parametrize(("stage", "epoch"), [("prior", 1), ("unfolded", 1)])
def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(
    stage, epoch, pictures, finished, tmp_path, monkeypatch, capsys
):
    batch_end = callbacks.Recorder.on_train_batch_end

    def interrupt(self, trainer, module, *arguments):
        if module.name == stage and trainer.current_epoch == epoch:
            raise Interrupted
        batch_end(self, trainer, module, *arguments)

    settings = tiny(pictures, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Recorder, "on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            run.prepare(settings).train()
    assert (tmp_path / "run" / "checkpoints" / f"{stage}-last.ckpt").exists()
    assert not (tmp_path / "run" / "results.json").exists()
    again = run.prepare(settings)  # the same command
    assert f"{tmp_path / 'run'} continues" in capsys.readouterr().out
    again.holding(again.trained_network)
    resumed, whole = (network(path).state_dict() for path in (tmp_path / "run", finished))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    columns = ("stage", "epoch", "step", "loss", "val_loss", "val_psnr")
    found, expected = ([[r[c] for c in columns] for r in rows(path)] for path in (tmp_path / "run", finished))
    assert found == expected


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"steps": 500, "lr": 1e-7, "lr_steps": 0.3, "patience": 2}],
    ids=["steps", "parts", "early stopping"],
)
def test_a_stage_interrupted_between_its_last_state_and_its_model_is_not_trained_further(
    settings, pictures, tmp_path, monkeypatch
):
    def interrupt(*arguments):
        raise Interrupted

    settings = tiny(pictures, tmp_path / "run", prox="resnet", **settings)
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "_keep_best", interrupt)
        with pytest.raises(Interrupted):
            run.prepare(settings).trained_network()
    before = rows(tmp_path / "run")
    run.prepare(settings).trained_network()
    assert rows(tmp_path / "run") == before
    run.prepare(replace(settings, out=str(tmp_path / "whole"))).trained_network()
    resumed, whole = (network(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_finished_run_is_refused_or_reports_again(finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(run, "fit", None)
    settings = replace(config.load(copy / "config.yaml"), out=str(copy))
    with pytest.raises(FileExistsError, match="copy holds a finished run: pass --resume to report again, or another"):
        run.prepare(settings)
    (copy / "table.md").unlink()
    run.prepare(replace(settings, resume=True)).train()
    clock = 4  # the column with milliseconds
    assert [row[:clock] + row[clock + 1 :] for row in table(copy)] == [
        row[:clock] + row[clock + 1 :] for row in table(finished)
    ]
    run.prepare(replace(settings, resume=True))  # what is done lets go of the folder


@pytest.mark.parametrize("stage", ["prior", "unfolded"])
def test_damaged_weights_of_a_finished_stage_are_named_before_any_work(stage, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    weights = copy / "checkpoints" / stage / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=str(weights.parent)):
        run.prepare(replace(config.load(copy / "config.yaml"), out=str(copy), resume=True))


def test_other_settings_are_named_and_nothing_is_touched(pictures, finished, tmp_path):
    before = (finished / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"was started with other settings: folds was 2 and is now 3$"):
        run.prepare(tiny(pictures, finished, folds=3, resume=True))
    unfinished = run.prepare(tiny(pictures, tmp_path / "run"))
    unfinished.folder.unlock()
    with pytest.raises(ValueError, match="lr was 0.001 and is now 0.5; seed was 0 and is now 1"):
        run.prepare(tiny(pictures, tmp_path / "run", lr=0.5, seed=1))
    assert (finished / "config.yaml").read_text() == before


def test_what_is_no_run_is_neither_continued_nor_written_over(pictures, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=f"{name} exists, is not empty and holds no unfinished run: pass an"):
            run.prepare(tiny(pictures, tmp_path / name))
    (tmp_path / "folder" / "thesis.tex").rename(tmp_path / "folder" / "table.md")
    with pytest.raises(FileExistsError, match="holds no unfinished run"):
        folder.fresh(str(tmp_path / "folder"), "evaluate")
    (tmp_path / "folder" / ".lock").touch()  # it was an evaluation's, on a disk that was full
    assert folder.fresh(str(tmp_path / "folder"), "evaluate").path == tmp_path / "folder"
    (tmp_path / "folder" / "results.json").touch()
    with pytest.raises(FileExistsError, match="holds no unfinished run"):
        folder.fresh(str(tmp_path / "folder"), "evaluate")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("- not\n- settings\n")
    with pytest.raises(ValueError, match="other/config.yaml does not hold the settings of a run") as caught:
        run.prepare(tiny(pictures, tmp_path / "other"))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing to resume: .*elsewhere holds no run"):
        run.prepare(tiny(pictures, tmp_path / "elsewhere", resume=True))
    (tmp_path / "empty").mkdir()
    assert run.prepare(tiny(pictures, tmp_path / "empty")).folder.path == tmp_path / "empty"


def test_ctrl_c_says_how_to_continue(pictures, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(callbacks.Recorder, "on_train_batch_end", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run.prepare(tiny(pictures, tmp_path / "run")).train()
    signal.signal(signal.SIGINT, handler)  # Lightning switches it off while it shuts down
    assert stopped.value.code == 130
    assert f"states are in {tmp_path / 'run'}: the same command continues" in capsys.readouterr().err


def test_a_run_that_is_told_to_end_says_so_by_its_status(pictures, tmp_path, monkeypatch, capsys):
    """A scheduler that takes its machine away must not take it for done."""
    batch_end = callbacks.Recorder.on_train_batch_end

    def terminate(self, *arguments):
        batch_end(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(callbacks.Recorder, "on_train_batch_end", terminate)
        run.prepare(tiny(pictures, tmp_path / "run")).train()
    assert stopped.value.code == 143
    assert f"states are in {tmp_path / 'run'}: the same command continues" in capsys.readouterr().err


def test_a_trained_network_s_memory_is_the_same_after_loading(pictures, tmp_path):
    settings = tiny(pictures, tmp_path / "run", memory="store", folds=4, kept_images=1, prior_steps=1, steps=1)
    made = run.prepare(settings)
    net = made.trained_network()
    made.folder.unlock()
    loaded = run.load_network(settings, made.folder)
    assert loaded.kept_images == net.kept_images == 1
    assert run.training_mib(loaded, settings) == pytest.approx(run.training_mib(net, settings), rel=0.02)


def test_what_was_compiled_for_training_is_not_while_it_is_timed(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fit", lambda stage, *rest: stage.model.compile())
    made = run.prepare(tiny(pictures, tmp_path / "run", pretrain=False, compile=True))
    net = made.trained_network()
    made.folder.unlock()
    assert net._compiled_call_impl is None


def test_numbered_runs(pictures, tmp_path, monkeypatch):
    """A new number for what is new; the latest one goes on if it is unfinished, the same, and nobody is at it."""
    monkeypatch.chdir(tmp_path)
    settings = tiny(pictures, None)

    def prepared(**changes):
        return run.prepare(replace(settings, **changes)).folder

    first = prepared()
    assert str(first.path) == "runs/unfolded-001"
    second = prepared()  # the first is being written
    assert str(second.path) == "runs/unfolded-002"
    second.unlock()
    again = prepared()
    assert again.path == second.path
    again.unlock()
    third = prepared(seed=1)
    assert str(third.path) == "runs/unfolded-003"
    third.unlock()
    assert str(run.prepare(settings, kind="pretrain").folder.path) == "runs/pretrain-001"
    with pytest.raises(ValueError, match="unfolded-003 was started with other settings: seed was 1 and is now 0"):
        prepared(resume=True)
    third.results.write_text("{}")
    assert str(prepared(seed=1).path) == "runs/unfolded-004"
    shutil.rmtree("runs/unfolded-004")
    resumed = prepared(seed=1, resume=True)
    assert resumed.path == third.path
    with pytest.raises(FileExistsError, match="unfolded-003 is being written by another process"):
        prepared(seed=1, resume=True)


def test_a_folder_in_use_by_another_process_is_refused(pictures, tmp_path):
    settings = tiny(pictures, tmp_path / "run")
    run.prepare(settings).folder.unlock()
    program = "import filelock as f, sys; a = f.FileLock(sys.argv[1]); a.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for changes in ({}, {"resume": True}):
            with pytest.raises(FileExistsError, match="run is being written by another process"):
                run.prepare(replace(settings, **changes))
        other.kill()  # a process that dies gives its folder back
    held = run.prepare(settings)
    with pytest.raises(Exception, match="could not be acquired"):
        FileLock(tmp_path / "run" / ".lock").acquire(blocking=False)
    with pytest.raises(Interrupted):
        held.holding(lambda: (_ for _ in ()).throw(Interrupted))
    FileLock(tmp_path / "run" / ".lock").acquire(blocking=False)


def test_nothing_is_written_when_preparation_fails(pictures, tmp_path):
    with pytest.raises(FileNotFoundError):
        run.prepare(tiny(tmp_path / "no pictures", tmp_path / "out"))
    with pytest.raises(ValueError, match="a batch of 4 can't be divided among 1 processes in 3 parts each"):
        run.prepare(tiny(pictures, tmp_path / "out", accumulate=3))
    assert not (tmp_path / "out").exists()


def test_folder_says_which_stages_are_complete(tmp_path):
    made = folder.Folder(tmp_path)
    assert not made.is_complete("prior")
    flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4).save_pretrained(made.model("prior"))
    assert made.is_complete("prior") and not made.is_complete("unfolded")
    (made.model("prior") / "config.json").unlink()  # an interruption while it was written
    assert not made.is_complete("prior")
    assert set(asdict(Config())) - set(Config().of_run()) == {"out", "resume"}


def test_settings_are_read_back(tmp_path):
    settings = Config(depth=[1, 2, 3, 4], eval_sigmas=(0.3,), references=(), out="x")
    config.save(settings, tmp_path / "a.yaml")
    assert config.load(tmp_path / "a.yaml") == replace(settings, out=None)
    (tmp_path / "a.yaml").write_text("folds: 4\nwings: 2\n")
    with pytest.raises(ValueError, match="a.yaml does not hold the settings of a run: .*wings"):
        config.load(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        (tmp_path / "a.yaml").write_text("folds: [")
        config.load(tmp_path / "a.yaml")


def test_a_run_of_another_machine_s_backend_is_loaded(finished):
    made = replace(config.load(folder.Folder(finished).config), backend="cuda")
    if flowkern.backends()["cuda"] is not True:
        assert run.load_network(made, folder.Folder(finished)).proxes[0].glow.backend == "auto"


def test_settings_of_another_version_where_a_run_started_cost_no_report(pictures, finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    prepared = run.prepare(tiny(pictures, tmp_path / "run", prior_checkpoint=str(source), steps=1))
    (source / "config.yaml").write_text("wings: 2\n")
    results = json.loads((prepared.train() / "results.json").read_text())
    assert "with a Glow trained before" in results["protocol"]["Unfolded Glow"]


# A prior from a checkpoint


def test_prior_from_a_checkpoint_skips_pre_training(pictures, finished, tmp_path):
    for source in (finished, finished / "checkpoints" / "prior"):
        out = tmp_path / source.name
        prepared = run.prepare(tiny(pictures, out, prior_checkpoint=str(source), depth=7, hidden=5, steps=3))
        assert (prepared.config.depth, prepared.config.hidden) == ([2], 8)
        prepared.holding(prepared.trained_network)
        assert {r["stage"] for r in rows(out)} == {"unfolded"}
        kept = flowkern.Glow.from_pretrained(out / "checkpoints" / "prior").state_dict()
        given = flowkern.Glow.from_pretrained(finished / "checkpoints" / "prior").state_dict()
        assert all(torch.equal(kept[name], given[name]) for name in given)
        # The same command goes on although its flow settings are not those that were saved.
        run.prepare(tiny(pictures, out, prior_checkpoint=str(source), depth=7, hidden=5, steps=3)).folder.unlock()


@pytest.mark.parametrize("start", ["prior_checkpoint", "network_checkpoint"])
def test_a_start_that_held_out_other_pictures_is_told_of(start, pictures, finished, tmp_path, recwarn):
    def prepare(name):
        settings = {start: str(tmp_path / "source")}
        run.prepare(tiny(tmp_path / "data", tmp_path / name, steps=1, **settings)).folder.unlock()
        return [str(w.message) for w in recwarn if "was started with other pictures" in str(w.message)]

    shutil.copytree(pictures, tmp_path / "data")
    shutil.copytree(finished, tmp_path / "source")
    config.save(tiny(tmp_path / "data", ""), tmp_path / "source" / "config.yaml")
    assert not prepare("same")
    (tmp_path / "data" / "train" / "0.png").rename(tmp_path / "data" / "train" / "new.png")
    assert not prepare("trained on others")
    (tmp_path / "data" / "test" / "0.png").rename(tmp_path / "data" / "test" / "new.png")
    (said,) = prepare("tested on others")
    assert "test 5 files" in said and "what it was trained on may be among what is tested on now" in said


@pytest.mark.parametrize("prox", ["glow", "unet"])
def test_a_network_starts_from_the_proxes_of_another_measurement_s(prox, pictures, finished, tmp_path):
    source = finished
    if prox == "unet":
        made = run.prepare(tiny(pictures, tmp_path / "unet", prox="unet", references=["tv"], steps=3))
        source = made.train()
    given = {"network_checkpoint": str(source), "operator": "inpaint", "sigma": 0.05, "init": "adjoint"}
    given |= {"folds": 5, "hidden": 5, "steps": 1, "lr": 1e-9, "lr_steps": 1e-9}
    started = run.prepare(tiny(pictures, tmp_path / "out", **given))
    assert (started.config.prox, started.config.folds, started.config.hidden) == (prox, 2, 8)
    net = started.holding(started.trained_network)
    assert {r["stage"] for r in rows(tmp_path / "out")} == {"unfolded"}
    before = flowkern.Unfolded.from_pretrained(source / "checkpoints" / "unfolded")
    weights = dict(before.proxes.named_parameters())
    for name, p in net.proxes.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.mu, torch.full((2,), 0.5))  # a step size belongs to the operator
    own = [r["seconds"] for s in (source, tmp_path / "out") for r in report.training(folder.Folder(s)).values()]
    settings = config.load(tmp_path / "out" / "config.yaml")
    assert run.training_seconds(settings, folder.Folder(tmp_path / "out")) == pytest.approx(sum(own))
    assert ", from a network trained at σ = 0.20;" in run.trained_as(settings)
    config.save(tiny(pictures, "", prior_noise=0.07), tmp_path / "config.yaml")  # a prior behind the network's own
    config.save(tiny(pictures, "", prior_checkpoint=str(tmp_path)), tmp_path / "out" / "config.yaml")
    chained = replace(settings, prior_checkpoint=str(tmp_path / "out"))
    assert run.pretrained_as(chained) == "pre-trained on images with noise of sigma up to 0.07"
    config.save(settings, tmp_path / "out" / "config.yaml")
    # The same command continues.
    run.prepare(tiny(pictures, tmp_path / "out", **given)).folder.unlock()


def test_the_time_of_training_follows_priors_through_the_runs_that_they_come_from(pictures, finished, tmp_path):
    for name, source in (("second", finished), ("third", tmp_path / "second")):
        made = run.prepare(tiny(pictures, tmp_path / name, prior_checkpoint=str(source), steps=1))
        made.holding(made.trained_network)
    own = report.training(folder.Folder(tmp_path / "third"))
    first = report.training(folder.Folder(finished))["prior"]["seconds"]
    found = run.training_seconds(config.load(tmp_path / "third" / "config.yaml"), folder.Folder(tmp_path / "third"))
    assert set(own) == {"unfolded"} and first > 0
    assert found == pytest.approx(own["unfolded"]["seconds"] + first)


def test_a_noise_aware_network_is_told_the_level_wherever_it_runs(pictures, tmp_path, monkeypatch):
    """In training, in the drift's measurement, in evaluation; and lambda keeps its meaning in a run that goes on."""
    seen = []
    forward = flowkern.Unfolded.forward

    def listening(net, y, *, sigma=None, **options):
        seen.append(sigma)
        return forward(net, y, sigma=sigma, **options)

    monkeypatch.setattr(flowkern.Unfolded, "forward", listening)
    given = {"noise_aware": True, "sigma": 0.1, "sigma_max": 0.3, "lam": 0.4, "lr_steps": 1e-9, "steps": 2}
    made = run.prepare(tiny(pictures, tmp_path / "source", **given))
    source = made.train()
    net = network(source)
    assert (net.noise_aware, net.sigma_ref) == (True, 0.3)
    assert all(prox.lam.item() == pytest.approx(0.4) for prox in net.proxes)
    ranges = [s for s in seen if isinstance(s, torch.Tensor) and len(s) == 4]
    assert ranges and all(bool(((s >= 0.1) & (s <= 0.3)).all()) for s in ranges) and len(set(ranges[0].tolist())) == 4
    assert {s for s in seen if isinstance(s, float)} == {0.1, *TINY["eval_sigmas"]}  # the first is the drift's, too
    assert "at σ = 0.10 to 0.30, which it is told" in json.loads((source / "results.json").read_text())["protocol"][
        "Unfolded Glow"
    ]
    on = tiny(pictures, tmp_path / "on", network_checkpoint=str(source), sigma=0.05, steps=1)
    started = run.prepare(on)
    net = started.holding(started.trained_network)
    assert (started.config.noise_aware, net.noise_aware, net.sigma_ref) == (True, True, 0.3)
    blind = run.prepare(tiny(pictures, tmp_path / "blind", sigma=0.1, sigma_max=0.25, steps=1))
    blind.holding(blind.trained_network)
    on = tiny(pictures, tmp_path / "aware", network_checkpoint=str(tmp_path / "blind"), noise_aware=True, steps=1)
    started = run.prepare(on)
    net = started.holding(started.trained_network)
    assert (net.noise_aware, net.sigma_ref) == (True, 0.25)


@pytest.mark.parametrize("missing", ["folder", "network"])
def test_an_unusable_network_to_start_from_is_one_sentence(missing, pictures, tmp_path):
    message = "is not the folder of a run: it has no config.yaml"
    if missing == "network":
        made = run.prepare(tiny(pictures, tmp_path / "source"))
        made.holding(made.trained_prior)
        message = "is not a saved Unfolded"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        run.prepare(tiny(pictures, tmp_path / "out", network_checkpoint=str(tmp_path / "source")))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


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


# What a run says of itself


def test_commit_of_this_checkout_and_of_none(tmp_path, monkeypatch):
    found = report.commit()
    assert found is None or len(found.removesuffix("-modified")) == 40
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tied": True}, "4 tied folds trained at σ = 0.20, pre-trained on clean images; until validation stops"),
        ({"prior_noise": 0.3, "seconds": 9}, "pre-trained on images with noise of sigma up to 0.3; 9 s of 16"),
        ({"pretrain": False, "sigma_max": 0.4}, "σ = 0.20 to 0.40, not pre-trained;"),
        ({"prox": "unet", "steps": 7, "seconds": 9}, "4 untied folds trained at σ = 0.20; 7 steps or 9 s of 16"),
    ],
)
def test_a_run_says_how_it_was_trained(settings, said):
    assert said in run.trained_as(Config(**settings))


def test_results_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "results.json").write_text('{"old": 1}')
    with pytest.raises(TypeError):
        report.finish(tmp_path / "results.json", {"not for JSON": torch.zeros(1)})
    assert json.loads((tmp_path / "results.json").read_text()) == {"old": 1}
    report.finish(tmp_path / "results.json", {"new": 2})
    assert yaml.safe_load((tmp_path / "results.json").read_text()) == {"new": 2}
    assert names(tmp_path) == {"results.json"}


def test_a_folder_that_was_taken_meanwhile_is_refused(pictures, tmp_path):
    made = run.prepare(tiny(pictures, tmp_path / "run"))
    made.folder.unlock()
    with pytest.raises(FileExistsError, match="taken by another process in the meantime"):
        other = folder.Folder(tmp_path / "run")
        folder.create(other, tiny(pictures, tmp_path / "run", seed=7), made.data.pictures.listing)
