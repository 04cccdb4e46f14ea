"""The coupling network's kernels against PyTorch's forms, with budgets from the data; and through the whole chain."""

import pytest
import torch
from helpers import gradients, relative, small_glow
from network_cases import (
    DOUBLE,
    DTYPES,
    FLOAT,
    PYTORCH,
    SHAPES,
    WANTED,
    Forms,
    assert_gradients_laid_out_as_parameters,
    assert_keeping_changes_nothing,
    assert_only_wanted_gradients,
    compare,
    parameters,
    results,
    state,
)
from test_broken import edited

from flowkern.kernels import fused_network, network, weight_gradient
from flowkern.kernels.convolution import KINDS, blocks, form
from flowkern.kernels.launch import SHARED
from flowkern.kernels.network import _pixel_stride

TRITON = Forms(network.network_fold, network.network_trace, network.network_vjp)


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch):
    """So few multiprocessors that sums over these few pixels run over several blocks and split into several parts."""
    monkeypatch.setattr(weight_gradient, "MULTIPROCESSORS", 3)


@pytest.fixture(params=["separate", "fused"])
def execution(request, monkeypatch):
    """Both ways to evaluate the network; the fused one where it fits."""
    monkeypatch.setattr(fused_network, "MULTIPROCESSORS", 0 if request.param == "fused" else 1 << 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_pytorch(execution, dtype):
    compare(TRITON, SHAPES.values(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_is_pytorchs(dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        given = parameters(3, 10, 5, layout=layout)
        for got, wanted in zip(TRITON.fold(given, DTYPES[dtype]), PYTORCH.fold(given, DTYPES[dtype]), strict=True):
            assert got.dtype == wanted.dtype
            assert relative(got.double(), wanted.double()) <= 4 * torch.finfo(got.dtype).eps


def test_double_precision_is_pytorchs():
    shape = SHAPES["additive"]
    for got, wanted in zip(
        results(TRITON, shape, DOUBLE, DOUBLE), results(PYTORCH, shape, DOUBLE, DOUBLE), strict=True
    ):
        assert torch.equal(got, wanted)


def test_empty():
    shape = (0, 6, 4, 4, 5, 6)
    for g, w in zip(results(TRITON, shape, FLOAT, FLOAT), results(PYTORCH, shape, FLOAT, FLOAT), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)
    h, *_, g1 = results(TRITON, (2, 6, 0, 4, 5, 6), FLOAT, FLOAT)
    assert h.shape == (2, 6, 0, 4) and not g1.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["additive", "many hidden"])
def test_keeping_hidden_activations_or_not_gives_the_same(execution, shape, dtype):
    assert_keeping_changes_nothing(TRITON, SHAPES[shape], DTYPES[dtype])


def test_the_fused_form_is_used_where_it_fits_and_pays(monkeypatch):
    large, small = 65536, 1024
    bf16, products = (torch.bfloat16, "ieee"), (torch.float32, "tf32")
    chosen = [
        fused_network.fused_blocks(6, 512, 12, large, *bf16, 90),
        fused_network.fused_blocks(6, 128, 12, large, *bf16, 80),
        fused_network.fused_blocks(6, 128, 12, large, *products, 90),
    ]
    assert [c and c["BLOCK_M"] for c in chosen] == [128, 64, 64]
    for refused in (
        (6, 512, 12, small, *bf16, 90),
        (6, 512, 12, large, *bf16, 80),
        (6, 512, 12, large, *products, 90),
        (6, 128, 12, large, torch.float32, "tf32x3", 90),
        (6, 128, 12, large, *bf16, 0),
        (48, 512, 96, large, *bf16, 90),
    ):
        assert fused_network.fused_blocks(*refused) is None
    used = []
    monkeypatch.setattr(fused_network, "MULTIPROCESSORS", 0)
    monkeypatch.setattr(network, "fused_trace", lambda *args: used.append(args) or fused_network.fused_trace(*args))
    TRITON.trace(TRITON.fold(parameters(2, 5, 4), FLOAT), state(1, 4, 2, 2)[:, :2], False)
    assert len(used) == 1


def test_parameters_with_gaps_are_read_and_given_gradients_as_dense_ones():
    n, c, height, width, hidden, out = SHAPES["additive"]
    dense = parameters(c // 2, hidden, out)

    def gaps(p):
        wide = torch.zeros(*(2 * s if i == p.dim() - 1 or i == 1 else s for i, s in enumerate(p.shape)))
        view = wide[..., ::2] if p.dim() == 1 else wide[:, : p.shape[1], :, : p.shape[3]]
        return view.copy_(p)

    a, dh = state(n, c, height, width)[:, : c // 2], state(n, out, height, width)
    found = []
    for those in (dense, [gaps(p) for p in dense], [p[:1].expand(len(p)) if p.dim() == 1 else p for p in dense]):
        folded = TRITON.fold(those, FLOAT)
        h, kept = TRITON.trace(folded, a, True)
        da = torch.zeros_like(a, memory_format=torch.channels_last)
        gradients = TRITON.vjp(those, folded, a, kept, dh, [True] * 9, da)
        found.append([h, da, *gradients])
        expanded = [p.clone() for p in those]
    for one, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(one, other)
    folded = TRITON.fold(expanded, FLOAT)
    h, kept = TRITON.trace(folded, a, True)
    gradients = TRITON.vjp(expanded, folded, a, kept, dh, [True] * 9, torch.zeros_like(da))
    for one, other in zip(found[2], [h, da, *gradients], strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_of_other_memory_layouts():
    n, c, height, width, hidden, out = shape = SHAPES["additive"]
    folded = TRITON.fold(parameters(c // 2, hidden, out), FLOAT)
    a = state(n, c, height, width)[:, : c // 2]
    expected = TRITON.trace(folded, a, True)[0]
    for other in (a.contiguous(), a.contiguous(memory_format=torch.channels_last), a.flip(3).flip(3)):
        assert torch.equal(TRITON.trace(folded, other, True)[0], expected)
    dh, gradient = state(n, out, height, width), torch.zeros(n, c // 2, height, width)
    through = state(n, c, height, width, 2)
    before = through.clone()
    for da in (gradient, through[:, : c // 2]):
        TRITON.vjp(parameters(c // 2, hidden, out), folded, a, TRITON.trace(folded, a, True)[1], dh, [False] * 9, da)
    torch.testing.assert_close(through[:, : c // 2] - before[:, : c // 2], gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(through[:, c // 2 :], before[:, c // 2 :])
    assert shape[0] == n


def test_pixels_at_constant_distance():
    x = torch.zeros(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert _pixel_stride(x[:, :3]) == _pixel_stride(x) == 6
    assert _pixel_stride(x[1:, :3]) == 6 and _pixel_stride(x[:, 3:]) == 6
    assert _pixel_stride(x[:, :, 1:]) is None and _pixel_stride(x[:, :, :, ::2]) is None
    assert _pixel_stride(torch.zeros(2, 6, 4, 5)) is None and _pixel_stride(torch.zeros(2, 1, 4, 5)) == 1
    assert _pixel_stride(torch.zeros(1, 6, 1, 1)) == 6


@pytest.mark.parametrize("wanted", WANTED)
def test_only_the_gradients_that_are_wanted(wanted):
    assert_only_wanted_gradients(TRITON, FLOAT, wanted)


def test_gradients_in_the_memory_layout_of_their_parameters():
    assert_gradients_laid_out_as_parameters(TRITON, FLOAT)


def test_weights_of_unevenly_spaced_taps_are_refused():
    given = parameters(3, 5, 6)
    given[0] = given[0].transpose(2, 3)
    with pytest.raises(ValueError, match="taps evenly spaced"):
        TRITON.fold(given, FLOAT)


def test_same_bits_again_and_inputs_left_alone():
    n, c, height, width, hidden, out = SHAPES["one row"]
    given = parameters(c // 2, hidden, out)
    folded = TRITON.fold(given, torch.bfloat16)
    x, dh = state(n, c, height, width), state(n, out, height, width).bfloat16()
    h, kept = TRITON.trace(folded, x[:, : c // 2], True)
    inputs = [*given, *folded, x, *kept, dh]
    before = [t.clone() for t in inputs]
    found = []
    for _ in range(2):
        g = state(n, c, height, width, 2)
        gradients_ = TRITON.vjp(given, folded, x[:, : c // 2], list(kept), dh, [True] * 9, g[:, : c // 2])
        found.append([TRITON.trace(folded, x[:, : c // 2], False)[0], g, *gradients_])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_fresh_activations_are_written_over_and_kept_ones_are_not():
    n, c, height, width, hidden, out = SHAPES["one row"]
    given = parameters(c // 2, hidden, out)
    folded = TRITON.fold(given, FLOAT)
    a, dh = state(n, c, height, width)[:, : c // 2], state(n, out, height, width)
    found = []
    for fresh in (False, True):
        _, kept = TRITON.trace(folded, a, True)
        tensors, before = list(kept), [t.clone() for t in kept]
        found.append(TRITON.vjp(given, folded, a, kept if fresh else list(kept), dh, [True] * 9, torch.zeros_like(a)))
        assert all(torch.equal(t, b) != fresh for t, b in zip(tensors, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
def test_backward_twice_gives_the_same_bits(memory):
    glow = small_glow((2, 4, 4), levels=1, depth=1, hidden=6, dtype=FLOAT, backend="triton", memory=memory)
    loss = glow.log_prob(torch.rand(2, 2, 4, 4)).sum()
    first, second = (torch.autograd.grad(loss, list(glow.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_problems_fill_a_gpu_and_none_is_split_beyond_its_pixels(monkeypatch):
    monkeypatch.undo()
    for pixels in (1, 31, 256, 1000, 4096, 16384, 65536, 100_000, 1 << 24):
        for tiles in (1, 4, 16, 64, 400):
            run, parts = weight_gradient.runs(pixels, tiles, 64)
            assert run * parts * 64 >= pixels and (parts - 1) * run * 64 < pixels
            assert parts * tiles <= max(132, tiles)
            if pixels >= 132 * 64 and tiles <= 16:
                assert parts * tiles >= 64
        for kind in KINDS:
            told = form(kind, False, 6, 512)
            sizes, *_ = blocks(told, pixels, torch.bfloat16, "ieee", SHARED)
            programs = -(-pixels // sizes["BLOCK_M"]) * -(-told["N"] // sizes["BLOCK_N"])
            assert programs >= 132 or sizes["BLOCK_M"] == 32


MODES = [("store", None), ("recompute", None), ("recompute", 2), ("checkpoint", None)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chain_gives_the_references_gradients_in_every_mode(dtype):
    """In low precision the modes agree among themselves, and are as far from fp64 as the reference is."""
    options = dict(size=(2, 4, 4), levels=1, depth=2, hidden=6, compute_dtype=DTYPES[dtype])
    x = torch.rand(2, 2, 4, 4)
    exact = small_glow(**options | {"compute_dtype": None}, backend="reference")
    wanted = gradients(exact, x.double(), list(exact.parameters()))
    for memory, anchor_every in MODES:
        errors = {}
        for backend in ("triton", "reference"):
            glow = small_glow(**options, dtype=FLOAT, backend=backend, memory=memory, anchor_every=anchor_every)
            glow.load_state_dict(exact.state_dict())
            got = gradients(glow, x, list(glow.parameters()))
            errors[backend] = [relative(g.double(), w) for g, w in zip(got, wanted, strict=True)]
        for mine, theirs in zip(errors["triton"], errors["reference"], strict=True):
            assert mine <= 2 * theirs + 20 * torch.finfo(DTYPES[dtype]).eps


MISTAKES = {
    "a tap of the wrong side": ("convolution", "dx = tap % 3 - 1", "dx = 1 - tap % 3"),
    "the image's edge": ("convolution", "(column < width)", "(column <= width)"),
    "the gate of a dead unit": ("convolution", "mask=inside, other=0.0) > 0", "mask=inside, other=0.0) >= 0"),
    "no bias": ("convolution", "total + tl.load(bias + n", "total + 0.0 * tl.load(bias + n"),
    "a pixel too few": ("convolution", "inside = (first + i < pixels)", "inside = (first + i < pixels - 1)"),
    "the gradient of a is set, not added": ("convolution", "if ADD:", "if ADD and C == 0:"),
    "fused: hidden units beyond the first block": ("fused_network", "j * BLOCK_1 + tl.arange", "tl.arange"),
    "fused: no rectifier": ("fused_network", "rounded(rectified(part), dtype)", "rounded(part, dtype)"),
    "fused: the second bias": ("fused_network", "tl.load(bias2 + k2", "tl.load(bias1 + k2"),
    "a part is lost": ("folding", "(part < parts)[:, None]", "(part < parts - 1)[:, None]"),
    "the scale's factor": ("folding", "FACTOR * e * (", "e * ("),
    "another tap's bias": ("folding", "4 * FEW_OUT, 3.0", "3 * FEW_OUT, 3.0"),
    "taps not flipped": ("weight_gradient", "stride, M, LEFT, True)", "stride, M, LEFT, False)"),
}


def with_copy(module, old, new, folder, monkeypatch):
    """Let the network run on a copy of one module, with one place changed."""
    copy = edited(module, old, new, folder)
    for name in ("fold", "unfold", "multiply", "sum_taps", "weight_gradient", "fused_trace"):
        if getattr(getattr(copy, name, None), "__module__", None) == copy.__name__:
            monkeypatch.setattr(network, name, getattr(copy, name))
    if module == "fused_network":
        monkeypatch.setattr(fused_network, "MULTIPROCESSORS", 0)


def telling(module):
    """Two shapes that show what goes wrong in a module."""
    return [SHAPES[name] for name in ("additive", "many hidden" if module == "fused_network" else "many pixels")]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, tmp_path, monkeypatch):
    module, old, new = MISTAKES[mistake]
    with_copy(module, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        compare(TRITON, telling(module), FLOAT)


@pytest.mark.parametrize("module", sorted({module for module, *_ in MISTAKES.values()}))
def test_an_unchanged_copy_passes(module, tmp_path, monkeypatch):
    with_copy(module, "tl.arange", "tl.arange", tmp_path, monkeypatch)
    compare(TRITON, telling(module), FLOAT)
