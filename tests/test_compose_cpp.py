"""The native composition of the mixes and its gradient against plain PyTorch, for each instruction set."""

import pytest
import torch
from compose_cases import SIZES, cotangents, parameters, within_rounding
from conftest import RUNNABLE
from helpers import instruction_set

from flowkern import cpp, mix

SETS = cpp.build_config()["isa_supported"] if "cpp" in RUNNABLE else []


@pytest.fixture(autouse=True, params=SETS)
def isa(request):
    with instruction_set(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps,channels", SIZES)
def test_composition_and_gradient(steps, channels, dtype):
    given, cotangent = parameters(steps, channels, dtype), cotangents(steps, channels, dtype)
    pairs = [*zip(cpp.compose(*given), mix.mixes(*given), strict=True),
             *zip(cpp.compose_vjp(*given, *cotangent), mix.mixes_vjp(*given, *cotangent), strict=True)]
    for got, expected in pairs:
        assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
        assert within_rounding(got, expected, channels)


def test_permutation_out_of_range_is_refused():
    *given, permutation = parameters(2, 3, torch.float32)
    with pytest.raises(ValueError, match="channel numbers"):
        cpp.compose(*given, permutation + 1)
    with pytest.raises(ValueError, match="the permutation must be int64"):
        cpp.compose(*given, permutation.int())
