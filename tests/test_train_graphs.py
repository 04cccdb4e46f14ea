"""Replaying training steps from CUDA graphs: when it is wanted, and that it stands in for the model. Graphs themselves
are a GPU's business (tests/gpu/test_graphs.py).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowkern
from train import data, graphs, ranks, stages
from train.budget import Budget
from train.config import Config

CONFIG = Config(size=16, batch=3, levels=2, depth=2, hidden=6, folds=2)
GPU = torch.device("cuda", 0)


@pytest.fixture
def captured(monkeypatch):
    """Capturing as what it promises: a callable in place of the module, which counts its calls."""
    made = []

    def make(module, examples, allow_unused_input):
        assert module.training and not any(example.requires_grad for example in examples)
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
        made.append(0)

        def replay(*given):
            made[-1] += 1
            return module(*given)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return made


def glow():
    torch.manual_seed(0)
    made = flowkern.Glow((3, 16, 16), levels=2, depth=2, hidden=6)
    made.initialize(torch.rand(4, 3, 16, 16))
    return made


def loss_of(output):
    return output["loss"] if isinstance(output, dict) else output


def a_batch(count=3):
    generator = torch.Generator().manual_seed(count)
    batch = {name: torch.rand(count, 3, 16, 16, generator=generator) for name in ("clean", "noise", "prior")}
    return batch | {"level": torch.zeros(count)}


def test_wanted_for_a_glow_in_whole_batches_on_one_gpu(monkeypatch):
    assert graphs.wanted(CONFIG, GPU)
    assert not graphs.wanted(CONFIG, torch.device("cpu"))
    for other in ({"cuda_graphs": False}, {"prox": "resnet"}, {"compile": True}, {"accumulate": 3}):
        assert not graphs.wanted(replace(CONFIG, **other), GPU), other
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert not graphs.wanted(CONFIG, GPU)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_training_replays_and_validation_does_not(captured, precision):
    config = replace(CONFIG, precision=precision)
    net = flowkern.Unfolded(flowkern.GlowProx(glow()), folds=2)
    of_net = stages.UnfoldedStage(net, config, Budget(None, None)).train()
    of_glow = stages.PriorStage(glow(), config, Budget(None, None)).train()
    for stage in (of_net, of_glow):
        stage.capture(a_batch())
        stage.log = lambda *_, **__: None
    assert captured == [0, 0]
    for stage in (of_net, of_glow):
        before = sum(captured)
        replayed = loss_of(stage.training_step(a_batch(), 0))
        assert sum(captured) == before + 1
        stage.training_step(a_batch(2), 0)  # another shape than was captured
        stage.replayed, kept = None, stage.replayed
        assert torch.equal(loss_of(stage.training_step(a_batch(), 0)), replayed)
        stage.replayed = kept
        assert sum(captured) == before + 1
    of_net.eval()
    before = sum(captured)
    of_net.loss(a_batch())
    assert sum(captured) == before
    of_net.on_train_end()
    assert of_net.replayed is None
    # A captured step is no part of the model.
    assert not any("replayed" in name for name in of_net.state_dict())
    assert [name for name, _ in net.named_modules() if "run" in name] == []


@pytest.mark.parametrize(
    "measured",
    [
        {"operator": "inpaint"},
        {"operator": "inpaint", "likelihood": 1e-3},
        {"operator": "inpaint", "inpaint_hole": 5, "inpaint_seed": 1},
        {"operator": "blur", "blur_sigma": 1.0},
        {"operator": "sr"},
        {"operator": "cs"},
    ],
)
def test_operators_are_replayed_with_the_masks_of_the_batch(captured, measured):
    config = replace(CONFIG, **measured, init="smooth")
    made = config.measurement
    net = flowkern.Unfolded(flowkern.GlowProx(glow()), 2, made.operator(16), init="smooth")
    stage = stages.UnfoldedStage(net, config, Budget(None, None)).train()
    stage.log = lambda *_, **__: None
    stage.capture(data.random_batch(config, torch.device("cpu")))
    for seed in range(2):
        noise = torch.randn(3, *made.noise_shape(16), generator=torch.Generator().manual_seed(seed))
        masks = torch.stack([made.mask(16, np.random.default_rng(seed + i)) for i in range(3)]) if made.varies else None
        batch = a_batch() | {"noise": noise} | ({"mask": masks} if made.varies else {})
        replayed = loss_of(stage.training_step(batch, 0))
        assert captured == [seed + 1]
        y, given = made.measure(batch, config.sigma)
        launched, log_prob = net(y, return_log_prob=True, **given)
        launched = torch.nn.functional.mse_loss(launched, batch["clean"]) - config.likelihood * log_prob.mean() / 768
        torch.testing.assert_close(replayed, launched, rtol=1e-5, atol=0)
