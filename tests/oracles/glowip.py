"""CACTuS-AI/GlowIP: first half transformed as s b + t, a last level of one step, other squeezes, plain splits."""

import torch
import torch.nn.functional as F

from oracles.common import Draw, gaussian, pixels, pixelwise, space_to_depth


def weights(levels, depth, hidden=6, channels=3, affine=True, seed=0):
    draw, w = Draw(seed), {}
    c, module = 4 * channels, 0
    for i in range(levels):
        module += 1  # the squeeze
        for _ in range(depth if i < levels - 1 else 1):
            at, net = f"glow_modules.{module}", f"glow_modules.{module}.coupling.net"
            _actnorm(w, f"{at}.actnorm", draw, c)
            w[f"{at}.invconv.W"] = draw.matrix(c)[:, :, None, None]
            for n, (out, into, size) in (
                ("1", (hidden, c // 2, 3)),
                ("2", (hidden, hidden, 1)),
                ("3", (c if affine else c // 2, hidden, 3)),
            ):
                w[f"{net}.conv{n}.weight"], w[f"{net}.conv{n}.bias"] = (
                    draw.convolution(out, into, size),
                    draw.normal(out, std=0.2),
                )
            _actnorm(w, f"{net}.actnorm1", draw, hidden)
            _actnorm(w, f"{net}.actnorm2", draw, hidden)
            w[f"{net}.logs"] = draw.normal(out, 1, 1, std=0.1)
            module += 1
        module += 1  # the split
        c *= 2
    return w


def _actnorm(w, at, draw, c):
    w[f"{at}.b"], w[f"{at}.logs"] = (draw.normal(1, c, 1, 1, std=std) for std in (0.2, 0.1))


def _norm(w, at, x):
    return (x + w[f"{at}.b"]) * torch.exp(w[f"{at}.logs"])


def log_prob(w, x, depth, bias=0.0, last_bias=0.0, contiguous=()):
    """contiguous: the levels whose squeeze reads the image's memory in order."""
    flows = sorted({int(name.split(".")[1]) for name in w})
    levels = 1 + (len(flows) - 1) // depth
    total = x.new_zeros(len(x))
    for i in range(levels):
        n, c, height, width = x.shape
        x = x.reshape(n, 4 * c, height // 2, width // 2) if i in contiguous else space_to_depth(x)
        last = i == levels - 1
        for flow in flows[-1:] if last else flows[i * depth : (i + 1) * depth]:
            at, net = f"glow_modules.{flow}", f"glow_modules.{flow}.coupling.net"
            x = _norm(w, f"{at}.actnorm", x)
            matrix = w[f"{at}.invconv.W"][:, :, 0, 0]
            x = pixelwise(x, matrix)
            total = total + pixels(x) * (w[f"{at}.actnorm.logs"].sum() + torch.linalg.slogdet(matrix).logabsdet)
            b, a = x.chunk(2, dim=1)
            h = F.conv2d(a, w[f"{net}.conv1.weight"], w[f"{net}.conv1.bias"], padding=1)
            h = F.conv2d(_norm(w, f"{net}.actnorm1", h).relu(), w[f"{net}.conv2.weight"], w[f"{net}.conv2.bias"])
            h = F.conv2d(
                _norm(w, f"{net}.actnorm2", h).relu(), w[f"{net}.conv3.weight"], w[f"{net}.conv3.bias"], padding=1
            )
            h = h * torch.exp(3 * w[f"{net}.logs"])
            if h.shape[1] == x.shape[1]:
                s, t = torch.sigmoid(h[:, 0::2] + 2) + (last_bias if last else bias), h[:, 1::2]
                b, total = s * b + t, total + s.log().flatten(1).sum(dim=1)
            else:
                b = b + h
            x = torch.cat([b, a], dim=1)
        if not last:
            x, emitted = x.chunk(2, dim=1)
            total = total + gaussian(emitted)
    return total + gaussian(x)
