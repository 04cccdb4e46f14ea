"""openai/glow: its TensorFlow variables by name, in an .npz.

As in flowkern: second half transformed, (x + t) sigmoid(raw + 2), inner ActNorms. Folded: kernels are (h, w, in, out),
1x1 convolutions multiply from the right, ActNorm's log-scale is stored divided by 3, shift and raw scale are
interleaved (shift first), and so are the split's mean and log standard deviation; fixed permutations become 1x1
convolutions. Options: every 3x3 convolution sees a channel that is 1 in the padding (`edge`), the last level's prior
may be learned, and depend on a one-hot class, which becomes the context. Variables outside of `model/` belong to the
optimizer.

To write the .npz, with TensorFlow: `reader = tf.train.load_checkpoint(path)`, then
`numpy.savez(file, **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})`.
"""

import torch

from flowkern.dialects import parts

NAME = "openai"
SHIFT = 0.5


def matches(names) -> bool:
    return "model/0/0/f1/l_1/W" in {_plain(name) for name in names}


def _plain(name: str) -> str:
    return name.removesuffix(":0")


class _Variables:
    """The file's tensors by TensorFlow's names, in PyTorch's layouts."""

    def __init__(self, file):
        self.file = file
        self.names = {_plain(name): name for name in file.names}
        file.ignore(*(name for plain, name in self.names.items() if not plain.startswith("model/")))
        file.ignore(*(name for plain, name in self.names.items() if plain.endswith("/ExponentialMovingAverage")))

    def __contains__(self, name: str) -> bool:
        return f"model/{name}" in self.names

    def take(self, name: str, *shape: int):
        name = f"model/{name}"
        return self.file.take(self.names.get(name, name), *shape)

    def shape(self, name: str):
        name = f"model/{name}"
        return self.file.shape(self.names.get(name, name))

    def actnorm(self, name: str, c: int):
        return 3 * self.take(f"{name}_scale/logs", 1, 1, 1, c), self.take(f"{name}_center/b", 1, 1, 1, c)

    def kernel(self, name: str, size: int, c: int, out: int, edge: bool):
        """The kernel, and its part for the edge channel."""
        weight = self.take(f"{name}/W", size, size, c + edge, out).permute(3, 2, 0, 1)
        return weight[:, :c], weight[:, c:] if edge else None

    def zero_conv(self, name: str, c: int, out: int, edge: bool):
        weight, border = self.kernel(name, 3, c, out, edge)
        bias, logs = self.take(f"{name}/b", 1, 1, 1, out).flatten(), self.take(f"{name}/logs", 1, out).flatten()
        return weight, border, bias, logs


def convert(file) -> tuple[dict, dict]:
    variables = _Variables(file)
    in_channels, hidden = variables.shape("0/0/f1/l_1/W")[2:]
    steps = [name.split("/")[1:3] for name in variables.names if name.endswith("/f1/l_1/W")]
    levels = 1 + max(int(level) for level, _ in steps)
    depth = [1 + max((int(k) for level, k in steps if level == str(i)), default=0) for i in range(levels)]
    out = variables.shape("0/0/f1/l_last/W")[3]
    # The channels of an image give those of a level, an edge channel comes on top.
    edge = in_channels % 2 == 1
    in_channels -= edge
    affine = out == 2 * in_channels
    channels, state = 2 * in_channels, {}
    for i in range(levels):
        for k in range(depth[i]):
            state |= _step(variables, f"{i}/{k}", f"levels.{i}.steps.{k}", channels, hidden, affine, edge)
        if i < levels - 1:
            prior = variables.zero_conv(f"pool{i}/conv", channels // 2, channels, edge)
            weight, border, bias, logs = (t if t is None else parts.deinterleaved(t, 0) for t in prior)
            state |= parts.prior(f"levels.{i}.split", bias, logs, weight, border)
            channels *= 2
    top, classes = _top(variables, channels, edge)
    variant = {"edge": "indicator"} if edge else {}
    arguments = {
        "size": (in_channels // 2, None),
        "levels": levels,
        "depth": depth,
        "hidden": hidden,
        "coupling": "affine" if affine else "additive",
        "scale": "sigmoid",
        "split_prior": "learned",
        "top_prior": "learned" if top else "standard",
    }
    if classes:
        arguments["context_channels"] = classes
        variant |= {"network_context": False, "prior_context": "top"}
    return arguments | {"variant": variant}, state | top


def _step(variables, theirs: str, ours: str, c: int, hidden: int, affine: bool, edge: bool) -> dict:
    state = parts.actnorm(f"{ours}.actnorm", *variables.actnorm(f"{theirs}/actnorm", c))
    state |= parts.conv1x1(f"{ours}.conv", _permutation(variables, theirs, c), variables.file)
    first, border1 = variables.kernel(f"{theirs}/f1/l_1", 3, c // 2, hidden, edge)
    second, _ = variables.kernel(f"{theirs}/f1/l_2", 1, hidden, hidden, False)
    last = variables.zero_conv(f"{theirs}/f1/l_last", hidden, c if affine else c // 2, edge)
    weight, border3, bias, logs = (t if t is None or not affine else parts.deinterleaved(t, 1) for t in last)
    return state | parts.network(
        f"{ours}.coupling.net",
        (first, *variables.actnorm(f"{theirs}/f1/l_1/actnorm", hidden)),
        (second, *variables.actnorm(f"{theirs}/f1/l_2/actnorm", hidden)),
        (weight, bias, logs),
        border1,
        border3,
    )


def _permutation(variables, theirs: str, c: int):
    """The 1x1 convolution, or a fixed permutation as one: reversed channels leave no variable."""
    if f"{theirs}/shuffle/indices" in variables:
        indices = variables.take(f"{theirs}/shuffle/indices", c).long()
        variables.take(f"{theirs}/shuffle/indices_inverse", c)
        return torch.eye(c, dtype=torch.float64)[indices]
    if f"{theirs}/invconv/W" in variables or any("/invconv/" in name for name in variables.names):
        return variables.take(f"{theirs}/invconv/W", c, c).T
    return torch.eye(c, dtype=torch.float64).flip(0)


def _top(variables, c: int, edge: bool) -> tuple[dict, int]:
    """The last level's Gaussian, whose convolution reads zeros, and how many classes it depends on."""
    state, classes = {}, 0
    zeros = torch.zeros(2 * c, dtype=torch.float64)
    if "prior/p/W" in variables:
        _, border, bias, logs = variables.zero_conv("prior/p", 2 * c, 2 * c, edge)
        state = parts.prior("top", bias, logs, edge=border)
    if "prior/y_emb/W" in variables:
        classes = variables.shape("prior/y_emb/W")[0]
        e = torch.exp(3 * variables.take("prior/y_emb/logs", 1, 2 * c))
        weight, bias = variables.take("prior/y_emb/W", classes, 2 * c), variables.take("prior/y_emb/b", 1, 2 * c)
        if not state:
            state = parts.prior("top", zeros, zeros, edge=torch.zeros(2 * c, 1, 3, 3) if edge else None)
        state["top.bias"] = state["top.bias"] + (bias * e)[0] * torch.exp(-3 * state["top.logs"])
        state["top.classes"] = (weight * e)[:, :, None, None]
        variables.file.ignore(*(variables.names.get(f"model/classifier/{n}", "") for n in ("W", "b", "logs")))
    return state, classes
