"""The stages of training: budgets, losses and learning rates, early stopping, every kind of network, drift."""

import math
from types import SimpleNamespace

import pytest
import torch
from train_cases import network, rows, tiny

import flowkern
from train import budget, callbacks, data, drift, run, stages


def validation_loss(net, made):
    """The mean squared error on the validation images, from the definition."""
    samples = [made.data.val[i] for i in range(len(made.data.val))]
    clean, noise = (torch.stack([s[key] for s in samples]) for key in ("clean", "noise"))
    with torch.no_grad():
        return (net.eval()(clean + made.config.sigma * noise) - clean).square().mean().item()


# Budgets


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
    settings = tiny(pictures, tmp_path, prior_steps=None, prior_seconds=0.5, patience=10**6)
    run.prepare(settings).trained_prior()
    seconds = [float(r["seconds"]) for r in rows(tmp_path, "prior")]
    assert 0.5 <= seconds[-1] < 10


def test_early_stopping_keeps_the_best_weights(pictures, tmp_path):
    """With a rate far too high the validation loss soon rises: training ends, and the best epoch's weights are kept."""
    made = run.prepare(tiny(pictures, tmp_path, steps=500, lr=1e-7, lr_steps=0.3, patience=2))
    made.trained_network()
    losses = [float(r["val_loss"]) for r in rows(tmp_path, "unfolded")]
    assert len(losses) < 500 // 3 and losses.index(min(losses)) == len(losses) - 3
    assert validation_loss(network(tmp_path), made) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < 0.99 * losses[-1]  # so that the best weights can be told from the last


# Losses and rates


def test_noise_is_drawn_from_the_range_or_fixed(pictures, tmp_path):
    clean, noise = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    batch = {"clean": clean, "noise": noise, "level": torch.tensor([0.0, 0.5, 1.0])}
    for settings, wanted in (({}, [0.2, 0.2, 0.2]), ({"sigma": 0.1, "sigma_max": 0.3}, [0.1, 0.2, 0.3])):
        config = tiny(pictures, tmp_path, **settings)
        stage = stages.UnfoldedStage(torch.nn.Identity(), config, budget.Budget(None, None))
        (noisy,) = stage.estimate(batch)
        torch.testing.assert_close(noisy[:, 0, 0, 0], torch.tensor(wanted))
        assert stage.loss(batch).item() == pytest.approx(sum(s**2 for s in wanted) / 3)
    assert (tiny(pictures, "").trained_at(), config.trained_at()) == ("0.20", "0.10 to 0.30")


def test_the_loss_is_the_squared_error_or_the_mean_psnr_of_images(pictures, tmp_path):
    """In dB an image with a tenth of the error counts as much as another, and a perfect one is finite."""
    clean, noise = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    batch = {"clean": clean, "noise": noise, "level": torch.tensor([0.0, 1.0, 0.0])}
    losses = {}
    for loss in ("mse", "psnr"):
        config = tiny(pictures, tmp_path, sigma=0.1, sigma_max=1.0, loss=loss)
        stage = stages.UnfoldedStage(torch.nn.Identity(), config, budget.Budget(None, None))
        losses[loss] = stage.loss(batch).item()
    assert losses["mse"] == pytest.approx((0.01 + 1 + 0.01) / 3)
    assert losses["psnr"] == pytest.approx(-(20 + 0 + 20) / 3, rel=1e-5)
    assert stage.error(clean, clean).item() == pytest.approx(-90)


