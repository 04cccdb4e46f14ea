"""chaiyujin/glow-pytorch: interleaved outputs, inner ActNorms, one list of layers, a class-conditional top."""

import torch
import torch.nn.functional as F

from oracles.common import Draw, gaussian, pixels, pixelwise, space_to_depth


def weights(
    levels, depth, hidden=6, channels=3, affine=True, learn_top=True, classes=0, invconv=True, size=None, seed=0
):
    draw, w = Draw(seed), {}
    c, layer = 4 * channels, 0
    for i in range(levels):
        layer += 1  # the squeeze
        for _ in range(depth):
            at = f"flow.layers.{layer}"
            _actnorm(w, at, draw, c)
            if invconv:
                w[f"{at}.invconv.weight"] = draw.matrix(c)
            w[f"{at}.f.0.weight"], w[f"{at}.f.2.weight"] = (
                draw.convolution(hidden, c // 2, 3),
                draw.convolution(hidden, hidden, 1),
            )
            _actnorm(w, f"{at}.f.0", draw, hidden)
            _actnorm(w, f"{at}.f.2", draw, hidden)
            _zero(w, f"{at}.f.4", draw, c if affine else c // 2, hidden)
            layer += 1
        if i < levels - 1:
            _zero(w, f"flow.layers.{layer}.conv", draw, c, c // 2)
            layer += 1
            c *= 2
    if learn_top:
        _zero(w, "learn_top", draw, 2 * c, 2 * c)
    if classes:
        w["project_ycond.weight"], w["project_ycond.bias"] = (
            draw.normal(2 * c, classes, std=0.3),
            draw.normal(2 * c, std=0.2),
        )
        w["project_ycond.logs"] = draw.normal(2 * c, std=0.1)
        w["project_class.weight"], w["project_class.bias"] = draw.normal(classes, c), draw.normal(classes)
        w["project_class.logs"] = draw.normal(classes)
    if size:
        w["prior_h"] = torch.zeros(4, 2 * c, size >> levels, size >> levels, dtype=torch.float64)
    return w


def _actnorm(w, at, draw, c):
    w[f"{at}.actnorm.bias"], w[f"{at}.actnorm.logs"] = (draw.normal(1, c, 1, 1, std=std) for std in (0.2, 0.1))


def _zero(w, at, draw, out, c):
    w[f"{at}.weight"], w[f"{at}.bias"] = draw.convolution(out, c, 3), draw.normal(out, std=0.2)
    w[f"{at}.logs"] = draw.normal(out, 1, 1, std=0.1)


def _norm(w, at, x):
    return (x + w[f"{at}.actnorm.bias"]) * torch.exp(w[f"{at}.actnorm.logs"])


def _zero_conv(w, at, x):
    return F.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"], padding=1) * torch.exp(3 * w[f"{at}.logs"])


def log_prob(w, x, one_hot=None):
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("flow."))
    total = x.new_zeros(len(x))
    for layer in range(layers):
        at = f"flow.layers.{layer}"
        if f"{at}.actnorm.bias" in w:
            x = _norm(w, at, x)
            total = total + pixels(x) * w[f"{at}.actnorm.logs"].sum()
            if f"{at}.invconv.weight" in w:
                x = pixelwise(x, w[f"{at}.invconv.weight"])
                total = total + pixels(x) * torch.linalg.slogdet(w[f"{at}.invconv.weight"]).logabsdet
            else:
                x = x.flip(1)
            a, b = x.chunk(2, dim=1)
            h = _norm(w, f"{at}.f.0", F.conv2d(a, w[f"{at}.f.0.weight"], padding=1)).relu()
            h = _norm(w, f"{at}.f.2", F.conv2d(h, w[f"{at}.f.2.weight"])).relu()
            h = _zero_conv(w, f"{at}.f.4", h)
            if h.shape[1] == x.shape[1]:
                t, s = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
                b, total = (b + t) * s, total + s.log().flatten(1).sum(dim=1)
            else:
                b = b + h
            x = torch.cat([a, b], dim=1)
        elif f"{at}.conv.weight" in w:
            x, emitted = x.chunk(2, dim=1)
            h = _zero_conv(w, f"{at}.conv", x)
            total = total + gaussian(emitted, h[:, 0::2], h[:, 1::2])
        else:
            x = space_to_depth(x)
    h = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
    if "learn_top.weight" in w:
        h = _zero_conv(w, "learn_top", h)
    if one_hot is not None:
        linear = one_hot @ w["project_ycond.weight"].T + w["project_ycond.bias"]
        h = h + (linear * torch.exp(3 * w["project_ycond.logs"]))[:, :, None, None]
    return total + gaussian(x, *h.chunk(2, dim=1))
