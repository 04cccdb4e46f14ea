"""The native coupling network against PyTorch's forms, with budgets from the data, for each instruction set."""

import native_network
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

import flowkern
from flowkern import cpp

CPP = Forms(native_network.Folded, native_network.trace, native_network.vjp)
pytestmark = pytest.mark.usefixtures("wide_isa")
# Bands of several rows and of one, chunks of pixels that end within a row, more hidden channels than a panel has.
LARGE = {
    "bands": (2, 12, 40, 30, 20, 12),
    "rows of their own": (1, 4, 3, 600, 9, 4),
    "levels": (2, 24, 16, 16, 128, 24),
    "three ranges of sums a thread": (24, 4, 16, 16, 10, 4),
}
# Even sizes and enough hidden channels: by Winograd, where numbers are multiplied in fp32, in tiles of 2x4 pixels where
# four divide the width, else of 2x2. Chunks of tiles that end within a row, a last band that is smaller, bands of two
# rows, channels that nothing divides, more of them than are evaluated at once. With AVX-512, 12 channels out, and 4,
# take four tiles side by side.
WINOGRAD = {
    "levels": (2, 12, 32, 32, 128, 12),
    "levels of few pixels": (3, 48, 8, 8, 128, 48),
    "a smaller last band": (2, 12, 44, 24, 40, 12),
    "two rows": (1, 4, 4, 600, 32, 4),
    "few tiles": (3, 2, 2, 20, 33, 2),
    "additive": (2, 10, 6, 20, 50, 5),
    "many channels": (1, 96, 4, 12, 150, 96),
    "four tiles side by side, and one": (2, 12, 6, 12, 160, 12),
    "a tile of four": (2, 10, 10, 4, 48, 10),
    "four channels": (1, 4, 10, 28, 32, 4),
    "squares": (2, 12, 16, 30, 128, 12),
    "squares, a smaller last band": (2, 12, 44, 22, 40, 12),
    "squares, two rows": (1, 4, 4, 598, 32, 4),
    "few squares": (3, 2, 2, 10, 33, 2),
    "squares though four divide the width": (1, 12, 4, 8, 40, 12),
    "squares, additive": (2, 10, 6, 10, 50, 5),
    "squares, many channels": (1, 96, 4, 6, 150, 96),
    "four squares side by side, and three": (2, 12, 6, 10, 160, 12),
    "a square of four": (2, 10, 6, 6, 48, 10),
    "squares, four channels": (1, 4, 10, 14, 32, 4),
}