@pytest.mark.parametrize("bits", [5, 8])
def test_the_prior_is_trained_on_bits_per_dimension_of_its_bits(bits, pictures, tmp_path):
    glow = flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4)
    batch = {"prior": torch.rand(4, 3, 8, 8)}
    glow.initialize(batch["prior"])
    stage = stages.PriorStage(glow, tiny(pictures, tmp_path, bits=bits), budget.Budget(None, None))
    wanted = (-glow.log_prob(batch["prior"]) / (192 * math.log(2)) + bits).mean()
    assert stage.run_or_replay(*stage.inputs(batch)).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_likelihood_is_trained_along_with_its_weight_and_validation_is_without(pictures, tmp_path):
    glow = flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4)
    glow.initialize(torch.rand(8, 3, 8, 8))
    net = flowkern.Unfolded(flowkern.GlowProx(glow, 0.3), folds=2)
    batch = {"clean": torch.rand(4, 3, 8, 8), "noise": torch.randn(4, 3, 8, 8), "level": torch.zeros(4)}
    losses = {}
    for weight in (0.0, 0.5):
        stage = stages.UnfoldedStage(net, tiny(pictures, tmp_path, likelihood=weight), budget.Budget(None, None))
        losses[weight] = stage.loss(batch).item()
        assert stage.eval().loss(batch).item() == pytest.approx(losses[0.0])
        stage.train()
    y = batch["clean"] + 0.2 * batch["noise"]
    x, log_prob = net(y, return_log_prob=True)
    assert losses[0.0] == pytest.approx((x - batch["clean"]).square().mean().item())
    assert losses[0.5] == pytest.approx(losses[0.0] - 0.5 * log_prob.mean().item() / 192, rel=1e-5)
    other = tiny(pictures, tmp_path, likelihood=0.5, prox="resnet", references=["tv"])
    resnet = flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2)
    stages.UnfoldedStage(resnet, other, budget.Budget(None, None)).loss(batch).backward()


def test_the_likelihood_holds_latents_at_unit_scale(pictures, tmp_path):
    """At a rate at which they drift away without it."""

    def largest_latent(likelihood):
        given = {"steps": 40, "epoch_images": 24, "lr": 2e-2, "patience": 99, "lam": 0.3}
        made = run.prepare(tiny(pictures, tmp_path / str(likelihood), likelihood=likelihood, **given))
        net, seen = made.trained_network(), []
        batch = torch.stack([made.data.train[i]["clean"] for i in range(4)])
        hooks = [p.glow.register_forward_hook(lambda _, x, found: seen.append(found[0])) for p in net.proxes]
        with torch.no_grad():
            net(batch + 0.2 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)))
        assert len(hooks) == len(seen)
        return max(z.square().mean().item() for z in seen)

    free, held = largest_latent(0.0), largest_latent(1e-2)
    assert held < 2 and free > 5 * held, (free, held)


def test_rates_are_the_paper_s_two_groups(pictures, tmp_path):
    net = flowkern.Unfolded(flowkern.GlowProx(flowkern.Glow((3, 8, 8), levels=1, depth=1, hidden=4)), folds=2)
    stage = stages.UnfoldedStage(net, tiny(pictures, tmp_path, lr=1e-5, lr_steps=1e-2), budget.Budget(None, None))
    weights, steps = stage.configure_optimizers().param_groups
    assert (weights["lr"], steps["lr"]) == (1e-5, 1e-2)
    assert {id(p) for p in steps["params"]} == {id(net.mu), *(id(prox.raw_lam) for prox in net.proxes)}
    assert len(weights["params"]) + 3 == len(list(net.parameters()))
    assert (weights["betas"], weights["eps"]) == ((0.9, 0.999), 1e-8)


def test_a_single_fold_that_ends_with_consistency_has_no_likelihood(pictures, tmp_path):
    """Its flow makes the start alone."""
    prox = flowkern.GlowProx(flowkern.Glow((3, 16, 16), levels=1, depth=1, hidden=4))
    prox.glow.initialize(torch.rand(4, 3, 16, 16))
    net = flowkern.Unfolded(prox, folds=1, final="consistency")
    config = tiny(pictures, tmp_path, final="consistency", folds=1, likelihood=1e-3)
    stage = stages.UnfoldedStage(net, config, budget.Budget(None, None)).train()
    loss = stage.loss({key: torch.rand(2, 3, 16, 16) for key in ("clean", "noise")} | {"level": torch.zeros(2)})
    loss.backward()
    assert loss.isfinite()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_with_the_consistency_readout_only_what_has_a_gradient_is_trained(tied, pictures, tmp_path):
    """The last prox does not run, but the weights that it shares with the others do."""
    prox = flowkern.GlowProx(flowkern.Glow((3, 16, 16), levels=1, depth=1, hidden=4))
    prox.glow.initialize(torch.rand(4, 3, 16, 16))
    net = flowkern.Unfolded(prox, folds=2, tied=tied, final="consistency")
    config = tiny(pictures, tmp_path, final="consistency", tied=tied)
    stage = stages.UnfoldedStage(net, config, budget.Budget(None, None))
    trained = {id(p) for group in stage.configure_optimizers().param_groups for p in group["params"]}
    stage.loss({key: torch.rand(2, 3, 16, 16) for key in ("clean", "noise")} | {"level": torch.zeros(2)}).backward()
    with_gradient = {id(p) for p in net.parameters() if p.grad is not None}
    used = {id(p) for p in (net.mu, *net.proxes[0].parameters())}
    assert trained == with_gradient == used


