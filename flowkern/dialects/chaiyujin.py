"""chaiyujin/glow-pytorch.

As in flowkern: second half transformed, (x + t) sigmoid(raw + 2), inner ActNorms. Folded: shift and raw scale are
interleaved (shift first), so are the split's mean and log standard deviation; reversed channels in the place of the 1x1
convolution become its permutation. The learned prior of the last level reads zeros, so only its bias counts; with
`y_condition` it is a linear function of the one-hot class, which becomes the context.
"""

import torch

from flowkern.dialects import parts

NAME = "chaiyujin"
SHIFT = 0.0


def matches(names) -> bool:
    return "flow.layers.1.f.4.logs" in names


def convert(file, permutation=None) -> tuple[dict, dict]:
    hidden, in_channels = file.shape("flow.layers.1.f.0.weight")[:2]
    out = file.shape("flow.layers.1.f.4.weight")[0]
    layers = 1 + max(int(name.split(".")[2]) for name in file.names if name.startswith("flow.layers."))
    splits = [i for i in range(layers) if f"flow.layers.{i}.conv.weight" in file]
    bounds = [0, *(i + 1 for i in splits), layers]
    channels, depth, state = 2 * in_channels, [], {}
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        steps = range(start + 1, stop - 1 if i < len(splits) else stop)
        depth.append(len(steps))
        for k, layer in enumerate(steps):
            theirs, ours = f"flow.layers.{layer}", f"levels.{i}.steps.{k}"
            state |= _step(file, theirs, ours, channels, hidden, out == 2 * in_channels, permutation)
        if i < len(splits):
            prior = _zero_conv(file, f"flow.layers.{stop - 1}.conv", channels, channels // 2)
            weight, bias, logs = (parts.deinterleaved(t, 0) for t in prior)
            state |= parts.prior(f"levels.{i}.split", bias, logs, weight)
            channels *= 2
    top, classes = _top(file, channels)
    size = None
    if "prior_h" in file:
        size = tuple(n << len(depth) for n in file.shape("prior_h")[2:])
        file.ignore("prior_h")
    arguments = {
        "size": (in_channels // 2, size),
        "levels": len(depth),
        "depth": depth,
        "hidden": hidden,
        "coupling": "affine" if out == 2 * in_channels else "additive",
        "scale": "sigmoid",
        "split_prior": "learned",
        "top_prior": "learned" if top else "standard",
    }
    if classes:
        arguments |= {"context_channels": classes, "variant": {"network_context": False, "prior_context": "top"}}
    return arguments, state | top


def _step(file, theirs: str, ours: str, c: int, hidden: int, affine: bool, permutation) -> dict:
    state = parts.actnorm(f"{ours}.actnorm", *_actnorm(file, theirs, c))
    if f"{theirs}.invconv.l" in file:
        file.reject("its 1x1 convolutions are LU-decomposed, and P and the signs are not in the file")
    if any(".invconv." in name for name in file.names):
        weight = file.take(f"{theirs}.invconv.weight", c, c)
    elif permutation == "reverse":
        weight = torch.eye(c, dtype=torch.float64).flip(0)
    else:
        file.reject(
            "it has no 1x1 convolutions; if channels are reversed in their place pass permutation='reverse', shuffled "
            "ones are not in the file"
        )
    state |= parts.conv1x1(f"{ours}.conv", weight, file)
    last = _zero_conv(file, f"{theirs}.f.4", c if affine else c // 2, hidden)
    return state | parts.network(
        f"{ours}.coupling.net",
        (file.take(f"{theirs}.f.0.weight", hidden, c // 2, 3, 3), *_actnorm(file, f"{theirs}.f.0", hidden)),
        (file.take(f"{theirs}.f.2.weight", hidden, hidden, 1, 1), *_actnorm(file, f"{theirs}.f.2", hidden)),
        [parts.deinterleaved(t, 1) for t in last] if affine else last,
    )


def _actnorm(file, name: str, c: int):
    return tuple(file.take(f"{name}.actnorm.{n}", 1, c, 1, 1) for n in ("logs", "bias"))


def _zero_conv(file, name: str, out: int, c: int):
    return (
        file.take(f"{name}.weight", out, c, 3, 3),
        file.take(f"{name}.bias", out),
        file.take(f"{name}.logs", out, 1, 1),
    )


def _top(file, c: int) -> tuple[dict, int]:
    """The last level's Gaussian, and how many classes it depends on."""
    state, classes = {}, 0
    if "learn_top.weight" in file:
        _, bias, logs = _zero_conv(file, "learn_top", 2 * c, 2 * c)
        state = parts.prior("top", bias, logs)
    if "project_ycond.weight" in file:
        classes = file.shape("project_ycond.weight")[1]
        e = torch.exp(3 * file.take("project_ycond.logs", 2 * c))
        weight, bias = file.take("project_ycond.weight", 2 * c, classes), file.take("project_ycond.bias", 2 * c)
        if not state:
            state = parts.prior("top", torch.zeros(2 * c, dtype=torch.float64), torch.zeros(2 * c, dtype=torch.float64))
        state["top.bias"] = state["top.bias"] + bias * e * torch.exp(-3 * state["top.logs"])
        state["top.classes"] = (weight * e[:, None]).T[:, :, None, None]
        file.ignore(*(f"project_class.{name}" for name in ("weight", "bias", "logs")))
    return state, classes
