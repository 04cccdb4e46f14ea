"""Every pixel op's kernel against the specification, as other backends are tested, at sizes an interpreter bears."""

import importlib

import pytest
import torch
from pixel_cases import COUPLINGS, FLOAT, SPREADS, Inputs, arguments, compare, results

from flowkern import backend as backends
from flowkern import reference

SHAPES = ((1, 2, 1, 1), (3, 4, 1, 1), (2, 6, 5, 3), (3, 10, 1, 7), (1, 12, 9, 11), (2, 34, 3, 5), (1, 72, 5, 3))
WIDE = ((1, 130, 3, 5), (1, 192, 1, 7))
MANY_PIXELS = ((2, 12, 33, 40),)
KERNELS = backends.table(torch.device("cpu"), "triton")


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_op_against_reference(op, precision):
    if op in COUPLINGS:
        for spread in SPREADS.values():
            compare(KERNELS, op, precision, spread, SHAPES)
    elif precision == "fp32":
        compare(KERNELS, op, precision, 1.0, ((2, 3, 4, 5), *SHAPES))


@pytest.mark.parametrize("op", ["channel_mix", "couple_mix", "mix_couple", "mix_vjp"])
def test_many_channels(op):
    compare(KERNELS, op, "fp32", 1.0, WIDE[:1] if op == "mix_vjp" else WIDE)


@pytest.mark.parametrize("op, channels", [("channel_mix", 1028), ("couple_mix", 516), ("mix_couple", 516)])
def test_more_channels_than_a_block_has_room_for(op, channels):
    compare(KERNELS, op, "fp32", 1.0, ((1, channels, 1, 2),))


@pytest.mark.parametrize("op, channels", [("channel_mix", 258), ("couple_mix", 130), ("mix_couple", 130)])
def test_chips_of_little_shared_memory(op, channels, monkeypatch):
    """On AMD's, of 64 KiB, a block of all channels doesn't fit."""
    mix, couple_mix = (importlib.import_module(f"flowkern.kernels.{name}") for name in ("mix", "couple_mix"))
    for module in (mix, couple_mix):
        monkeypatch.setattr(module, "shared_memory", lambda device: 64 << 10)
    monkeypatch.delattr(*(mix, "_mix_kernel") if op == "channel_mix" else (couple_mix, "_couple_mix_kernel"))
    compare(KERNELS, op, "fp32", 1.0, ((1, channels, 1, 2),))


@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in ("channel_mix", "shrink", "data_consistency")])
def test_sums_over_many_pixels(op):
    compare(KERNELS, op, "fp32", 1.0, MANY_PIXELS)


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty(op, shape):
    for _, args in arguments(op, shape, FLOAT, FLOAT):
        got, same = results(getattr(KERNELS, op), args), results(getattr(reference, op), args)
        torch.testing.assert_close(got, same, rtol=0, atol=0)


@pytest.mark.parametrize("op", [op for op in backends.OPS if op != "shrink"])
def test_tensors_on_different_devices(op):
    _, args = next(iter(arguments(op, (1, 4, 2, 2), FLOAT, FLOAT)))
    args = [a.to("meta") if i == 1 else a for i, a in enumerate(args)]
    with pytest.raises(ValueError, match=f"{op}: .* on cpu.*, got torch.float32 on meta"):
        getattr(KERNELS, op)(*args)


@pytest.mark.parametrize("shape", [(2, 12, 7, 40), (1, 72, 11, 12)])
def test_sums_in_few_parts(shape, monkeypatch):
    mix_vjp = importlib.import_module("flowkern.kernels.mix_vjp")
    monkeypatch.setattr(mix_vjp, "MOST_PARTS", 3)
    compare(KERNELS, "mix_vjp", "fp32", 1.0, (shape,))


def test_parts_of_sums_are_bounded():
    """However many pixels: where a program added up a given number of them, its parts outgrew the states."""
    runs = importlib.import_module("flowkern.kernels.mix_vjp").runs
    for pixels, block, channels in ((1, 32, 12), (65536, 32, 192), (65536, 32, 3000), (1 << 24, 16, 48), (0, 32, 4)):
        run, parts = runs(pixels, block, channels)
        assert (parts - 1) * run * block < max(1, pixels) <= max(1, parts * run * block)
        assert parts <= 2048 and (parts <= 1 or parts * (channels**2 + channels) * 4 <= 16 << 20)


def test_reductions_go_to_dense_memory():
    make = Inputs((1, 4, 2, 2), FLOAT, FLOAT)
    with pytest.raises(ValueError, match="mix_vjp: `into` must be dense tensors"):
        KERNELS.mix_vjp(make.state(), make.state(), *make.mix(), into=(torch.empty(4, 4).T, torch.empty(4)))


@pytest.mark.parametrize("b", [0.0, 1e-4])
@pytest.mark.parametrize("inverse, given", [(False, False), (False, True), (True, False), (True, True)])
def test_quotients_by_a_subnormal_scale(b, inverse, given):
    """1 / s overflows where b / s does not."""
    x, h = torch.full((1, 2, 1, 1), b), torch.tensor([-95.0, 0.0]).view(1, 2, 1, 1)
    args = (x, x, h, torch.ones(1), "sigmoid", 1.0, inverse, given)
    torch.testing.assert_close(KERNELS.couple_vjp(*args), reference.couple_vjp(*args), rtol=1e-3, atol=0)


def test_doubles_are_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' computes states in float32, got float64"):
        backends.table(torch.device("cpu"), "triton", torch.float64)
