"""Calls of the coupling network's functions on random operands, and the judgement of a backend's results."""

import torch
from helpers import relative

from flowkern import network as plain

FLOAT, DOUBLE = torch.float32, torch.float64
DTYPES = {"fp32": FLOAT, "bf16": torch.bfloat16, "fp16": torch.float16}
# N, C, H, W, hidden, channels out: nothing divides a block; C/2 from 1; one output a channel of a half is additive.
SHAPES = {
    "two channels": (1, 2, 3, 3, 17, 2),
    "additive": (2, 6, 5, 7, 5, 3),
    "one row": (3, 4, 1, 6, 8, 4),
    "one pixel": (2, 12, 1, 1, 32, 12),
    "wide": (1, 24, 3, 5, 33, 24),
    "many pixels": (1, 2, 13, 17, 3, 2),
    "many hidden": (1, 6, 2, 3, 70, 6),
}

WANTED = [(), (0,), (5,), (6, 8), (1, 3)]  # of the nine gradients


def parameters(few, hidden, out, seed=0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=0.3):
        return torch.randn(*shape, generator=generator) * size

    weights = normal(hidden, few, 3, 3), normal(hidden, hidden, 1, 1), normal(out, hidden, 3, 3)
    w1, w2, w3 = (w.contiguous(memory_format=layout) for w in weights)
    return [w1, normal(hidden), normal(hidden), w2, normal(hidden), normal(hidden), w3, normal(out), normal(out)]


def state(n, c, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, height, width, generator=generator).contiguous(memory_format=torch.channels_last)


class Forms:
    """One implementation's three functions."""

    def __init__(self, fold, trace, vjp):
        self.fold, self.trace, self.vjp = fold, trace, vjp


PYTORCH = Forms(plain.fold, plain.trace, plain.vjp)


def results(forms, shape, dtype, wide, need=(True,) * 9, device="cpu"):
    """Everything that the three functions compute: h, hidden activations, the gradient state, the nine gradients.

    wide: the precision of parameters and states. Computed on `device`, returned on the CPU.
    """
    n, c, height, width, hidden, out = shape
    given = [p.to(device, wide) for p in parameters(c // 2, hidden, out)]
    a, g = (state(n, c, height, width, seed).to(device, wide) for seed in (1, 2))
    dh = state(n, out, height, width, 3).to(device, dtype)
    folded = forms.fold(given, dtype)
    h, kept = forms.trace(folded, a[:, : c // 2], True)
    saved = [k.clone() for k in kept]
    found = forms.vjp(given, folded, a[:, : c // 2], kept, dh, need, g[:, : c // 2])
    assert kept == []
    return [t if t is None else t.cpu() for t in (h, *saved, g, *found)]


def assert_within_budget(got, same, exact, label):
    """Lists of results over shapes. Each result's error, pooled over shapes so that no budget hangs on one lucky
    number, is at most twice that of PyTorch in the same precision, plus a few units in the last place.
    """
    mine, theirs = [], []
    for many in zip(got, same, exact, strict=True):
        for i, (g, s) in enumerate(zip(*many[:2], strict=True)):
            assert g.shape == s.shape and g.dtype == s.dtype and g.stride() == s.stride(), f"{label}: result {i}"
            assert g.isfinite().all(), f"{label}: result {i} holds unwritten numbers"
        mine.append([relative(g.double(), e) for g, e in zip(many[0], many[2], strict=True)])
        theirs.append([relative(s.double(), e) for s, e in zip(many[1], many[2], strict=True)])
    mine, theirs = (torch.tensor(errors).square().mean(dim=0).sqrt() for errors in (mine, theirs))
    slack = torch.tensor([4 * torch.finfo(g.dtype).eps for g in got[0]])
    assert (mine <= 2 * theirs + slack).all(), f"{label}: {mine.tolist()} where PyTorch has {theirs.tolist()}"


def compare(forms, shapes, dtype, device="cpu"):
    got = [results(forms, shape, dtype, FLOAT, device=device) for shape in shapes]
    same = [results(PYTORCH, shape, dtype, FLOAT) for shape in shapes]
    exact = [results(PYTORCH, shape, DOUBLE, DOUBLE) for shape in shapes]
    assert_within_budget(got, same, exact, dtype)


def assert_keeping_changes_nothing(forms, shape, dtype):
    n, c, height, width, hidden, out = shape
    folded = forms.fold(parameters(c // 2, hidden, out), dtype)
    a = state(n, c, height, width)[:, : c // 2]
    h, kept = forms.trace(folded, a, True)
    alone, none = forms.trace(folded, a, False)
    assert len(kept) == 2 and none == [] and alone.stride() == h.stride()
    assert torch.equal(alone, h)


def assert_only_wanted_gradients(forms, dtype, wanted):
    shape = SHAPES["two channels"]
    everything = results(forms, shape, dtype, FLOAT)
    some = results(forms, shape, dtype, FLOAT, need=[i in wanted for i in range(9)])
    assert torch.equal(some[3], everything[3])
    for i in range(9):
        assert (some[4 + i] is None) if i not in wanted else torch.equal(some[4 + i], everything[4 + i])


def assert_gradients_laid_out_as_parameters(forms, dtype):
    n, c, height, width, hidden, out = SHAPES["additive"]
    a, dh = state(n, c, height, width)[:, : c // 2], state(n, out, height, width).to(dtype)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = parameters(c // 2, hidden, out, layout=layout)
        folded = forms.fold(given, dtype)
        kept = forms.trace(folded, a, True)[1]
        found.append(forms.vjp(given, folded, a, kept, dh, [True] * 9, torch.zeros_like(a)))
        assert [g.stride() for g in found[-1]] == [p.stride() for p in given]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
