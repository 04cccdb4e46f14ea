"""Training at scale: several processes, batches in parts, averaged weights, bf16; each against the plain run."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distributed
import numpy as np
import pytest
import torch
from PIL import Image

import flowkern
from train import batchnorm, callbacks, run, stages
from train.config import Config

TINY = {
    "size": 16,
    "batch": 4,
    "epoch_images": 10,
    "levels": 1,
    "depth": 2,
    "hidden": 8,
    "resnet_width": 6,
    "unet_width": 2,
    "folds": 2,
    "prior_steps": 3,
    "prior_lr": 1e-3,
    "steps": 4,
    "lr": 1e-3,
    "clip": 0.1,
    "eval_sigmas": [0.2],
    "tensorboard": False,
    "references": [],
}
SHARED = {  # what two processes train, by name
    "glow": {"final": "consistency"},
    "resnet": {"prox": "resnet", "tied": True, "accumulate": 2, "batch": 8},
    "unet": {"prox": "unet", "ema": 0.5},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of smooth pictures, already split."""
    path = tmp_path_factory.mktemp("pictures")
    ramp = np.linspace(0, 1, 16)
    for split, count in (("train", 5), ("val", 3), ("test", 3)):
        (path / split).mkdir()
        for i in range(count):
            rng = np.random.default_rng([i, count])
            waves = rng.random(3) * np.sin(rng.uniform(1, 6, 3) * ramp[:, None, None] + ramp[None, :, None]) / 2 + 0.5
            Image.fromarray((255 * waves).astype(np.uint8)).save(path / split / f"{i}.png")
    return path


def settings(pictures, out, **changes):
    return TINY | {"data": str(pictures), "out": str(out)} | changes


def words(pictures, out, **changes):
    """The same as the command."""
    given = {k: v for k, v in settings(pictures, out, **changes).items() if k not in ("tensorboard", "references")}
    options = [w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "train.unfolded", "--preset", "paper", "--no-tensorboard", *options]


def trained(pictures, out, **changes):
    """The weights after a run in this process."""
    run.prepare(Config(**settings(pictures, out, **changes))).train()
    return weights(out)


def weights(path):
    return flowkern.Unfolded.from_pretrained(Path(path) / "checkpoints" / "unfolded").state_dict()


