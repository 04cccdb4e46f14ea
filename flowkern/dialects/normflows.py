"""normflows: a `MultiscaleFlow` of `GlowBlock`s, `Squeeze`s and `Merge`s.

Its `forward` goes from latent to image, and its first level is the deepest. Folded: that order; ActNorm's and the
shift's signs; shift and raw scale interleaved (shift first); biases or inner ActNorms of the network;
`split_mode="channel_inv"`, by swapped halves. Options: scale maps other than the sigmoid, LeakyReLUs, the bases' means
and scales, which normflows has at every level, per pixel or per channel, and per class, which becomes the context.
Neither the scale map nor the slope shows in the tensors: pass them as given to `GlowBlock`.
"""

import torch

from flowkern.dialects import parts

NAME = "normflows"
SHIFT = 0.0
ALPHA = 32.0  # bound of |log s| where the scale map is not one of flowkern's own
SCALE_MAPS = ("sigmoid", "exp", "sigmoid_inv")


def matches(names) -> bool:
    return "flows.0.0.flows.0.flows.1.param_map.net.0.weight" in names


def convert(file, scale_map="sigmoid", leaky=0.0, split_mode="channel") -> tuple[dict, dict]:
    if scale_map not in SCALE_MAPS:
        file.reject(f"unknown scale_map {scale_map!r}; choose one of {', '.join(map(repr, SCALE_MAPS))}")
    if split_mode not in ("channel", "channel_inv"):
        file.reject(f"split_mode {split_mode!r} has no counterpart; only 'channel' and 'channel_inv' have")
    swapped = split_mode == "channel_inv"
    levels = file.count(lambda i: f"flows.{i}.")
    depth = [file.count(lambda k, i=i: f"flows.{levels - 1 - i}.{k}.flows.0.") for i in range(levels)]
    net = f"flows.{levels - 1}.0.flows.0.flows.1.param_map.net"
    hidden, in_channels = file.shape(f"{net}.0.weight")[:2]
    inner = f"{net}.1.actNorm.s" in file
    out = file.shape(f"{net}.{6 if inner else 4}.weight")[0]
    if out not in (in_channels, 2 * in_channels):
        file.reject(f"its networks map {in_channels} channels to {out}; checkerboard splits have no counterpart")
    affine = out == 2 * in_channels
    channels, state, maps, classes = 2 * in_channels, {}, [], 0
    for i in range(levels):
        for k in range(depth[i]):
            theirs, ours = f"flows.{levels - 1 - i}.{depth[i] - 1 - k}.flows", f"levels.{i}.steps.{k}"
            state |= _step(file, theirs, ours, channels, hidden, affine, inner, scale_map, swapped)
        last = i == levels - 1
        emitted = channels if last else channels // 2
        base, classes = _base(file, f"q0.{levels - 1 - i}", emitted, classes)
        if last and swapped:  # the last state stays as the couplings see it
            base = {name: _swapped_moments(t, name == "classes") for name, t in base.items()}
        state |= {f"{'top' if last else f'levels.{i}.split'}.{name}": t for name, t in base.items()}
        maps.append(tuple(base["map"].shape[1:]))
        channels *= 2
    per_pixel = maps[0] != (1, 1)
    size = (maps[0][0] * 2, maps[0][1] * 2) if per_pixel else None
    variant = {"prior_map": "pixels" if per_pixel else "channels", "leaky": float(leaky)}
    scaled = affine and scale_map != "sigmoid"
    if swapped:
        variant["keeps"] = "second"
    if scaled:
        variant["scale_map"] = {"exp": "exp", "sigmoid_inv": "inverse_sigmoid"}[scale_map]
    arguments = {
        "size": (in_channels // 2, size),
        "levels": levels,
        "depth": depth,
        "hidden": hidden,
        "coupling": "affine" if affine else "additive",
        "scale": "softclamp" if scaled else "sigmoid",
        "alpha": ALPHA if scaled else 1.0,
    }
    if classes:
        arguments["context_channels"] = classes
        variant |= {"network_context": False, "prior_context": "all"}
    return arguments | {"variant": variant}, state


def _step(file, theirs, ours, c, hidden, affine, inner, scale_map, swapped) -> dict:
    scale, shift = (file.take(f"{theirs}.2.{name}", 1, c, 1, 1).flatten() for name in ("s", "t"))
    done = f"{theirs}.2.data_dep_init_done"
    if f"{theirs}.1.W" in file:
        weight = file.take(f"{theirs}.1.W", c, c)
    else:
        file.ignore(f"{theirs}.1.eye")
        p, lower, upper = (file.take(f"{theirs}.1.{name}", c, c) for name in ("P", "L", "U"))
        log_s, sign = (file.take(f"{theirs}.1.{name}", c) for name in ("log_S", "sign_S"))
        factors = p, lower, upper, log_s, sign
        eye = torch.eye(c, dtype=torch.float64)
        weight = p @ (lower.tril(-1) + eye) @ (upper.triu(1) + torch.diag(sign * log_s.exp()))
    if swapped:
        weight = parts.halves_swapped(weight)
        if not ours.endswith("steps.0"):
            weight = parts.halves_swapped(weight, dim=1)
            scale, shift = parts.halves_swapped(scale), parts.halves_swapped(shift)
    state = parts.actnorm(f"{ours}.actnorm", -scale, -shift, done not in file or bool(file.take(done)))
    if swapped or f"{theirs}.1.W" in file:
        state |= parts.conv1x1(f"{ours}.conv", weight, file)
    else:
        state |= parts.conv1x1_factors(f"{ours}.conv", *factors)
    return state | _network(
        file, f"{theirs}.0.flows.1.param_map.net", f"{ours}.coupling.net", c, hidden, affine, inner, scale_map
    )


def _network(file, net, ours, c, hidden, affine, inner, scale_map) -> dict:
    convolutions = []
    for n, shape in ((0, (hidden, c // 2, 3, 3)), (1, (hidden, hidden, 1, 1))):
        at = (3 if inner else 2) * n
        weight = file.take(f"{net}.{at}.weight", *shape)
        if inner:
            log_scale, shift = (file.take(f"{net}.{at + 1}.actNorm.{p}", 1, hidden, 1, 1) for p in ("s", "t"))
            file.ignore(f"{net}.{at + 1}.actNorm.data_dep_init_done")
            convolutions.append((weight, log_scale, shift * torch.exp(-log_scale)))
        else:
            convolutions.append((weight, torch.zeros(hidden), file.take(f"{net}.{at}.bias", hidden)))
    at, out = 6 if inner else 4, c if affine else c // 2
    weight, bias = file.take(f"{net}.{at}.weight", out, hidden, 3, 3), file.take(f"{net}.{at}.bias", out)
    if affine:
        # Ours is (x + t) s, theirs (x - shift) s, or with an exponential map (x - shift) exp(-raw).
        sign = torch.ones(out, dtype=torch.float64)
        sign[c // 2 :] = -1
        sign[: c // 2] = -1 if scale_map == "exp" else 1
        weight, bias = parts.deinterleaved(weight, 1) * sign[:, None, None, None], parts.deinterleaved(bias, 1) * sign
    else:
        weight, bias = -weight, -bias
    return parts.network(ours, *convolutions, (weight, bias, torch.zeros(out)))


def _base(file, name: str, c: int, classes: int) -> tuple[dict, int]:
    """Mean and log standard deviation of a base: constants (2C, h, w) and, per class, (classes, 2C, h, w)."""
    if f"{name}.transform.s" in file:  # AffineGaussian
        shape = file.shape(f"{name}.transform.s")
        shift, scale = (file.take(f"{name}.transform.{p}", *shape) for p in ("t", "s"))
        state = {"map": _map(shift[0], scale[0], c)}
        if f"{name}.transform.s_cc" in file:
            classes = file.shape(f"{name}.transform.s_cc")[0]
            per_class = [file.take(f"{name}.transform.{p}_cc", classes, shift[0].numel()) for p in ("t", "s")]
            state["classes"] = torch.stack(
                [_map(*(t[k].view(shift[0].shape) for t in per_class), c) for k in range(classes)]
            )
        return state, classes
    shape = file.shape(f"{name}.loc")
    loc, log_scale = (file.take(f"{name}.{p}", *shape) for p in ("loc", "log_scale"))
    if f"{name}.loc_logs" in file:  # GlowBase
        loc, log_scale = (
            t * torch.exp(3 * file.take(f"{name}.{p}_logs", *shape))
            for p, t in (("loc", loc), ("log_scale", log_scale))
        )
        state = {"map": _map(loc[0], log_scale[0], c)}
        if f"{name}.loc_cc" in file:
            classes = file.shape(f"{name}.loc_cc")[0]
            per_class = [file.take(f"{name}.{p}_cc", classes, c) for p in ("loc", "log_scale")]
            state["classes"] = torch.cat(per_class, dim=1)[:, :, None, None]
        return state, classes
    if shape[0] == c:  # ClassCondDiagGaussian
        classes = shape[-1]
        moments = torch.cat([loc, log_scale]).permute(3, 0, 1, 2)
        return {"map": torch.zeros_like(moments[0]), "classes": moments}, classes
    return {"map": _map(loc[0], log_scale[0], c)}, classes  # DiagGaussian


def _map(loc, log_scale, c: int):
    return torch.cat([loc.expand(c, *loc.shape[1:]), log_scale.expand(c, *log_scale.shape[1:])])


def _swapped_moments(t, per_class: bool):
    dim = 1 if per_class else 0
    return torch.cat([parts.halves_swapped(half, dim) for half in t.chunk(2, dim=dim)], dim=dim)