def test_which_precisions_are_native():
    assert cpp.network_tiled(FLOAT, FLOAT) and cpp.network_tiled(FLOAT, torch.bfloat16)
    assert not cpp.network_tiled(FLOAT, torch.float16) and not cpp.network_tiled(DOUBLE, DOUBLE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_against_pytorch(dtype):
    compare(CPP, SHAPES.values(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_against_pytorch_on_larger_images(dtype):
    compare(CPP, LARGE.values(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", WINOGRAD)
def test_winograd_against_pytorch(shape, dtype):
    compare(CPP, [WINOGRAD[shape]], DTYPES[dtype])


@pytest.mark.parametrize("tiles", ["levels", "squares"])
def test_winograd_is_as_exact_as_the_sums_over_taps(tiles):
    """Beside images with a row more, which have no whole tiles; in units of fp32's last place."""
    n, c, height, width, hidden, out = WINOGRAD[tiles]
    errors = []
    for rows in (height, height + 1):
        shape = n, c, rows, width, hidden, out
        got, exact = results(CPP, shape, FLOAT, FLOAT), results(PYTORCH, shape, DOUBLE, DOUBLE)
        errors.append(torch.tensor([relative(g.double(), e) for g, e in zip(got, exact, strict=True)]))
    eps = torch.finfo(FLOAT).eps
    assert (errors[0] <= 3 * errors[1] + eps).all() and errors[0].max() < 20 * eps, [(e / eps).tolist() for e in errors]


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_not_a_number_stays_one(bits, dtype):
    """Also where rounding its bits as a number's would make it infinite, or zero."""
    nan = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    weights = parameters(3, 8, 6)
    a = state(1, 6, 5, 5)[:, :3]
    a[0, 0, 2, 2] = nan
    h, (h1, h2) = CPP.trace(CPP.fold(weights, dtype), a, True)
    assert h[:, :, 2, 2].isnan().all() and h1[:, :, 2, 2].isnan().all() and h2[:, :, 2, 2].isnan().all()
    assert not h1[:, :, 0, 0].isnan().any() and h[:, :, 0, 0].isnan().all()    # two layers reach the corner
    for parameter in (2, 3, 5):     # biases have full precision: layers' results are rounded with their very bits
        broken = [w.clone() for w in weights]
        broken[parameter].view(-1)[0] = nan
        assert CPP.trace(CPP.fold(broken, dtype), state(1, 6, 5, 5)[:, :3], False)[0].isnan().all()


def test_empty(dtype):
    shape = (0, 6, 4, 4, 5, 6)
    for g, w in zip(results(CPP, shape, dtype, FLOAT), results(PYTORCH, shape, dtype, FLOAT), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)
    h, *_, last = results(CPP, (2, 6, 0, 4, 5, 6), dtype, FLOAT)
    assert h.shape == (2, 6, 0, 4) and not last.any()


def test_the_process_may_have_another_default_dtype(dtype):
    """The loops pack fp32 numbers, for which bf16 ones would leave too little memory."""
    weights = parameters(3, 8, 6)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert native_network.Folded(weights, dtype).packed(4, 4).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("shape", ["additive", "many hidden"])
def test_keeping_hidden_activations_or_not_gives_the_same(shape, dtype):
    assert_keeping_changes_nothing(CPP, SHAPES[shape], dtype)


def test_operands_of_other_memory_layouts(dtype):
    n, c, height, width, hidden, out = SHAPES["additive"]
    given = parameters(c // 2, hidden, out)
    folded = CPP.fold(given, dtype)
    a, dh = state(n, c, height, width)[:, : c // 2], state(n, out, height, width).to(dtype)
    expected = CPP.trace(folded, a, True)[0]
    frame = slice(None), slice(c // 2), slice(1, 1 + height), slice(2, 2 + width)     # of pictures that are larger
    crop, wide = (torch.randn(n, height + 3, width + 5, c).permute(0, 3, 1, 2)[frame] for _ in range(2))
    crop.copy_(a)
    for other in (a.contiguous(), a.contiguous(memory_format=torch.channels_last), a.flip(3).flip(3), a.double(), crop):
        assert torch.equal(CPP.trace(folded, other, True)[0], expected)
    strided = [torch.stack([p, p], dim=-1)[..., 0] for p in given]      # neither dense nor in a usual order
    assert torch.equal(CPP.trace(CPP.fold(strided, dtype), a, True)[0], expected)
    gradient, through = torch.zeros(n, c // 2, height, width), state(n, c, height, width, 2)
    before, found = through.clone(), []
    for parameters_, da in ((given, gradient), (strided, through[:, : c // 2])):
        found.append(CPP.vjp(parameters_, folded, a, CPP.trace(folded, a, True)[1], dh.contiguous(), [True] * 9, da))
    torch.testing.assert_close(through[:, : c // 2] - before[:, : c // 2], gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(through[:, c // 2 :], before[:, c // 2 :])
    rest = wide.clone()
    found.append(CPP.vjp(given, folded, crop, CPP.trace(folded, crop, True)[1], dh.contiguous(), [True] * 9, wide))
    torch.testing.assert_close(wide - rest, gradient, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(b, found[0][i]) for other in found for i, b in enumerate(other))


@pytest.mark.parametrize("wanted", WANTED)
def test_only_the_gradients_that_are_wanted(wanted, dtype):
    assert_only_wanted_gradients(CPP, dtype, wanted)


def test_gradients_in_the_memory_layout_of_their_parameters(dtype):
    assert_gradients_laid_out_as_parameters(CPP, dtype)


@pytest.mark.parametrize("shape", ["bands", "three ranges of sums a thread", "few tiles", "few squares"])
def test_same_bits_again_whatever_the_threads_do_and_inputs_left_alone(shape, dtype):
    """The sums over pixels alone depend on how many threads share them, up to rounding."""
    n, c, height, width, hidden, out = (LARGE | WINOGRAD)[shape]
    given, x, dh = parameters(c // 2, hidden, out), state(n, c, height, width), state(n, out, height, width).to(dtype)
    folded = CPP.fold(given, dtype)
    _, kept = CPP.trace(folded, x[:, : c // 2], True)
    inputs = [*given, x, *kept, dh]
    before, found, threads = [t.clone() for t in inputs], [], torch.get_num_threads()
    try:
        for count in (3, 3, 1):
            torch.set_num_threads(count)
            g = state(n, c, height, width, 2)
            gradients = CPP.vjp(given, folded, x[:, : c // 2], list(kept), dh, [True] * 9, g[:, : c // 2])
            found.append([CPP.trace(folded, x[:, : c // 2], False)[0], g, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[2][:2], strict=True))
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    assert all(relative(a, b) < 1e-6 for a, b in zip(found[0], found[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_chain_gives_the_references_gradients(dtype):
    options = dict(size=(2, 8, 8), levels=2, depth=2, hidden=6, compute_dtype=dtype)
    x = torch.rand(2, 2, 8, 8)
    exact = small_glow(**options | {"compute_dtype": None}, backend="reference")
    wanted = gradients(exact, x.double(), list(exact.parameters()))
    for memory in ("store", "recompute", "checkpoint"):
        errors = {}
        for backend in ("cpp", "reference"):
            glow = small_glow(**options, dtype=FLOAT, backend=backend, memory=memory)
            glow.load_state_dict(exact.state_dict())
            got = gradients(glow, x, list(glow.parameters()))
            errors[backend] = torch.tensor([relative(g.double(), w) for g, w in zip(got, wanted, strict=True)])
        mine, theirs = (e.square().mean().sqrt() for e in (errors["cpp"], errors["reference"]))
        assert mine <= 2 * theirs + 20 * torch.finfo(FLOAT).eps


def test_nan_is_not_rectified():
    """In silence it would be a channel that is never on again, and a loss that looks well."""
    torch.manual_seed(0)
    glow = flowkern.Glow((3, 16, 16), levels=1, depth=1, hidden=16)
    x = torch.rand(2, 3, 16, 16)
    glow.initialize(x)
    net = glow.levels[0].steps[0].coupling.net
    with torch.no_grad():
        net.weight3.normal_()
        net.weight1[3, 0, 1, 1] = torch.nan
    for memory in ("recompute", "store"):
        glow.memory = memory
        assert glow.log_prob(x).isnan().all()


def test_a_gradient_passes_hidden_activations_that_are_nan():
    """As PyTorch's derivative of the ReLU lets it, on which a check for NaN may rely."""
    n, c, height, width, hidden, out = 2, 6, 4, 4, 5, 6
    given = parameters(c // 2, hidden, out)
    given[2][1] = float("nan")  # a bias
    a, dh = state(n, c, height, width)[:, : c // 2], state(n, out, height, width)
    found = []
    for forms in (CPP, PYTORCH):
        folded, da = forms.fold(given, FLOAT), torch.zeros(n, c // 2, height, width)
        _, hidden_ = forms.trace(folded, a, True)
        found.append([*forms.vjp(given, folded, a, hidden_, dh, [True] * 9, da), da])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
