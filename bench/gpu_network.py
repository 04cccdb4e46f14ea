"""Which coupling network is fastest on this GPU: `python -m bench.gpu_network`, to bench/results/network-<device>.json.

For the steps of a Glow of four levels on 64x64 images, hidden 512 and 128, batch 16 and 64, network in bf16, fp32 and
tf32: microseconds of a forward evaluation that keeps nothing, and of what one step of backward does in recompute mode
(an evaluation that keeps the hidden activations, then all gradients), for

- "triton": flowkern.kernels as it chooses, which "auto" uses; "triton separate": the same without the fused kernel;
- "cudnn": PyTorch's channels-last convolutions; "cudnn relu": those with cuDNN's bias + ReLU.

Beside each the share of the FLOP/s that a large matrix product reaches in the same run, and the error against fp64 of
what is timed, on all its pixels. A form is correct whose error is at most twice that of "cudnn" at the same precision.
The largest sizes come first. `--trial` runs everything tiny, on any device, and writes nothing but to `--out`.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.gpu import PRECISIONS, Device, device_for, options, product_peak, record, set_precision
from bench.ops import largest_error
from flowkern import network as plain
from flowkern.kernels import network as kernels

LEVELS = ((12, 32), (24, 16), (48, 8), (96, 4))  # channels of the state and side of the image, for 64x64 images


def cudnn_relu_trace(folded, a: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """`flowkern.network.trace` with bias and ReLU fused into cuDNN's convolutions."""
    w1, b1, w2, b2, w3, b3 = folded
    a = a.to(w1.dtype, memory_format=torch.channels_last)
    h1 = torch.cudnn_convolution_relu(a, w1, b1, (1, 1), (1, 1), (1, 1), 1)
    h2 = torch.cudnn_convolution_relu(h1, w2, b2, (1, 1), (0, 0), (1, 1), 1)
    return F.conv2d(h2, w3, b3, padding=1), [h1, h2] if keep else []


