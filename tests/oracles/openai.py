"""openai/glow: TensorFlow's layouts, an edge channel in the 3x3 convolutions, log-scales divided by 3."""

import torch
import torch.nn.functional as F

from oracles.common import Draw, gaussian, pixels, pixelwise, space_to_depth


def weights(
    levels,
    depth,
    hidden=6,
    channels=3,
    affine=True,
    learn_top=True,
    classes=0,
    edge=True,
    permutation="invconv",
    seed=0,
):
    draw, w = Draw(seed), {}
    c = 4 * channels
    for i in range(levels):
        for k in range(depth):
            at = f"model/{i}/{k}"
            _actnorm(w, f"{at}/actnorm", draw, c)
            if permutation == "invconv":
                w[f"{at}/invconv/W"] = draw.matrix(c)
            elif permutation == "shuffle":
                indices = draw.permutation(c).int()
                w[f"{at}/shuffle/indices"], w[f"{at}/shuffle/indices_inverse"] = indices, indices.argsort().int()
            w[f"{at}/f1/l_1/W"] = _kernel(draw, 3, c // 2 + edge, hidden)
            w[f"{at}/f1/l_2/W"] = _kernel(draw, 1, hidden, hidden)
            _actnorm(w, f"{at}/f1/l_1/actnorm", draw, hidden)
            _actnorm(w, f"{at}/f1/l_2/actnorm", draw, hidden)
            _zero(w, f"{at}/f1/l_last", draw, c if affine else c // 2, hidden + edge)
        if i < levels - 1:
            _zero(w, f"model/pool{i}/conv", draw, c, c // 2 + edge)
            c *= 2
    if learn_top:
        _zero(w, "model/prior/p", draw, 2 * c, 2 * c + edge)
    if classes:
        w["model/prior/y_emb/W"], w["model/prior/y_emb/b"] = (
            draw.normal(classes, 2 * c, std=0.3),
            draw.normal(1, 2 * c, std=0.2),
        )
        w["model/prior/y_emb/logs"] = draw.normal(1, 2 * c, std=0.1)
        w["model/classifier/W"], w["model/classifier/b"] = draw.normal(c, classes), draw.normal(1, classes)
        w["model/classifier/logs"] = draw.normal(1, classes)
    w["global_step"] = torch.tensor(1000)
    return w


def _kernel(draw, size, c, out):
    return draw.convolution(out, c, size).permute(2, 3, 1, 0).contiguous()


def _actnorm(w, at, draw, c):
    w[f"{at}_center/b"], w[f"{at}_scale/logs"] = draw.normal(1, 1, 1, c, std=0.2), draw.normal(1, 1, 1, c, std=0.03)


def _zero(w, at, draw, out, c):
    w[f"{at}/W"], w[f"{at}/b"] = _kernel(draw, 3, c, out), draw.normal(1, 1, 1, out, std=0.2)
    w[f"{at}/logs"] = draw.normal(1, out, std=0.1)


def _channels(t):
    return t.reshape(1, -1, 1, 1)


def _norm(w, at, x):
    return (x + _channels(w[f"{at}_center/b"])) * torch.exp(3 * _channels(w[f"{at}_scale/logs"]))


def _conv(w, at, x):
    """Without padding of its own: a 3x3 kernel sees zeros around the image and, if it has one channel more, an
    indicator of them.
    """
    kernel = w[f"{at}/W"].permute(3, 2, 0, 1)
    if kernel.shape[2] == 3:
        edge = kernel.shape[1] - x.shape[1]
        indicator = F.pad(torch.zeros_like(x[:, :1]), (1, 1, 1, 1), value=1.0)
        x = F.pad(x, (1, 1, 1, 1))
        x = torch.cat([x, indicator], dim=1) if edge else x
    return F.conv2d(x, kernel)


def _zero_conv(w, at, x):
    return (_conv(w, at, x) + _channels(w[f"{at}/b"])) * torch.exp(3 * _channels(w[f"{at}/logs"]))


def log_prob(w, x, one_hot=None):
    levels = 1 + max(int(name.split("/")[1]) for name in w if name.endswith("l_1/W"))
    total = x.new_zeros(len(x))
    for i in range(levels):
        x = space_to_depth(x)
        k = 0
        while f"model/{i}/{k}/f1/l_1/W" in w:
            at = f"model/{i}/{k}"
            x = _norm(w, f"{at}/actnorm", x)
            total = total + 3 * pixels(x) * w[f"{at}/actnorm_scale/logs"].sum()
            if f"{at}/invconv/W" in w:
                x = pixelwise(x, w[f"{at}/invconv/W"].T)
                total = total + pixels(x) * torch.linalg.slogdet(w[f"{at}/invconv/W"]).logabsdet
            elif f"{at}/shuffle/indices" in w:
                x = x[:, w[f"{at}/shuffle/indices"].long()]
            else:
                x = x.flip(1)
            a, b = x.chunk(2, dim=1)
            h = _norm(w, f"{at}/f1/l_1/actnorm", _conv(w, f"{at}/f1/l_1", a)).relu()
            h = _norm(w, f"{at}/f1/l_2/actnorm", _conv(w, f"{at}/f1/l_2", h)).relu()
            h = _zero_conv(w, f"{at}/f1/l_last", h)
            if h.shape[1] == x.shape[1]:
                t, s = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
                b, total = (b + t) * s, total + s.log().flatten(1).sum(dim=1)
            else:
                b = b + h
            x = torch.cat([a, b], dim=1)
            k += 1
        if i < levels - 1:
            x, emitted = x.chunk(2, dim=1)
            h = _zero_conv(w, f"model/pool{i}/conv", x)
            total = total + gaussian(emitted, h[:, 0::2], h[:, 1::2])
    h = x.new_zeros(len(x), 2 * x.shape[1], *x.shape[2:])
    if "model/prior/p/W" in w:
        h = _zero_conv(w, "model/prior/p", h)
    if one_hot is not None:
        linear = (one_hot @ w["model/prior/y_emb/W"] + w["model/prior/y_emb/b"]) * torch.exp(
            3 * w["model/prior/y_emb/logs"]
        )
        h = h + linear[:, :, None, None]
    return total + gaussian(x, *h.chunk(2, dim=1))
