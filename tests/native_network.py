"""The native loops of one coupling network, as `flowkern.network` has them. The library runs them within its loop over
steps alone (`flowkern.cpp.chain`), tests by themselves as well.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from flowkern import _C as native
from flowkern import backend, cpp
from flowkern.layout import channels_last


class Folded:
    """A coupling network's sizes, and its folded weights as the native loops read them, packed when first wanted:
    stored activations need them in forward alone.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype):
        self.dtype = dtype
        self.hidden, self.few = parameters[0].shape[:2]
        self.out = len(parameters[6])
        self._parameters = parameters
        self._packed: dict[tuple[int, int], Tensor] = {}

    def packed(self, height: int, width: int) -> Tensor:
        """For images of this size."""
        if (packed := self._packed.get((height, width))) is None:
            sizes = cpp._TYPES[self.dtype], self.few, self.hidden, self.out, height, width
            packed = self._parameters[0].new_empty(native.network_packed_size(*sizes))
            self._packed[height, width] = packed
            addresses, strides, _owners = cpp._addresses(self._parameters)
            native.network_fold(torch.get_num_threads(), *sizes, addresses, strides, packed.data_ptr())
        return packed


def trace(folded: Folded, a: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """As `flowkern.network.trace`: a (N, C/2, H, W) -> h and, to `keep`, the hidden activations."""
    n, _, height, width = a.shape

    def empty(channels: int) -> Tensor:
        return a.new_empty((n, height, width, channels), dtype=folded.dtype).permute(0, 3, 1, 2)

    h, kept = empty(folded.out), [empty(folded.hidden) for _ in range(2 * keep)]
    if a.numel():
        a = cpp._image(a)
        hidden = [k.data_ptr() for k in kept] or [0, 0]
        native.network_trace(torch.get_num_threads(), cpp._TYPES[folded.dtype], n, height, width, folded.few,
                             folded.hidden, folded.out, folded.packed(height, width).data_ptr(), a.data_ptr(),
                             cpp._strides(a), h.data_ptr(), *hidden)
    return h, kept


def vjp(parameters: Sequence[Tensor], folded: Folded, a: Tensor, hidden: list[Tensor], dh: Tensor, need: Sequence[bool],
        da: Tensor) -> list[Tensor | None]:
    """As `flowkern.network.vjp`: gradients of the nine parameters where `need` says so, and of a, added to `da`."""
    gradients = [torch.empty_like(p) if needed else None for p, needed in zip(parameters, need, strict=True)]
    h1, h2 = hidden
    hidden.clear()
    if not a.numel():
        return [g if g is None else g.zero_() for g in gradients]
    n, _, height, width = a.shape
    through = da if cpp._is_image(da) else torch.zeros_like(da, dtype=torch.float32, memory_format=torch.channels_last)
    a, h1, h2, dh = cpp._image(a), channels_last(h1), channels_last(h2), channels_last(dh)
    weights, strides, _owners = cpp._addresses(parameters)
    native.network_vjp(torch.get_num_threads(), cpp._TYPES[folded.dtype], n, height, width, folded.few, folded.hidden,
                      folded.out, weights, strides, *cpp._addresses(gradients)[:2], a.data_ptr(), cpp._strides(a),
                      through.data_ptr(), cpp._strides(through), h1.data_ptr(), h2.data_ptr(), dh.data_ptr())
    if through is not da:
        da.add_(through)
    return gradients


def table() -> SimpleNamespace:
    """The ops of the backend "cpp", with these networks: what its loop over steps does, one by one."""
    ops = backend.table(torch.device("cpu"), "cpp")
    return SimpleNamespace(**vars(ops) | {"network_fold": Folded, "network_trace": trace, "network_vjp": vjp})