def separate_trace(folded, a: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    with mock.patch.object(kernels, "fused_blocks", lambda *_: None):
        return kernels.network_trace(folded, a, keep)


FORMS = {
    "triton": SimpleNamespace(fold=kernels.network_fold, trace=kernels.network_trace, vjp=kernels.network_vjp),
    "triton separate": SimpleNamespace(fold=kernels.network_fold, trace=separate_trace, vjp=kernels.network_vjp),
    "cudnn": SimpleNamespace(fold=plain.fold, trace=plain.trace, vjp=plain.vjp),
    "cudnn relu": SimpleNamespace(fold=plain.fold, trace=cudnn_relu_trace, vjp=plain.vjp),
}


class Problem:
    """One step's network and random operands."""

    def __init__(self, channels: int, side: int, hidden: int, batch: int, dtype: torch.dtype, device: Device):
        few, shape = channels // 2, (batch, channels, side, side)
        self.few, self.dtype, self.device = few, dtype, device
        made = torch.Generator(device.name).manual_seed(0)

        def normal(*shape, size=1.0):
            return size * torch.randn(*shape, generator=made, device=device.name)

        size = (9 * few) ** -0.5, hidden**-0.5, (9 * hidden) ** -0.5
        self.parameters = [
            normal(hidden, few, 3, 3, size=size[0]), normal(hidden, size=0.1), normal(hidden, size=0.1),
            normal(hidden, hidden, 1, 1, size=size[1]), normal(hidden, size=0.1), normal(hidden, size=0.1),
            normal(channels, hidden, 3, 3, size=size[2]), normal(channels, size=0.1), normal(channels, size=0.1),
        ]  # fmt: skip
        self.states, self.gradients = ([self._last(normal(*shape)) for _ in range(2)] for _ in range(2))
        self.dh = self._last(normal(*shape)).to(dtype)
        products = 9 * few * hidden + hidden * hidden + 9 * hidden * channels
        self.flops = {"forward": 2 * batch * side * side * products, "backward": 6 * batch * side * side * products}

    @staticmethod
    def _last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, form, folded, i: int) -> Tensor:
        return form.trace(folded, self.states[i][:, : self.few], False)[0]

    def backward(self, form, folded, i: int) -> list[Tensor]:
        a, da = (t[i][:, : self.few] for t in (self.states, self.gradients))
        _, kept = form.trace(folded, a, True)
        return form.vjp(self.parameters, folded, a, kept, self.dh, [True] * 9, da)

    def runs(self, direction: str, form) -> list:
        """Calls that each fold the parameters first, as a step does, on operands in turn."""
        call = getattr(self, direction)
        return [lambda i=i: call(form, form.fold(self.parameters, self.dtype), i) for i in range(2)]

    def error(self, form) -> float:
        """Of the gradients and h against PyTorch's in fp64, relative.

        In the sizes that are timed, as kernels and blocks follow from them: two images over and over, whose gradients
        are those of the two so many times.
        """
        copies = len(self.dh) // 2
        wide = [p.double() for p in self.parameters]
        a, dh = self.states[0][:2], self.dh[:2]
        many = self._last(a.repeat(copies, 1, 1, 1)), self._last(dh.repeat(copies, 1, 1, 1))
        h, da, *gradients = self._everything(form, self.parameters, self.dtype, *many)
        truth = self._everything(FORMS["cudnn"], wide, torch.float64, a.double(), dh.double())
        first = self._everything(form, self.parameters, self.dtype, *many, keep=False)
        every = [t.repeat(copies, 1, 1, 1) for t in (truth[0], truth[1], truth[0])]
        return largest_error([h, da, first, *(g / copies for g in gradients)], [*every, *truth[2:]])

    def _everything(self, form, parameters: list, dtype: torch.dtype, states: Tensor, dh: Tensor, keep: bool = True):
        """In double precision: h, the gradients of the state's half and the parameters; h alone with keep=False."""
        folded, a = form.fold(parameters, dtype), states[:, : self.few]
        h, kept = form.trace(folded, a, keep)
        if not keep:
            return h.double()
        da = torch.zeros_like(states)[:, : self.few]
        gradients = form.vjp(parameters, folded, a, kept, dh.to(dtype), [True] * 9, da)
        return [t.double() for t in (h, da, *gradients)]


def measure(device: Device, trial: bool):
    peaks = {}
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peaks[precision] = product_peak(device, 256 if trial else 8192, dtype, precision)
        yield {"precision": precision, "product TFLOP/s": peaks[precision] / 1e12}
    levels = [(4, 4)] if trial else LEVELS
    sizes = [(8, 2)] if trial else itertools.product((512, 128), (64, 16))
    for (hidden, batch), precision, (channels, side) in itertools.product(sizes, PRECISIONS, levels):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        set_precision(precision)
        problem = Problem(channels, side, hidden, batch, dtype, device)
        budget = 2 * problem.error(FORMS["cudnn"])
        for name, form in FORMS.items():
            row = {"form": name, "precision": precision, "hidden": hidden, "batch": batch, "channels": channels}
            try:
                row["error"] = problem.error(form)
                row["correct"] = row["error"] <= budget
                for direction, flops in problem.flops.items():
                    seconds = device.graph_seconds(problem.runs(direction, form), 10)
                    row[f"{direction} us"] = 1e6 * seconds
                    row[f"{direction} of product"] = flops / seconds / peaks[precision]
            except (RuntimeError, OutOfResources) as error:  # what this device or build of PyTorch does not have
                row["unavailable"] = str(error)[:100]
            yield row


def main() -> None:
    parser = options("python -m bench.gpu_network", __doc__)
    arguments = parser.parse_args()
    device = device_for(parser, arguments.trial)
    record("network", (("rows", row) for row in measure(device, arguments.trial)), {"rows": []}, arguments)


if __name__ == "__main__":
    main()
