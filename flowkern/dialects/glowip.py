"""CACTuS-AI/GlowIP, the Glow of Wei et al.'s reference [25].

Folded: the first half is transformed (all states of a level have their halves swapped, by permuted 1x1 convolutions),
log-scale and shift are interleaved (scale first), inner ActNorms come with convolution biases. Options: s b + t
(`shift_after`), the half that a split lets pass (`keeps`), a bias on the coupling's scale (`scale_map`, `scale_bias`),
memory-order squeezes. The last level has one step. The repository passes `last_zeros` in the place of that level's
coupling bias, so that with it the scale is sigmoid(raw + 2) + 1 there.

None of that shows in the tensors: it is read from `configs.json` beside the file, or given as options. squeeze_contig:
True for all levels but the last, or "all" for models of the repository's first version, which has no coupling bias
either (pass last_zeros=False with them).
"""

import json

from flowkern.dialects import parts

NAME = "glowip"
SHIFT = 0.5
ALPHA = 32.0  # bound of |log s| where the scale map is not one of flowkern's own


def matches(names) -> bool:
    return "glow_modules.1.coupling.net.conv1.weight" in names


def convert(file, last_zeros=None, coupling_bias=None, squeeze_contig=None) -> tuple[dict, dict]:
    beside = _configuration(file)
    last_zeros = beside.get("last_zeros", True) if last_zeros is None else last_zeros
    bias = beside.get("coupling_bias", 0.0) if coupling_bias is None else coupling_bias
    contiguous = beside.get("squeeze_contig", False) if squeeze_contig is None else squeeze_contig
    hidden, in_channels = file.shape("glow_modules.1.coupling.net.conv1.weight")[:2]
    affine = file.shape("glow_modules.1.coupling.net.conv3.weight")[0] == 2 * in_channels
    modules = sorted({int(name.split(".")[1]) for name in file.names if name.startswith("glow_modules.")})
    channels, level, depth, state = 2 * in_channels, 0, [0], {}
    for before, module in zip([0, *modules], modules, strict=False):
        if module > before + 1:  # a split and a squeeze, which have no tensors, lie between
            level, channels = level + 1, channels * 2
            depth.append(0)
        ours = f"levels.{level}.steps.{depth[level]}"
        state |= _step(file, f"glow_modules.{module}", ours, channels, hidden, affine)
        depth[level] += 1
    levels = len(depth)
    kinds = {"all": [True] * levels}.get(contiguous, [bool(contiguous)] * (levels - 1) + [False])
    variant = {"keeps": "second", "squeeze": ["contiguous" if kind else "pixels" for kind in kinds]}
    biases = [float(bias)] * (levels - 1) + [float(last_zeros)]
    scaled = affine and any(biases)
    if affine:
        variant |= {"shift_after": True}
    if scaled:
        variant |= {"scale_map": "sigmoid", "scale_bias": biases}
    arguments = {
        "size": (in_channels // 2, beside.get("size")),
        "levels": levels,
        "depth": depth,
        "hidden": hidden,
        "coupling": "affine" if affine else "additive",
        "scale": "softclamp" if scaled else "sigmoid",
        "alpha": ALPHA if scaled else 1.0,
        "variant": variant,
    }
    return arguments, state


def _configuration(file) -> dict:
    path = file.path and file.path.parent / "configs.json"
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        return file.reject(f"the configuration beside it, {path}, is not a JSON object: {error}")


def _step(file, theirs: str, ours: str, c: int, hidden: int, affine: bool) -> dict:
    log_scale, bias = _actnorm(file, f"{theirs}.actnorm", c)
    weight = file.take(f"{theirs}.invconv.W", c, c, 1, 1)[:, :, 0, 0]
    if not ours.endswith("steps.0"):  # into a level the halves come as they are, within it swapped
        log_scale, bias = parts.halves_swapped(log_scale), parts.halves_swapped(bias)
        weight = parts.halves_swapped(weight, dim=1)
    state = parts.actnorm(f"{ours}.actnorm", log_scale, bias)
    state |= parts.conv1x1(f"{ours}.conv", parts.halves_swapped(weight), file)
    net, out = f"{theirs}.coupling.net", c if affine else c // 2
    convolutions = []
    for n, shape in (("1", (hidden, c // 2, 3, 3)), ("2", (hidden, hidden, 1, 1))):
        inner_scale, inner_bias = _actnorm(file, f"{net}.actnorm{n}", hidden)
        inner_bias = inner_bias + file.take(f"{net}.conv{n}.bias", hidden)
        convolutions.append((file.take(f"{net}.conv{n}.weight", *shape), inner_scale, inner_bias))
    last = (
        file.take(f"{net}.conv3.weight", out, hidden, 3, 3),
        file.take(f"{net}.conv3.bias", out),
        file.take(f"{net}.logs", out, 1, 1),
    )
    last = [parts.deinterleaved(t, 0) for t in last] if affine else last
    return state | parts.network(f"{ours}.coupling.net", *convolutions, last)


def _actnorm(file, name: str, c: int):
    return tuple(file.take(f"{name}.{n}", 1, c, 1, 1).flatten() for n in ("logs", "b"))
