"""How exact recomputation is: a deep Glow trained by likelihood, then the same weights with their scales moved far.

`python -m bench.precision` trains L=4, K=32 on crops of scikit-image's photographs, measures on held-out crops, writes
bench/results/precision.json and docs/precision.svg, and prints the tables of docs/precision.md. Errors are relative
norms against `flowkern.reference` in double precision under plain autograd.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import flowkern
from bench import results
from flowkern import reference
from flowkern.layers import run_steps, squeeze
from train import data, images

SCALES = ("softclamp", "sigmoid")
STRESS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
MODES = {
    "stored": {"memory": "store", "anchor_every": None},
    "recomputed": {"memory": "recompute", "anchor_every": None},
    "anchors every 8": {"memory": "recompute", "anchor_every": 8},
    "anchors every 2": {"memory": "recompute", "anchor_every": 2},
}
ROOT = Path(__file__).resolve().parent.parent


def crops(split: str, size: int, count: int, epoch: int = 0, seed: int = 0) -> Tensor:
    """`count` random crops of a split's photographs, dequantised: (count, 3, size, size) in [0, 1]."""
    if split not in _pictures:
        _pictures.update(vars(images.load("photos", lambda image, split: image)))
    samples = data.TrainingSamples(_pictures[split], size, "mirror", bits=8, prior_noise=0.0, seed=seed)
    return torch.stack([samples[epoch * count + index]["prior"] for index in range(count)])


_pictures: dict = {}


