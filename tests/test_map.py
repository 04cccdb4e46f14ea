"""MAP over the latent: that it finds the minimum, image by image, and leaves the flow alone."""

import copy
import math
from functools import partial

import pytest
import torch

import flowkern
from flowkern import operators
from flowkern.map import _LBFGS, _Adam, map_estimate
from tests.helpers import kept_bytes, small_glow

GAMMA = 0.05


class Half:
    """Inpainting: the left half of the columns is measured, and nothing else."""

    def forward(self, x):
        return x[..., : x.shape[-1] // 2]

    def adjoint(self, y):
        return torch.cat([y, torch.zeros_like(y)], dim=-1)


class Unlike:
    """A mask of its own for each image of the batch."""

    def __init__(self, mask):
        self.mask = mask

    def forward(self, x):
        return self.mask * x

    adjoint = forward


def smooth(inputs, outputs):
    """A coupling network without kinks: at those of ReLU the gradient of a minimum need not vanish."""
    first, last = torch.nn.Conv2d(inputs, 5, 3, padding=1), torch.nn.Conv2d(5, outputs, 3, padding=1)
    torch.nn.init.normal_(last.weight, std=0.02)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(first, torch.nn.Tanh(), last)


def smooth_glow():
    return small_glow(shift=0.5, moved=0.02, network=smooth)


def noisy_images(n=3, seed=7, dtype=torch.float64):
    return torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(glow, y, z, operator=None, gamma=GAMMA):
    """The docstring's formula, literally."""
    x = glow.inverse(z)
    measured = x if operator is None else operator.forward(x)
    return ((measured - y) ** 2).flatten(1).sum(1) + gamma * (z**2).sum(1)


@pytest.mark.parametrize("operator", [None, Half()])
def test_gradient_vanishes_at_the_solution(operator):
    glow = smooth_glow()
    y = noisy_images() if operator is None else operator.forward(noisy_images())
    lowest = []
    x = map_estimate(glow, y, GAMMA, operator=operator, steps=100, progress=lambda _, o: lowest.append(o))
    z = torch.stack([torch.zeros(3, 128, dtype=y.dtype), glow(x)[0].detach()]).requires_grad_()
    at_start, at_end = (objective(glow, y, part, operator) for part in z)
    torch.testing.assert_close(at_start, lowest[0])
    torch.testing.assert_close(at_end, lowest[-1])
    (gradient,) = torch.autograd.grad((at_start + at_end).sum(), z)
    assert (gradient[1].norm(dim=1) < 1e-6 * gradient[0].norm(dim=1)).all()


OPERATORS = {
    "identity": operators.Identity,
    "mask": lambda: operators.Inpainting(noisy_images(1, seed=9)[0, 0] > 0.5),
    "masks": lambda: operators.Inpainting(noisy_images(seed=9) > 0.5),
    "blur": lambda: operators.Blur(operators.gaussian_kernel(0.8)),
    "reflect": lambda: operators.Blur(operators.gaussian_kernel(0.8), "reflect"),
    "downsample": lambda: operators.Downsample(2),
    "projection": lambda: operators.RandomProjection((2, 8, 8), 0.3),
    "composition": lambda: operators.Compose(operators.Downsample(2), operators.Blur(operators.gaussian_kernel(0.5))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_lowers_its_objective(name):
    glow, operator, lowest = smooth_glow(), OPERATORS[name](), []
    y = operator.forward(noisy_images())
    x = map_estimate(glow, y, 0.01, operator=operator, steps=30, progress=lambda _, o: lowest.append(o))
    assert x.shape == (3, 2, 8, 8) and (lowest[-1] < 0.5 * lowest[0]).all()
    torch.testing.assert_close(objective(glow, y, glow(x)[0], operator, 0.01).detach(), lowest[-1])


def test_closed_form_of_a_linear_flow():
    """Where the coupling networks' last layers are zero the flow is affine, and the problem ridge regression."""
    glow, operator = small_glow(shift=0.5, moved=0), Half()
    y = operator.forward(noisy_images())
    offset = glow.inverse(torch.zeros(1, 128, dtype=y.dtype)).detach()
    j = operator.forward(glow.inverse(torch.eye(128, dtype=y.dtype)).detach() - offset).flatten(1).T
    normal = j.T @ j + GAMMA * torch.eye(128, dtype=y.dtype)
    z = torch.linalg.solve(normal, j.T @ (y - operator.forward(offset)).flatten(1).T).T
    found = map_estimate(glow, y, GAMMA, operator=operator, steps=100)
    torch.testing.assert_close(found, glow.inverse(z).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_objective_falls_from_step_to_step(optimizer):
    seen = []
    map_estimate(
        small_glow(),
        noisy_images(),
        GAMMA,
        optimizer=optimizer,
        steps=40,
        lr=0.05,
        progress=lambda step, lowest: seen.append((step, lowest)),
    )
    assert [step for step, _ in seen] == list(range(1, 41))
    values = torch.stack([lowest for _, lowest in seen])
    assert (values.diff(dim=0) <= 0).all()
    assert (values[:20].diff(dim=0) < 0).float().mean() > 0.8
    assert (values[-1] < 0.8 * values[0]).all()


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("kind", ["identity", "masks"])
def test_an_image_does_not_see_its_batch(optimizer, kind):
    glow, y = small_glow(), noisy_images() * torch.tensor([0.1, 1, 30]).view(3, 1, 1, 1)  # unlike enough to disturb
    mask = (noisy_images(seed=9) > 0.4).double()
    options = {"optimizer": optimizer, "steps": 25}
    if kind == "identity":
        together = map_estimate(glow, y, GAMMA, **options)
        alone = [map_estimate(glow, y[i : i + 1], GAMMA, **options) for i in range(3)]
    else:
        together = map_estimate(glow, mask * y, GAMMA, operator=Unlike(mask), **options)
        alone = [
            map_estimate(glow, (mask * y)[i : i + 1], GAMMA, operator=Unlike(mask[i]), **options) for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-8, atol=1e-8)


def test_optimizers_agree():
    glow, y = smooth_glow(), noisy_images()
    a = map_estimate(glow, y, GAMMA, optimizer="lbfgs", steps=100)
    b = map_estimate(glow, y, GAMMA, optimizer="adam", lr=0.05, steps=500)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (a - y).abs().max() > 0.05  # gamma did something


def test_no_penalty_reproduces_the_measurement_and_a_large_one_the_mode():
    glow, y = smooth_glow(), noisy_images()
    torch.testing.assert_close(map_estimate(glow, y, 0, steps=100), y, rtol=0, atol=1e-4)
    mode = glow.inverse(torch.zeros(3, 128, dtype=y.dtype)).detach()
    torch.testing.assert_close(map_estimate(glow, y, 1e6, steps=20), mode, rtol=0, atol=1e-4)


def test_start():
    glow, y = smooth_glow(), noisy_images()
    torch.testing.assert_close(map_estimate(glow, y, GAMMA, start=y, steps=1), y)
    reached = [map_estimate(glow, y, GAMMA, start=start, steps=100) for start in (None, y)]
    torch.testing.assert_close(*reached, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_overflow_is_a_step_taken_back(optimizer, monkeypatch):
    """Images that leave a ball around the start overflow, as those of an ill-conditioned inverse do."""
    inverse, broken = flowkern.Glow.inverse, []

    def bounded(self, z, *args, **kwargs):
        x = inverse(self, z, *args, **kwargs)
        outside = z.detach().square().sum(1) > 4
        broken.append(outside)
        return x + torch.where(outside, math.inf, 0.0)[:, None, None, None]

    glow, y = small_glow(), noisy_images() * torch.tensor([0.5, 3, 3]).view(3, 1, 1, 1)
    at_zero = objective(glow, y, torch.zeros(3, 128, dtype=y.dtype))
    monkeypatch.setattr(flowkern.Glow, "inverse", bounded)
    lowest = []
    x = map_estimate(glow, y, 1e-3, optimizer=optimizer, lr=0.5, steps=40, progress=lambda _, o: lowest.append(o))
    assert torch.stack(broken).any(0)[1:].all()
    assert x.isfinite().all() and lowest[-1].isfinite().all() and (lowest[-1] < 0.95 * at_zero).all()


def test_lbfgs_forgets_a_history_in_whose_direction_no_step_helps():
    """Two quadratics; then nothing is good for the first, and it alone goes back to steepest descent."""
    curvatures = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    z = torch.ones(2, 4, dtype=torch.float64)
    stepper, good = _LBFGS(z, lr=0.1), torch.tensor([True, True])
    for _ in range(4):
        z = stepper(z, 0.5 * (curvatures * z**2).sum(1), curvatures * z, good)
    for _ in range(11):
        before, direction = stepper.z.clone(), z - stepper.z
        z = stepper(z, 0.5 * (curvatures * z**2).sum(1), curvatures * z, torch.tensor([False, True]))
    gradient = curvatures * before[0]
    along = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(along(z[0] - before[0], -gradient, dim=0).item(), 1.0)
    assert along(direction[0], -gradient, dim=0) < 0.99
    assert stepper.rho[:, 1].any() and not stepper.rho[:, 0].any()


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_flow_is_left_as_it_was(optimizer):
    glow = small_glow().train()
    glow.levels[0].requires_grad_(False)
    glow.levels[1].eval()
    first = next(p for p in glow.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = copy.deepcopy(glow.state_dict())
    flags, modes = [p.requires_grad for p in glow.parameters()], [m.training for m in glow.modules()]
    y = noisy_images().requires_grad_()

    def frozen_meanwhile(step, lowest):
        assert not any(p.requires_grad for p in glow.parameters()) and not any(m.training for m in glow.modules())

    options = {"optimizer": optimizer, "steps": 3, "start": noisy_images(seed=8), "progress": frozen_meanwhile}
    x = map_estimate(glow, y, GAMMA, **options)
    with pytest.raises(RuntimeError, match="stop"):
        map_estimate(glow, y, GAMMA, progress=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not x.requires_grad and y.grad is None
    assert [p.requires_grad for p in glow.parameters()] == flags and [m.training for m in glow.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in glow.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in glow.parameters() if p is not first)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(context):
    glow = small_glow()
    expected = map_estimate(glow, noisy_images(), GAMMA, steps=5)
    with context():
        got = map_estimate(glow, noisy_images(), GAMMA, steps=5)
    assert torch.equal(got, expected)


def test_memory_does_not_grow_with_depth():
    y = noisy_images(37)  # 37 divides no other size here
    kept = {
        (memory, depth): kept_bytes(
            partial(map_estimate, small_glow(depth=depth, memory=memory), y, GAMMA, steps=1), len(y)
        )
        for memory in ("recompute", "store")
        for depth in (2, 8)
    }
    assert kept["recompute", 2] == kept["recompute", 8]
    assert 0 < kept["recompute", 8] <= 8 * y.nbytes
    assert kept["store", 8] > 3 * kept["store", 2] > kept["recompute", 2]


def test_other_sizes_single_precision_and_empty_batches():
    glow = small_glow(dtype=torch.float32)
    y = torch.rand(2, 2, 12, 4)
    x = map_estimate(glow, y, GAMMA, steps=10)
    assert x.shape == y.shape and x.dtype == torch.float32
    for optimizer in ("lbfgs", "adam"):
        assert map_estimate(glow, y[:0], GAMMA, steps=3, optimizer=optimizer).shape == (0, 2, 12, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"glow": flowkern.Glow((2, 8, 8), levels=1, depth=1, hidden=4, context_channels=2)},
            ValueError,
            "map_estimate wants an unconditioned Glow; this one has context_channels",
        ),
        ({"glow": torch.nn.Identity()}, TypeError, "glow must be a flowkern.Glow, got Identity"),
        ({"operator": 3}, TypeError, "operator must have the methods forward and adjoint, got int"),
        ({"operator": Half()}, ValueError, r"expected y of shape \(1, 2, 8, 4\) by its operator, got \(1, 2, 8, 8\)"),
        ({"gamma": -1}, ValueError, "gamma must be a finite number >= 0, got -1"),
        ({"gamma": "x"}, ValueError, "gamma must be a finite number >= 0, got 'x'"),
        ({"gamma": math.inf}, ValueError, "gamma must be a finite number >= 0, got inf"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be one of 'lbfgs', 'adam', got 'sgd'"),
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"steps": True}, ValueError, "steps must be a positive integer, got True"),
        ({"lr": 0}, ValueError, "lr must be a positive number, got 0"),
        ({"progress": 1}, TypeError, "progress must be a function of the step and the objective, got int"),
        ({"y": [1]}, TypeError, "y must be a floating-point tensor, got list"),
        ({"y": torch.zeros(1, 2, 8, 8, dtype=torch.uint8)}, TypeError, "y must be .*, got torch.uint8"),
        ({"y": torch.full((1, 2, 8, 8), math.nan)}, ValueError, "y contains NaN or infinite values"),
        ({"y": torch.zeros(2, 8, 8)}, ValueError, r"expected images of shape \(N, 2, H, W\), got \(2, 8, 8\)"),
        ({"y": torch.zeros(1, 2, 8, 8).double()}, TypeError, "the Glow is torch.float32"),
        ({"start": torch.zeros(1, 2, 4, 4)}, ValueError, r"start must be images of shape \(1, 2, 8, 8\), got"),
        ({"start": 0}, ValueError, r"start must be images of shape \(1, 2, 8, 8\), got int"),
        ({"y": torch.full((1, 2, 8, 8), 1e30)}, ValueError, "the objective is not finite at the start"),
    ],
)
def test_bad_arguments(arguments, error, message):
    wrong = {"glow": small_glow(dtype=torch.float32), "y": torch.zeros(1, 2, 8, 8), "gamma": 0.1} | arguments
    if arguments.get("operator").__class__ is Half:
        wrong["operator"].adjoint = lambda y: y  # not A's: it gives an image whose measurement is not like y
    with pytest.raises(error, match=message) as caught:
        map_estimate(wrong.pop("glow"), wrong.pop("y"), wrong.pop("gamma"), **wrong)
    assert "\n" not in str(caught.value)


def test_a_step_taken_back_is_tried_again_at_half_its_length():
    z, g = torch.zeros(2, 5), torch.randn(2, 5)
    adam, objective = _Adam(z, 0.1), torch.zeros(2)
    first = adam(z, objective, g, torch.tensor([True, True]))
    again = adam(first, objective, g, torch.tensor([False, False]))
    torch.testing.assert_close(again, first / 2)