# Every kind of network


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prox": "resnet", "lr": 1e-2},
        {"prox": "unet", "lr": 1e-2},
        {"tied": True},
        {"prox": "unet", "tied": True, "lr": 1e-2},
        {"pretrain": False},
        {"final": "consistency"},
        {"tied": True, "final": "consistency"},
        {"init": "adjoint", "folds": 1},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items() if k != "lr") or "glow",
)
def test_training_lowers_the_loss_and_the_network_is_saved(settings, pictures, tmp_path):
    made = run.prepare(tiny(pictures, tmp_path, **({"steps": 30, "epoch_images": 24, "lr": 8e-3} | settings)))
    net = made.trained_network()
    losses = [float(r["val_loss"]) for r in rows(tmp_path, "unfolded")]
    assert len(losses) == 5 and min(losses) < 0.9 * losses[0]
    assert bool(rows(tmp_path, "prior")) == made.config.has_prior_stage
    loaded = run.load_network(made.config, made.folder)
    assert validation_loss(loaded, made) == pytest.approx(min(losses), rel=1e-4)
    assert (loaded.tied, loaded.final, loaded.init) == (net.tied, made.config.final, net.init)
    assert len(loaded.proxes) == made.config.folds
    expected = {"glow": flowkern.GlowProx, "resnet": flowkern.ResNetProx, "unet": flowkern.UNetProx}
    assert all(type(prox) is expected[made.config.prox] for prox in loaded.proxes)
    # A step from y towards y goes nowhere, however long it is.
    assert [mu == 0.5 for mu in loaded.mu.tolist()] == [net.init == "adjoint", False][: made.config.folds]


def test_each_fold_learns_weights_of_its_own_from_the_prior_s(pictures, tmp_path):
    run.prepare(tiny(pictures, tmp_path, prior_steps=30, steps=20, prior_lr=5e-3, lr=5e-3)).trained_network()
    losses = [float(r["val_loss"]) for r in rows(tmp_path, "prior")]
    assert losses[-1] < losses[0]
    before = flowkern.Glow.from_pretrained(tmp_path / "checkpoints" / "prior").state_dict()
    after = network(tmp_path).state_dict()
    name = "levels.0.steps.0.coupling.net.weight1"
    folds = [after[f"proxes.{k}.glow.{name}"] for k in range(2)]
    assert not torch.equal(folds[0], before[name]) and not torch.equal(folds[0], folds[1])
    assert after["proxes.0.raw_lam"] != after["proxes.1.raw_lam"]


def test_without_pre_training_the_flow_is_initialised_and_no_more(pictures, tmp_path):
    made = run.prepare(tiny(pictures, tmp_path, pretrain=False, prior_steps=5))
    glow = made.trained_prior()
    assert glow.is_initialized and not made.folder.metrics.exists()
    x = torch.stack([made.data.train[i]["prior"] for i in range(made.config.batch)])
    fresh = run.prepare(tiny(pictures, tmp_path / "other", pretrain=False)).prior
    fresh.initialize(x)
    assert all(torch.equal(a, b) for a, b in zip(glow.state_dict().values(), fresh.state_dict().values(), strict=True))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_are_clipped_to_their_norm(clip, pictures, tmp_path, monkeypatch):
    norms = []

    def step(self, closure=None):
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return loss

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    made = run.prepare(tiny(pictures, tmp_path, prox="resnet", references=["tv"], steps=2, clip=clip))
    made.trained_network()
    assert len(norms) == 2 and all(n > 1e-2 if clip is None else n == pytest.approx(clip, rel=1e-3) for n in norms)


