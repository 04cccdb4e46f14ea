"""What the unfolded network keeps of each image for backward, by operator, folds and depth of the flow, and what a
training step peaks at and takes.

    python -m bench.folds

prints the tables. Every allocated byte is counted (`bench.memory`), at the peak also the scratch memory that our
threads keep. For the first table with two batches, and the difference is taken: what belongs to parameters (gradients,
composed channel mixes) is the same in both.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

import flowkern
from bench import memory
from bench.timing import interleave
from bench.workload import Setup
from flowkern import cpp
from flowkern.operators import Blur, Downsample, Identity, Inpainting, RandomProjection, gaussian_kernel

FOLDS = (1, 2, 4, 8)
DEFAULT = {"depth": 4, "hidden": 32, "size": 32}
REALISTIC = {"depth": 4, "hidden": 128, "size": 64, "batch": 8}
OPERATORS = {
    "identity": lambda size: Identity(),
    "inpainting": lambda size: Inpainting(torch.rand(1, size, size, generator=torch.Generator().manual_seed(0)) < 0.5),
    "blur": lambda size: Blur(gaussian_kernel(1.5)),
    "blur, reflect": lambda size: Blur(gaussian_kernel(1.5), "reflect"),
    "downsample": lambda size: Downsample(2),
    "projection": lambda size: RandomProjection((3, size, size), 0.25),
}
MISSING = [("blur, reflect", "depth 4, exact")]     # it has no exact solution


def network(operator: str, folds: int = 4, prox: str = "glow", **options) -> tuple[flowkern.Unfolded, Callable]:
    """A network and what computes its loss.

    operator: a name of OPERATORS. prox: "glow", or "resnet", of as many maps as the Glow's coupling networks have.
    options: consistency, tied and kept_images are the network's, memory the Glow's, others `bench.workload.Setup`'s.
    """
    chosen = {name: options.pop(name) for name in ("consistency", "tied", "kept_images") if name in options}
    mode = options.pop("memory", "recompute")
    setup = Setup(**(DEFAULT | options))
    x, measure = setup.images(), OPERATORS[operator](setup.size)
    if prox == "glow":
        glow = setup.glow(memory=mode)
        with torch.no_grad():       # couplings that change nothing: through eight folds of others images would overflow
            for name, p in glow.named_parameters():
                if name.endswith(("weight3", "bias3")):
                    p.zero_()
        made = flowkern.GlowProx(glow, 0.3)
    else:
        made = flowkern.ResNetProx(3, setup.hidden)
    net, y = flowkern.Unfolded(made, folds, measure, **chosen), measure.forward(x)
    return net, lambda: F.mse_loss(net(y), x)


def step(**case) -> tuple[int, int]:
    """Bytes held between forward and backward, and those of the peak beside the parameters' gradients and their
    tensors, of a case of `network`. Runs in a process started by `bench.memory.measure`.
    """
    net, loss = network(**case)
    for _ in range(2):      # libraries keep what they prepare on first use
        loss().backward()
        net.zero_grad(set_to_none=True)
    cpp.kept_scratch(afresh=True)
    with memory.record() as events:
        value = loss()
        events.mark("forward")
        value.backward()
        del value
    return events.held("forward"), events.peak(without=events.alive()) + cpp.kept_scratch()


def per_image(cases: list[dict]) -> list[float]:
    """What one more image adds to what is held in each case, in images of 32-bit numbers."""
    few, many = 2, 8
    image = 4 * 3 * DEFAULT["size"] ** 2
    return [(step(**case, batch=many)[0] - step(**case, batch=few)[0]) / (many - few) / image for case in cases]


def peaks(cases: list[dict]) -> list[float]:
    """MiB at the peak of a training step in each case."""
    return [step(**(REALISTIC | case))[1] / 2**20 for case in cases]


def seconds(cases: list[dict]) -> list[float]:
    """Of a training step in each case: medians of seven rounds, in which cases take turns."""
    losses = [network(**(REALISTIC | case))[1] for case in cases]
    for loss in losses:
        loss().backward()
    found = interleave({str(i): lambda loss=loss: loss().backward() for i, loss in enumerate(losses)}, 7)
    return [statistics.median(found[str(i)]) for i in range(len(cases))]


def main() -> None:
    """Print the tables."""
    flows = {
        "depth 4": {"depth": 4},
        "depth 16": {"depth": 16},
        "depth 4, exact": {"depth": 4, "consistency": "exact"},
        "depth 4, stored": {"depth": 4, "memory": "store"},
        "depth 4, one image kept": {"depth": 4, "kept_images": 1},
    }
    rows = {(name, flow): {"operator": name} | flows[flow] for name in OPERATORS for flow in flows}
    rows = {row: case for row, case in rows.items() if row not in MISSING}
    print("Held for backward per image, in images; 32x32, L=3, hidden 32, K folds\n")
    _table(per_image, rows)
    kept = {"all images kept": {}, "one image kept": {"kept_images": 1}}
    rows = {(name, how): {"operator": name} | kept[how] for name in OPERATORS for how in kept}
    more = {"tied": {"tied": True}, "32 images": {"batch": 32}, "ResNet, 128 maps": {"prox": "resnet"}}
    rows |= {("blur", f"{what}, {how}"): {"operator": "blur"} | more[what] | kept[how] for what in more for how in kept}
    print("\nPeak of a training step beside parameters' gradients, MiB; 8 images of 64x64, L=3, depth 4, hidden 128\n")
    _table(peaks, rows)
    kept["two images kept"] = {"kept_images": 2}
    print("\nSeconds of a training step of the same\n")
    _table(seconds, {("blur", how): {"operator": "blur"} | kept[how] for how in kept}, ".2f")


def _table(function, rows: dict[tuple[str, str], dict], digits: str = ".1f") -> None:
    cases = [case | {"folds": folds} for case in rows.values() for folds in FOLDS]
    seen = iter(memory.measure(function, cases=cases, timeout=1800))
    print("| operator | flow | " + " | ".join(f"K = {folds}" for folds in FOLDS) + " |")
    print("|---|---|" + "---:|" * len(FOLDS))
    for row in rows:
        print(f"| {' | '.join(row)} | " + " | ".join(f"{next(seen):{digits}}" for _ in FOLDS) + " |", flush=True)


if __name__ == "__main__":
    main()
