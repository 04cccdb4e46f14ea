"""rosinality/glow-pytorch: signed ActNorm scales, plain biases, ones around the last convolution, learned priors."""

import torch
import torch.nn.functional as F

from oracles.common import Draw, gaussian, pixels, pixelwise, space_to_depth


def weights(levels, depth, hidden=6, channels=3, affine=True, lu=True, seed=0):
    draw, w = Draw(seed), {}
    c = 4 * channels
    for i in range(levels):
        for k in range(depth):
            at = f"blocks.{i}.flows.{k}"
            w[f"{at}.actnorm.loc"] = draw.normal(1, c, 1, 1, std=0.3)
            w[f"{at}.actnorm.scale"] = draw.sign(1, c, 1, 1) * torch.exp(draw.normal(1, c, 1, 1, std=0.1, mean=0.05))
            w[f"{at}.actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
            if lu or i == levels - 1:  # the last level ignores conv_lu=False
                # The masked parts of the triangles hold what they hold.
                p, lower, u = torch.linalg.lu(draw.matrix(c))
                w[f"{at}.invconv.w_p"], noise = p, draw.normal(c, c)
                w[f"{at}.invconv.w_l"], w[f"{at}.invconv.w_u"] = lower.tril(-1) + noise.triu(), u.triu(1) + noise.tril()
                w[f"{at}.invconv.w_s"], w[f"{at}.invconv.s_sign"] = u.diagonal().abs().log(), u.diagonal().sign()
                upper = torch.ones(c, c, dtype=torch.float64).triu(1)
                w[f"{at}.invconv.u_mask"], w[f"{at}.invconv.l_mask"] = upper, upper.T.clone()
                w[f"{at}.invconv.l_eye"] = torch.eye(c, dtype=torch.float64)
            else:
                w[f"{at}.invconv.weight"] = draw.matrix(c)[:, :, None, None]
            net = f"{at}.coupling.net"
            w[f"{net}.0.weight"] = draw.convolution(hidden, c // 2, 3)
            w[f"{net}.2.weight"] = draw.convolution(hidden, hidden, 1)
            w[f"{net}.0.bias"], w[f"{net}.2.bias"] = (draw.normal(hidden, std=0.3) for _ in range(2))
            _zero(w, f"{net}.4", draw, c if affine else c // 2, hidden)
        if i < levels - 1:
            _zero(w, f"blocks.{i}.prior", draw, c, c // 2)
        else:
            _zero(w, f"blocks.{i}.prior", draw, 2 * c, c)
        c *= 2
    return w


def _zero(w, at, draw, out, c):
    w[f"{at}.conv.weight"], w[f"{at}.conv.bias"] = draw.convolution(out, c, 3), draw.normal(out, std=0.2)
    w[f"{at}.scale"] = draw.normal(1, out, 1, 1, std=0.1)


def _zero_conv(w, at, x):
    """A convolution that sees ones outside of the image, times exp(3 scale)."""
    outside = F.pad(x, (1, 1, 1, 1), value=1.0)
    return F.conv2d(outside, w[f"{at}.conv.weight"], w[f"{at}.conv.bias"]) * torch.exp(3 * w[f"{at}.scale"])


def log_prob(w, x):
    levels = 1 + max(int(name.split(".")[1]) for name in w)
    total = x.new_zeros(len(x))
    for i in range(levels):
        x = space_to_depth(x)
        k = 0
        while f"blocks.{i}.flows.{k}.actnorm.loc" in w:
            at = f"blocks.{i}.flows.{k}"
            scale = w[f"{at}.actnorm.scale"]
            x = scale * (x + w[f"{at}.actnorm.loc"])
            total = total + pixels(x) * scale.abs().log().sum()
            if f"{at}.invconv.weight" in w:
                matrix = w[f"{at}.invconv.weight"][:, :, 0, 0]
            else:
                lower = w[f"{at}.invconv.w_l"].tril(-1) + torch.eye(x.shape[1], dtype=x.dtype)
                diagonal = torch.diag(w[f"{at}.invconv.s_sign"] * w[f"{at}.invconv.w_s"].exp())
                matrix = w[f"{at}.invconv.w_p"] @ lower @ (w[f"{at}.invconv.w_u"].triu(1) + diagonal)
            x = pixelwise(x, matrix)
            total = total + pixels(x) * torch.linalg.slogdet(matrix).logabsdet
            a, b = x.chunk(2, dim=1)
            net = f"{at}.coupling.net"
            h = F.conv2d(a, w[f"{net}.0.weight"], w[f"{net}.0.bias"], padding=1).relu()
            h = _zero_conv(w, f"{net}.4", F.conv2d(h, w[f"{net}.2.weight"], w[f"{net}.2.bias"]).relu())
            if h.shape[1] == x.shape[1]:
                raw, t = h.chunk(2, dim=1)
                s = torch.sigmoid(raw + 2)
                b, total = (b + t) * s, total + s.log().flatten(1).sum(dim=1)
            else:
                b = b + h
            x = torch.cat([a, b], dim=1)
            k += 1
        if i < levels - 1:
            x, emitted = x.chunk(2, dim=1)
            moments = _zero_conv(w, f"blocks.{i}.prior", x)
        else:
            emitted, moments = x, _zero_conv(w, f"blocks.{i}.prior", torch.zeros_like(x))
        total = total + gaussian(emitted, *moments.chunk(2, dim=1))
    return total