def test_how_a_flow_runs_is_what_the_settings_say(pictures, tmp_path):
    given = {"anchor_every": 1, "memory": "recompute", "backend": "reference", "compute_dtype": "bfloat16"}
    made = run.prepare(tiny(pictures, tmp_path, steps=1, prior_steps=1, **given))
    for glow in (made.prior, made.trained_network().proxes[1].glow):
        assert (glow.anchor_every, glow.memory, glow.backend, glow.compute_dtype) == (1, *list(given.values())[1:3],
                                                                                      torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("prox", ["glow", "resnet"])
@pytest.mark.parametrize("step", ["in an epoch", "before validation"])
def test_divergence_is_recognised_wherever_it_shows_first(prox, step, pictures, tmp_path):
    """Weights that an update has thrown out: no complaint of the flow's about its input, no run that seems to end."""
    steps = {"in an epoch": 3, "before validation": 1}[step]
    made = run.prepare(tiny(pictures, tmp_path, prox=prox, lr=1e30, steps=5, batch=4, epoch_images=4 * steps))
    with pytest.raises(FloatingPointError, match="the unfolded loss became (nan|inf) at step 1: lower the learning"):
        made.trained_network()


@pytest.mark.parametrize("loss", ["mse", "psnr"])
def test_a_finite_error_past_all_hope_ends_the_run(loss, pictures, tmp_path, monkeypatch):
    """Training could go on for hours; images a thousand times too bright are found at the next validation."""
    made = run.prepare(tiny(pictures, tmp_path, prox="resnet", references=["tv"], loss=loss, lr=1e-9, steps=6))
    estimate = stages.UnfoldedStage.estimate
    monkeypatch.setattr(stages.UnfoldedStage, "estimate", lambda *given: (estimate(*given)[0] + 2000,))
    with pytest.raises(FloatingPointError, match=r"loss became (3\.99\d*e\+06|66\.\d+) at step 3: lower the"):
        made.trained_network()


# What is watched


def test_training_warns_when_a_level_drifts_and_names_it(pictures, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(drift, "DRIFT_LIMIT", 0.0)
    run.prepare(tiny(pictures, tmp_path, levels=2, depth=1, final="consistency")).trained_network()
    told = [str(w.message).split(" drifts")[0] for w in recwarn.list if "drifts: inverse(forward(x))" in str(w.message)]
    # The last fold's flow does not run, so it has nothing to drift.
    assert sorted(told) == ["fold 1, level 1", "fold 1, level 2", "level 1", "level 2"]


def test_a_network_without_a_flow_is_not_watched(pictures, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(drift, "DRIFT_LIMIT", 0.0)
    run.prepare(tiny(pictures, tmp_path, prox="resnet", steps=3)).trained_network()
    assert rows(tmp_path) and not [w for w in recwarn.list if "drifts" in str(w.message)]


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


def test_peak_memory_counts_what_was_touched():
    touched = torch.ones(512 * 2**20 // 4)
    peak = callbacks.peak_memory_mib(torch.device("cpu"))
    assert touched.nbytes / 2**20 < peak < 2**20
    del touched
    assert callbacks.peak_memory_mib(torch.device("cpu")) >= peak


def test_batch_norms_statistics_are_measured_anew(pictures, tmp_path):
    """Of the weights of now alone, whatever they were; the momentum is training's again."""
    config = tiny(pictures, tmp_path, prox="resnet", folds=1)
    net = flowkern.Unfolded(flowkern.ResNetProx(3, features=4, blocks=1), folds=1)
    images = data.prepare(config)
    stage = stages.UnfoldedStage(net, config, budget.Budget(None, None), lambda: data.training_loader(images, config))
    found, norms = [], [net.proxes[0].blocks[0].norm1, net.proxes[0].blocks[0].norm2]
    for shift in (0.0, 5.0):
        for norm in norms:
            norm.running_mean += shift
            norm.num_batches_tracked += 100
        stage.eval().on_validation_epoch_start()
        found.append(norms[0].running_mean.clone())
        assert not any(module.training for module in net.modules()) and norms[0].momentum == 0.1
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_seconds_go_on_where_they_were():
    limits, trainer = budget.Budget(None, 100.0), SimpleNamespace(should_stop=False, global_step=6, world_size=1)
    limits.load_state_dict({"steps": 5, "seconds": 90.0})
    limits.on_train_start(trainer, None)
    limits.on_train_batch_end(trainer, None, None, None, 0)
    assert 90 <= limits.used_seconds < 100
