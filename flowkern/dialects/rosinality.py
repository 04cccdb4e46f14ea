"""rosinality/glow-pytorch.

As in flowkern: second half transformed, (x + t) sigmoid(raw + 2), outputs in chunks (raw, t). Folded: the ActNorm's
scale is signed and not exponentiated (its sign goes into the 1x1 convolution), the network has biases in place of inner
ActNorms. Options: the zero-initialised convolutions pad with ones (`edge`), and every emission, the last one too, has a
learned Gaussian. `conv_lu=False` leaves whole matrices on all levels but the last, which are factored.
"""

import torch

from flowkern.dialects import parts

NAME = "rosinality"
SHIFT = 0.5


def matches(names) -> bool:
    return "blocks.0.flows.0.coupling.net.4.scale" in names


def convert(file) -> tuple[dict, dict]:
    levels = file.count(lambda i: f"blocks.{i}.")
    depth = [file.count(lambda k, i=i: f"blocks.{i}.flows.{k}.") for i in range(levels)]
    hidden, in_channels = file.shape("blocks.0.flows.0.coupling.net.0.weight")[:2]
    affine = file.shape("blocks.0.flows.0.coupling.net.4.scale")[1] == 2 * in_channels
    channels, state = in_channels * 2, {}
    for i in range(levels):
        last = i == levels - 1
        for k in range(depth[i]):
            state |= _step(file, f"blocks.{i}.flows.{k}", f"levels.{i}.steps.{k}", channels, hidden, affine)
        kept, emitted = (channels, channels) if last else (channels // 2, channels // 2)
        weight, bias, logs = _zero_conv(file, f"blocks.{i}.prior", 2 * emitted, kept)
        if last:  # it reads zeros, so that only the ones around them count
            state |= parts.prior("top", bias, logs, edge=weight.sum(dim=1, keepdim=True))
        else:
            state |= parts.prior(f"levels.{i}.split", bias, logs, weight)
        channels *= 2
    arguments = {
        "size": (in_channels // 2, None),
        "levels": levels,
        "depth": depth,
        "hidden": hidden,
        "coupling": "affine" if affine else "additive",
        "scale": "sigmoid",
        "split_prior": "learned",
        "top_prior": "learned",
        "variant": {"edge": "ones"},
    }
    return arguments, state


def _step(file, theirs: str, ours: str, c: int, hidden: int, affine: bool) -> dict:
    scale, loc = (file.take(f"{theirs}.actnorm.{name}", 1, c, 1, 1).flatten() for name in ("scale", "loc"))
    if bool((scale == 0).any()):
        file.reject(f"{theirs}.actnorm.scale has a zero")
    flag = f"{theirs}.actnorm.initialized"
    initialized = flag not in file or bool(file.take(flag))
    state = parts.actnorm(f"{ours}.actnorm", scale.abs().log(), loc, initialized)
    if f"{theirs}.invconv.weight" in file:
        weight = file.take(f"{theirs}.invconv.weight", c, c, 1, 1)[:, :, 0, 0]
        state |= parts.conv1x1(f"{ours}.conv", weight * scale.sign(), file)
    else:
        file.ignore(*(f"{theirs}.invconv.{name}" for name in ("u_mask", "l_mask", "l_eye")))
        p, lower, upper = (file.take(f"{theirs}.invconv.{name}", c, c) for name in ("w_p", "w_l", "w_u"))
        log_s, sign = (file.take(f"{theirs}.invconv.{name}", c) for name in ("w_s", "s_sign"))
        state |= parts.conv1x1_factors(f"{ours}.conv", p, lower, upper * scale.sign(), log_s, sign * scale.sign())
    net = f"{theirs}.coupling.net"
    plain = torch.zeros(hidden)
    first = file.take(f"{net}.0.weight", hidden, c // 2, 3, 3), plain, file.take(f"{net}.0.bias", hidden)
    second = file.take(f"{net}.2.weight", hidden, hidden, 1, 1), plain, file.take(f"{net}.2.bias", hidden)
    return state | parts.network(
        f"{ours}.coupling.net", first, second, _zero_conv(file, f"{net}.4", c if affine else c // 2, hidden)
    )


def _zero_conv(file, name: str, out: int, c: int):
    return (
        file.take(f"{name}.conv.weight", out, c, 3, 3),
        file.take(f"{name}.conv.bias", out),
        file.take(f"{name}.scale", 1, out, 1, 1),
    )
