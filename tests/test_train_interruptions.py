"""Interrupted training: killed at any moment, on a full disk, from torn checkpoints, it ends where it would have."""

import csv
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import flowkern
from train import callbacks, checkpoints, evaluate, run, stages
from train.config import Config

TINY = {
    "size": 16,
    "batch": 4,
    "epoch_images": 20,
    "levels": 1,
    "depth": 2,
    "hidden": 8,
    "unet_width": 2,
    "folds": 2,
    "prior_steps": 4,
    "prior_lr": 1e-3,
    "steps": 8,
    "lr": 1e-3,
    "eval_sigmas": [0.2],
    "checkpoint_steps": 2,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of random pictures, already split."""
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3), ("test", 3)):
        (path / split).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path / split / f"{i}.png")
    return path


def tiny(pictures, out, **settings):
    return Config(data=str(pictures), out=str(out), **(TINY | settings))


def options(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def weights(path):
    return flowkern.Unfolded.from_pretrained(Path(path) / "checkpoints" / "unfolded").state_dict()


def rows(path):
    """What metrics.csv says, but for times and memory."""
    measured = ("seconds", "images_per_second", "peak_mib")
    return [{k: v for k, v in row.items() if k not in measured} for row in callbacks.read_metrics(path / "metrics.csv")]


def same(a, b):
    """Whether two runs ended bitwise alike."""
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"prox": "unet", "ema": 0.7, "accumulate": 2}],
    ids=["glow", "unet, averaged, in parts"],
)
def test_killed_again_and_again_it_ends_bitwise_where_an_undisturbed_run_does(settings, pictures, tmp_path):
    run.prepare(tiny(pictures, tmp_path / "whole", **settings)).train()
    switches = {k: v for k, v in TINY.items() if k != "tensorboard"} | settings
    command = [sys.executable, str(Path(__file__).parent / "interrupted.py"), str(tmp_path / "killed"), "0.1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [*command, "--data", str(pictures), "--no-tensorboard", "--preset", "paper", *options(switches)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("killed ")[-1].split()[0]) >= 3
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.ckpt*"))


class Interrupted(Exception):
    """Stands in for a machine that goes away."""


def interrupted_at(step, settings, monkeypatch):
    """A run that has come to this step of its second stage and lies there."""
    batch_end = callbacks.Recorder.on_train_batch_end

    def interrupt(self, trainer, stage, *arguments):
        if stage.name == "unfolded" and trainer.global_step == step:
            raise Interrupted
        batch_end(self, trainer, stage, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Recorder, "on_train_batch_end", interrupt)
        with pytest.raises(Interrupted):
            run.prepare(settings).train()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off", None])
def test_from_a_torn_state_it_continues_with_the_one_before(content, pictures, tmp_path, monkeypatch):
    run.prepare(tiny(pictures, tmp_path / "whole")).train()
    settings = tiny(pictures, tmp_path / "torn")
    interrupted_at(7, settings, monkeypatch)
    state = tmp_path / "torn" / "checkpoints" / "unfolded-last.ckpt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.warns(UserWarning, match="unfolded-last.ckpt is missing or torn; continuing from unfolded-previous"):
        run.prepare(settings).train()
    assert same(tmp_path / "torn", tmp_path / "whole")


def test_a_folder_that_was_moved_keeps_its_best_weights(pictures, tmp_path, monkeypatch):
    """Lightning remembers absolute paths, and would forget what was best: here the first epoch, by decree."""
    check = stages.UnfoldedStage.check_finite
    worse = {"check_finite": lambda self, loss, *a: check(self, loss, *a) + (not self.training) * self.global_step}
    monkeypatch.setattr(stages.UnfoldedStage, "check_finite", worse["check_finite"])
    settings = {"steps": 8, "epoch_images": 8}
    run.prepare(tiny(pictures, tmp_path / "whole", **settings)).train()
    interrupted_at(3, tiny(pictures, tmp_path / "here", **settings), monkeypatch)
    (tmp_path / "here").rename(tmp_path / "there")
    run.prepare(tiny(pictures, tmp_path / "there", **settings)).train()
    assert same(tmp_path / "there", tmp_path / "whole")


def test_pictures_that_came_or_went_are_no_continuation(pictures, tmp_path, monkeypatch):
    """Undivided pictures are divided by their number: with another one, what was trained on is tested on."""
    undivided = tmp_path / "pictures"
    undivided.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))):
        (undivided / f"{i}.png").write_bytes(file.read_bytes())
    settings = tiny(undivided, tmp_path / "run")
    interrupted_at(3, settings, monkeypatch)
    more = [undivided / f"more{i}.png" for i in range(3)]
    for file in more:
        file.write_bytes((undivided / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"run was started with other pictures \(train 11 files, .* put them back"):
        run.prepare(settings)
    for file in more:
        file.unlink()
    run.prepare(settings).train()
    evaluated = evaluate.Settings(out=str(tmp_path / "evaluated"))
    held = evaluate.prepare([str(tmp_path / "run")], evaluated)
    with pytest.raises(FileExistsError, match="evaluated is being written by another process"):
        evaluate.prepare([str(tmp_path / "run")], evaluated)
    held()
    for file in more:
        file.write_bytes((undivided / "0.png").read_bytes())
    with pytest.raises(ValueError, match="other pictures .* say with --data which to evaluate on"):
        evaluate.prepare([str(tmp_path / "run")], evaluate.Settings(out=str(tmp_path / "other")))


def test_with_nothing_to_read_it_says_so_and_touches_nothing(pictures, tmp_path, monkeypatch):
    settings = tiny(pictures, tmp_path / "torn")
    interrupted_at(7, settings, monkeypatch)
    states = [tmp_path / "torn" / "checkpoints" / f"unfolded-{name}.ckpt" for name in ("last", "previous")]
    for state in states:
        state.write_bytes(b"torn")
    with pytest.raises(ValueError, match="can't be read; remove them to start their stage again") as caught:
        run.prepare(settings)
    assert "\n" not in str(caught.value) and all(state.read_bytes() == b"torn" for state in states)


def test_a_full_disk_costs_a_checkpoint_and_no_more(pictures, tmp_path, monkeypatch):
    """The disk is full while the second stage saves after step 2, then there is room again."""
    run.prepare(tiny(pictures, tmp_path / "whole")).train()
    fsync, full = os.fsync, []

    def no_room(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("unfolded-last.ckpt.partial"):
            full.append(name)
            if len(full) in (2, 3, 4):
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_room)
        settings = tiny(pictures, tmp_path / "full")
        with pytest.warns(UserWarning, match="No space left on device.*; training goes on without it"):
            interrupted_at(7, settings, monkeypatch)
    folder = tmp_path / "full" / "checkpoints"
    assert not list(folder.glob("*.partial"))
    assert torch.load(checkpoints.newest(folder / "unfolded-last.ckpt"), weights_only=True)["global_step"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.prepare(settings).train()
    assert same(tmp_path / "full", tmp_path / "whole")


def test_a_full_disk_costs_rows_and_events_and_no_more(pictures, tmp_path, monkeypatch):
    """A row that is half written, and TensorBoard's thread, which fails unseen and says so at the end."""
    write_row, full = csv.DictWriter.writerow, OSError(errno.ENOSPC, "No space left on device")

    def half_a_row(writer, row):
        early = row["step"] in (4, 5)
        write_row(writer, {"stage": row["stage"]} if early else row)
        if early:
            raise full

    def no_events(*_):
        raise full

    run.prepare(tiny(pictures, tmp_path / "whole")).train()
    with monkeypatch.context() as patched:
        patched.setattr(csv.DictWriter, "writerow", half_a_row)
        patched.setattr("tensorboard.summary.writer.event_file_writer.EventFileWriter.add_event", no_events)
        patched.setattr("tensorboard.summary.writer.event_file_writer.EventFileWriter.flush", no_events)
        with pytest.warns(UserWarning) as warned:
            run.prepare(tiny(pictures, tmp_path / "full", tensorboard=True)).train()
    said = [str(w.message) for w in warned]
    assert any(s.startswith("metrics.csv lacks epoch 0 ([Errno 28] No space left") for s in said)
    assert any(s.startswith("no more events for TensorBoard ([Errno 28]") for s in said)
    assert same(tmp_path / "full", tmp_path / "whole")
    assert [row["step"] for row in callbacks.read_metrics(tmp_path / "full" / "metrics.csv")] == ["8"]


def test_a_torn_state_does_not_take_its_predecessor_s_place(tmp_path):
    io, path = checkpoints.SafeCheckpoints(), tmp_path / "unfolded-last.ckpt"
    for step in range(2):
        io.save_checkpoint({"step": step}, path)
    path.write_bytes(b"torn")
    with pytest.warns(UserWarning, match="missing or torn"):
        assert checkpoints.newest(path) == checkpoints.previous(path)
    io.save_checkpoint({"step": 2}, path)
    assert torch.load(checkpoints.previous(path), weights_only=True)["step"] == 0


def test_a_state_is_never_without_its_predecessor(tmp_path):
    io, path = checkpoints.SafeCheckpoints(), tmp_path / "unfolded-last.ckpt"
    assert checkpoints.newest(path) is None
    for step in range(3):
        io.save_checkpoint({"step": step}, path)
    load = [torch.load(p, weights_only=True)["step"] for p in (path, checkpoints.previous(path))]
    assert load == [2, 1]
    path.unlink()  # a kill between the two renames
    with pytest.warns(UserWarning, match="missing or torn"):
        assert checkpoints.newest(path) == checkpoints.previous(path)
    checkpoints.discard(path)
    assert not any(tmp_path.iterdir())


def test_no_state_within_a_batch_or_before_the_validation_that_follows(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", lambda self, *given: saved.append(given[-1]))
    callback = checkpoints.StepCheckpoint(tmp_path, "x-last", every_n_train_steps=1)
    for i in range(6):
        trainer = SimpleNamespace(should_stop=False, is_last_batch=i == 5, accumulate_grad_batches=2)
        callback.on_train_batch_end(trainer, None, None, None, i)
    assert saved == [1, 3]
