"""The native coupling network against PyTorch's forms, with budgets from the data, for each instruction set."""

import pytest
import torch
from helpers import gradients, relative, small_glow
from network_cases import DOUBLE, DTYPES, FLOAT, PYTORCH, SHAPES, Forms, compare, parameters, results, state

from flowkern import cpp

CPP = Forms(cpp.network_fold, cpp.network_trace, cpp.network_vjp)
# Bands of several rows and of one, chunks of pixels that end within a row, more hidden channels than a panel has.
LARGE = {"bands": (2, 12, 40, 30, 20, 12), "rows of their own": (1, 4, 3, 600, 9, 4), "levels": (2, 24, 16, 16, 128, 24)}


@pytest.fixture(autouse=True, params=["avx512bf16", "avx512", "avx2"])
def isa(request):
    from flowkern import _C

    active = _C.build_config()["isa_active"]
    if request.param not in _C.build_config()["isa_supported"]:
        pytest.skip(f"this machine has no {request.param}")
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(active)


def native(dtype):
    return isinstance(cpp.network_fold(parameters(2, 3, 4), dtype), cpp.Folded)


def test_which_precisions_are_native(isa):
    assert native(FLOAT) and native(torch.bfloat16) == (isa == "avx512bf16")
    assert not native(torch.float16) and not native(DOUBLE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_pytorch(dtype):
    compare(CPP, SHAPES.values(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_against_pytorch_on_larger_images(dtype):
    compare(CPP, LARGE.values(), DTYPES[dtype])