def train(size: int, levels: int, depth: int, hidden: int, scale: str, steps: int, batch: int, rate: float = 1e-3,
          report=lambda step, bits: None) -> flowkern.Glow:
    """A Glow trained by likelihood in recompute mode: Adam, 50 steps of warm-up, gradient norm clipped at 100."""
    torch.manual_seed(0)
    glow = flowkern.Glow((3, size, size), levels=levels, depth=depth, hidden=hidden, scale=scale, shift=0.5)
    glow.initialize(crops("train", size, 4 * batch))
    optimizer = torch.optim.Adam(glow.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50)
        loss = glow.bits_per_dim(crops("train", size, batch, epoch=step + 1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(glow.parameters(), 100)
        optimizer.step()
        report(step, loss.item())
    return glow.eval()


def gradient(log_prob, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Of the mean negative log-likelihood, as one vector in double precision."""
    found = torch.autograd.grad(-log_prob(x).mean(), parameters)
    return torch.cat([g.double().flatten() for g in found])


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, inf where not finite."""
    return _finite((a.double() - b.double()).norm() / b.double().norm())


def _finite(error: Tensor) -> float:
    return error.item() if bool(error.isfinite()) else math.inf


def exact_gradient(glow: flowkern.Glow, x: Tensor) -> Tensor:
    """By the specification in double precision."""
    double = copy.deepcopy(glow).double()

    def log_prob(x):
        z, logdet = reference.glow_forward(double, x)
        return logdet - 0.5 * z.square().sum(dim=1)

    return gradient(log_prob, list(double.parameters()), x.double())


def gradient_errors(glow: flowkern.Glow, x: Tensor, modes=MODES, compute_dtype: torch.dtype | None = None) -> dict:
    """Error of the gradient in each mode."""
    exact, own = exact_gradient(glow, x), copy.deepcopy(glow)
    own.compute_dtype, errors = compute_dtype, {}
    for name, options in modes.items():
        own.memory, own.anchor_every = options["memory"], options["anchor_every"]
        errors[name] = relative(gradient(own.log_prob, list(own.parameters()), x), exact)
    return errors


@torch.no_grad()
def inversion_errors(glow: flowkern.Glow, x: Tensor) -> dict:
    """Largest |inverse(forward(x)) - x| in the image's units: ours and the reference's, in both precisions."""
    single = copy.deepcopy(glow)
    single.check_finite = False     # what overflows has an infinite error
    errors = {}
    for name, model, batch in (("fp32", single, x), ("fp64", copy.deepcopy(single).double(), x.double())):
        ours = model.inverse(model(batch)[0], size=x.shape[2:])
        plain, _ = reference.glow_inverse(model, reference.glow_forward(model, batch)[0])
        errors[name] = {"ours": _finite((ours - batch).abs().max()), "reference": _finite((plain - batch).abs().max())}
    return errors


@torch.no_grad()
def growth(glow: flowkern.Glow, x: Tensor, anchor_every: int | None) -> list[float]:
    """Error of the first level's state after undoing 0, 1, ... steps, relative to the state that was there; an anchor
    puts the exact state back every `anchor_every` steps, as in backward."""
    steps = glow.levels[0].steps
    states = [squeeze(x - glow.shift)]
    for step in steps:
        states.append(run_steps([step], states[-1])[0])
    rebuilt, errors = states[-1], [0.0]
    for k in reversed(range(len(steps))):
        rebuilt, _ = run_steps([steps[k]], rebuilt, reverse=True)
        errors.append(relative(rebuilt, states[k]))
        if anchor_every and k and k % anchor_every == 0:
            rebuilt = states[k]
    return errors


def stressed(glow: flowkern.Glow, factor: float) -> flowkern.Glow:
    """A copy whose coupling networks answer `factor` times as strongly: log-scales and shifts moved away from 0."""
    glow = copy.deepcopy(glow)
    with torch.no_grad():
        for level in glow.levels:
            for step in level.steps:
                step.coupling.net.weight3 *= factor
                step.coupling.net.bias3 *= factor
    return glow


def measure(glow: flowkern.Glow, size: int, batches: int = 4, batch: int = 16) -> dict:
    """Every figure of the report for one trained Glow, on held-out crops."""
    held_out = [crops("test", size, batch, epoch=i) for i in range(batches)]
    x = held_out[0]
    bf16 = {name: MODES[name] for name in ("stored", "recomputed", "anchors every 2")}
    stress = [{"factor": factor, "gradient": gradient_errors(stressed(glow, factor), x),
               "inversion": inversion_errors(stressed(glow, factor), x)["fp32"]["ours"]} for factor in STRESS]
    moved = stressed(glow, STRESS[3])
    return {"bits_per_dim": glow.bits_per_dim(torch.cat(held_out)).mean().item(),
            "gradient": [gradient_errors(glow, b) for b in held_out],
            "gradient_bf16_network": gradient_errors(glow, x, bf16, torch.bfloat16),
            "inversion": [inversion_errors(glow, b) for b in held_out], "stress": stress,
            "growth": {f"{name}, {which}": growth(model, x, every)
                       for name, model in (("trained", glow), (f"stress {STRESS[3]:g}", moved))
                       for which, every in (("no anchors", None), ("anchors every 8", 8))}}


def tables(found: dict) -> str:
    """The figures as Markdown."""
    lines = []
    for scale, figures in found["models"].items():
        lines += [f"\n**{scale}**, {figures['bits_per_dim']:.2f} bits/dim on held-out crops\n",
                  "| batch | stored | recomputed | anchors every 8 | bar: max(2 × stored, 1e-4) | inverse fp32: ours | "
                  "reference | inverse fp64 |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
        for i, (g, inverse) in enumerate(zip(figures["gradient"], figures["inversion"], strict=True)):
            cells = [g["stored"], g["recomputed"], g["anchors every 8"], max(2 * g["stored"], 1e-4),
                     inverse["fp32"]["ours"], inverse["fp32"]["reference"], inverse["fp64"]["ours"]]
            lines.append(f"| {i + 1} | {' | '.join(f'{c:.1e}' for c in cells)} |")
        low = ", ".join(f"{name} {error:.1e}" for name, error in figures["gradient_bf16_network"].items())
        lines += [f"\nGradient with a bf16 network: {low}.\n",
                  "| answers × | stored | recomputed | anchors every 8 | anchors every 2 | inverse fp32 |",
                  "|---|---:|---:|---:|---:|---:|"]
        for row in figures["stress"]:
            cells = [*(row["gradient"][mode] for mode in MODES), row["inversion"]]
            lines.append(f"| {row['factor']:g} | {' | '.join(f'{c:.1e}' for c in cells)} |")
    return "\n".join(lines)


def figure(found: dict, path: Path) -> None:
    """Gradient error over stress, and the growth of the error over the steps undone."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flowkern"
    import matplotlib.pyplot as plt

    shades = dict(zip(MODES, ("0.45", "#c44e00", "#0072b2", "#009e73"), strict=True))
    picture, axes = plt.subplots(len(found["models"]), 2, figsize=(10, 3.5 * len(found["models"])),
                                 squeeze=False, layout="constrained")
    for (scale, figures), (left, right) in zip(found["models"].items(), axes, strict=True):
        for name, colour in shades.items():
            left.semilogy([row["factor"] for row in figures["stress"]],
                          [row["gradient"][name] for row in figures["stress"]], "o-", color=colour, label=name)
        left.set(title=f"{scale}: error of the gradient", xlabel="coupling networks' answers, times the trained ones")
        for name, errors in figures["growth"].items():
            colour = shades["anchors every 8" if "every" in name else "recomputed"]
            style = "-" if "stress" in name else ":"
            right.semilogy(range(1, len(errors)), errors[1:], style, color=colour, label=name)
        right.set(title=f"{scale}: error of the rebuilt state, level 1", xlabel="steps undone")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    picture.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=["softclamp"])
    parser.add_argument("--weights", type=Path, help="folder in which trained Glows are kept, and found again")
    arguments = parser.parse_args()
    recipe = {"size": 32, "levels": 4, "depth": 32, "hidden": 32, "batch": 16, "steps": arguments.steps}
    found: dict = {"recipe": recipe, "models": {}}
    for scale in arguments.scales:
        start, kept = time.perf_counter(), arguments.weights and arguments.weights / scale
        if kept and kept.is_dir():
            glow = flowkern.Glow.from_pretrained(kept).eval()
        else:
            glow = train(**recipe, scale=scale, report=lambda step, bits: step % 50 or print(
                f"{step:>4}  {bits:.3f} bits/dim  {time.perf_counter() - start:.0f} s", flush=True))   # noqa: B023
            if kept:
                glow.save_pretrained(kept)
        found["models"][scale] = measure(glow, recipe["size"])
    results.write("precision", found)
    figure(found, ROOT / "docs" / "precision.svg")
    print(tables(found))


if __name__ == "__main__":
    main()