def assert_same_metrics(a, b):
    """metrics.csv of two runs: the same rows, their losses within rounding."""
    for one, other in zip(*(callbacks.read_metrics(p / "metrics.csv") for p in (a, b)), strict=True):
        assert [one[c] for c in ("stage", "epoch", "step")] == [other[c] for c in ("stage", "epoch", "step")]
        losses = [[float(row[c]) for c in ("loss", "val_loss")] for row in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def torchrun(*command, ended_at=None):
    """The command by two processes. ended_at: a file at which the launcher is told to end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with subprocess.Popen([*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment, cwd=root) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while ended_at is not None and not ended_at.exists() and process.poll() is None:
                assert time.monotonic() < deadline, f"there is no {ended_at}"
                time.sleep(0.05)
            if ended_at is not None:
                process.terminate()
            out, error = process.communicate(timeout=240)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@pytest.fixture(scope="module")
def two_processes(pictures, tmp_path_factory):
    """The folder in which two processes have trained all of SHARED."""
    path = tmp_path_factory.mktemp("two")
    todo = [settings(pictures, path / name, **changes) for name, changes in SHARED.items()]
    done = torchrun(str(Path(__file__).parent / "distributed.py"), json.dumps(todo))
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_what_one_does(name, two_processes, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(stages._Stage, "adam", distributed.steady_adam)
    alone, together = trained(pictures, tmp_path / name, **SHARED[name]), weights(two_processes / name)
    start = trained(pictures, tmp_path / "start", **SHARED[name] | {"steps": 1, "lr": 1e-12, "lr_steps": 1e-12})
    for key, value in alone.items():
        close = torch.allclose(together[key].double(), value.double(), rtol=1e-4, atol=1e-6)
        assert close, f"{key} is {together[key]} instead of {value}"
    moved, apart = (
        math.sqrt(sum((alone[k].double() - other[k].double()).square().sum().item() for k in alone))
        for other in (start, together)
    )
    assert 0 < moved and apart < 1e-2 * moved
    assert_same_metrics(two_processes / name, tmp_path / name)


@pytest.mark.parametrize("name", SHARED)
def test_every_gradient_s_hook_fires_once_a_step(name, two_processes):
    for rank in range(2):
        fired = json.loads((two_processes / f"{name}.{rank}.json").read_text())["fired"]
        idle = {n for n in fired if n.startswith("proxes.1.")} if name == "glow" else set()
        once = TINY["steps"] * SHARED[name].get("accumulate", 1)
        assert {fired[n] for n in fired if n not in idle} == {once} and not any(fired[n] for n in idle)


def test_actnorms_start_alike_in_all_processes(two_processes):
    first, second = (json.loads((two_processes / f"glow.{rank}.json").read_text()) for rank in range(2))
    assert first["initialised"]["scales"] == second["initialised"]["scales"]
    assert len({str(scale) for scale in first["initialised"]["scales"]}) == 2


def test_the_command_under_torchrun_and_its_mistakes(pictures, tmp_path):
    command = words(pictures, tmp_path / "run")
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1 and done.stdout.count("Unfolded Glow") >= 1
    assert (tmp_path / "run" / "results.json").is_file() and weights(tmp_path / "run")
    refused = torchrun(*command, "--batch", "3", "--out", str(tmp_path / "odd"))
    assert refused.returncode != 0 and not (tmp_path / "odd").exists()
    assert refused.stderr.count("error: a batch of 3 can't be divided among 2 processes in 1 parts each") == 1


def test_told_to_end_all_processes_end_after_the_same_step(pictures, tmp_path):
    """The launcher passes SIGTERM on to all, and kills after half a minute."""
    command = words(pictures, tmp_path / "run", steps=100_000, checkpoint_steps=1, prior_steps=1)
    state = tmp_path / "run" / "checkpoints" / "unfolded-last.ckpt"
    done = torchrun(*command, ended_at=state)
    assert done.stderr.count(f"interrupted, states are in {tmp_path / 'run'}: the same command continues") == 1
    assert "SIGKILL" not in done.stderr and "forcefully" not in done.stderr and state.exists()


@pytest.mark.parametrize(("here", "elsewhere"), [(False, False), (True, False), (False, True)])
def test_a_signal_waits_for_the_end_of_the_step_and_is_told_to_all(here, elsewhere, monkeypatch):
    """Within the signal another process may be waiting for something else, which is a deadlock now and then."""
    told = []
    monkeypatch.setattr(callbacks.dist, "all_reduce", lambda asked, _: told.append(asked.fill_(max(asked, elsewhere))))
    callback, trainer = callbacks.Termination(), SimpleNamespace(_signal_connector=SimpleNamespace())
    before = signal.getsignal(signal.SIGTERM)
    try:
        callback.on_train_start(trainer, None)
        if here:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not told
    callback.on_train_batch_end(trainer, SimpleNamespace(device="cpu"), None, None, 0)
    assert len(told) == 1 and trainer._signal_connector.received_sigterm == (here or elsewhere)


def test_batch_norm_over_processes_has_the_statistics_of_the_whole_batch(monkeypatch):
    """One process plays two: the sums that it hands out for adding up are answered with both halves' sums."""
    torch.manual_seed(0)
    whole = torch.rand(6, 4, 5, 3, dtype=torch.float64)
    plain = torch.nn.BatchNorm2d(4, momentum=0.3).double()
    halves = batchnorm._swap(torch.nn.Sequential(torch.nn.BatchNorm2d(4, momentum=0.3).double()),
                             torch.nn.BatchNorm2d, batchnorm.AcrossProcesses)[0]  # fmt: skip
    expected = plain(whole)
    sums = iter([whole.sum((0, 2, 3)), (whole - whole.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))])
    monkeypatch.setattr(batchnorm, "total", lambda part: next(sums))
    monkeypatch.setattr(batchnorm.dist, "get_world_size", lambda: 2)
    torch.testing.assert_close(halves(whole[:3]), expected[:3])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(halves, name), getattr(plain, name))
    halves.eval(), plain.eval()
    torch.testing.assert_close(halves(whole), plain(whole))


def test_a_batch_in_parts_is_the_same_batch(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(stages._Stage, "adam", distributed.steady_adam)
    whole = trained(pictures, tmp_path / "whole")
    parts = trained(pictures, tmp_path / "parts", accumulate=4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    assert_same_metrics(tmp_path / "whole", tmp_path / "parts")


def test_averaged_weights_are_what_is_kept(pictures, tmp_path):
    """The average starts at the weights after the first step."""
    plain = trained(pictures, tmp_path / "plain", prox="resnet", steps=2, epoch_images=8)
    averaged = trained(pictures, tmp_path / "averaged", prox="resnet", steps=2, epoch_images=8, ema=0.75)
    first = trained(pictures, tmp_path / "first", prox="resnet", steps=1, epoch_images=8)
    for name in (n for n in plain if "weight" in n):
        torch.testing.assert_close(averaged[name], 0.75 * first[name] + 0.25 * plain[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(averaged[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prox", ["glow", "unet"])
def test_bf16_trains_close_to_fp32(prox, pictures, tmp_path):
    both = {p: trained(pictures, tmp_path / p, prox=prox, precision=p) for p in ("32", "bf16-mixed")}
    assert all(v.dtype != torch.bfloat16 and v.isfinite().all() for v in both["bf16-mixed"].values())
    rows = [callbacks.read_metrics(tmp_path / p / "metrics.csv")[-1] for p in both]
    assert float(rows[1]["val_loss"]) == pytest.approx(float(rows[0]["val_loss"]), rel=0.05)
    assert rows[0]["val_loss"] != rows[1]["val_loss"]


def test_compiled_trains_the_same(pictures, tmp_path, monkeypatch):
    """Traced and differentiated as by torch.compile; its code generator, which takes a minute, is left out."""
    compile_ = torch.nn.Module.compile
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: asked.append(m) or compile_(m, backend="aot_eager"))
    plain, compiled = (trained(pictures, tmp_path / str(c), prox="resnet", compile=c, steps=2) for c in (False, True))
    assert [type(module) for module in asked] == [flowkern.Unfolded]
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=3e-4)
