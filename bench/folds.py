"""What the unfolded network keeps of each image for backward, by operator, folds and depth of the flow.

    python -m bench.folds

prints the table. Every allocated byte is counted (`bench.memory`) with two batches, and the difference is taken: what
belongs to parameters (gradients, composed channel mixes) is the same in both.
"""

import torch
import torch.nn.functional as F

import flowkern
from bench import memory
from bench.workload import Setup
from flowkern.operators import Blur, Downsample, Identity, Inpainting, RandomProjection, gaussian_kernel

FOLDS = (1, 2, 4, 8)
DEFAULT = {"depth": 4, "hidden": 32, "size": 32}
OPERATORS = {
    "identity": lambda size: Identity(),
    "inpainting": lambda size: Inpainting(torch.rand(1, size, size, generator=torch.Generator().manual_seed(0)) < 0.5),
    "blur": lambda size: Blur(gaussian_kernel(1.5)),
    "blur, reflect": lambda size: Blur(gaussian_kernel(1.5), "reflect"),
    "downsample": lambda size: Downsample(2),
    "projection": lambda size: RandomProjection((3, size, size), 0.25),
}


def held(operator: str, folds: int = 4, consistency: str = "gradient", **options) -> int:
    """Bytes held between forward and backward.

    operator: a name of OPERATORS. options: those of `bench.workload.Setup` and, for "memory", of the Glow. Runs in a
    process started by `bench.memory.measure`.
    """
    mode = options.pop("memory", "recompute")
    setup = Setup(**(DEFAULT | options))
    x, measure = setup.images(), OPERATORS[operator](setup.size)
    glow = setup.glow(memory=mode)
    with torch.no_grad():       # couplings that change nothing: through eight folds of others images would overflow
        for name, p in glow.named_parameters():
            if name.endswith(("weight3", "bias3")):
                p.zero_()
    net = flowkern.Unfolded(flowkern.GlowProx(glow, 0.3), folds, measure, consistency=consistency)
    y = measure.forward(x)

    def loss():
        return F.mse_loss(net(y), x)

    loss().backward()       # libraries keep what they prepare on first use
    net.zero_grad(set_to_none=True)
    with memory.record() as events:
        value = loss()
        events.mark("forward")
        value.backward()
        del value
    return events.held("forward")


def per_image(cases: list[dict]) -> list[float]:
    """What one more image adds to `held` in each case, in images of 32-bit numbers."""
    few, many = 4, 12
    image = 4 * 3 * DEFAULT["size"] ** 2
    return [(held(**case, batch=many) - held(**case, batch=few)) / (many - few) / image for case in cases]


def main() -> None:
    """Print the table."""
    cases = [
        {"operator": name, "folds": folds, "depth": depth, "memory": mode}
        for name in OPERATORS
        for mode, depth in (("recompute", 4), ("recompute", 16), ("store", 4))
        for folds in FOLDS
    ]
    seen = iter(memory.measure(per_image, cases=cases, timeout=900))
    print("Held for backward per image, in images; 32x32, L=3, hidden 32, K folds\n")
    print("| operator | flow | " + " | ".join(f"K = {folds}" for folds in FOLDS) + " |")
    print("|---|---|" + "---:|" * len(FOLDS))
    for name in OPERATORS:
        for flow in ("depth 4", "depth 16", "depth 4, stored"):
            row = [next(seen) for _ in FOLDS]
            print(f"| {name} | {flow} | {' | '.join(f'{found:.1f}' for found in row)} |")


if __name__ == "__main__":
    main()
