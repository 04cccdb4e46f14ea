"""The coupling network's kernels on the GPU, at sizes that reach every block size, against PyTorch on the CPU."""

import pytest
import torch
from gpu_device import DEVICE
from network_cases import DTYPES, FLOAT, SHAPES, Forms, compare, parameters, state

from flowkern.kernels import fused_network, network

TRITON = Forms(network.network_fold, network.network_trace, network.network_vjp)
# As SHAPES: N, C, H, W, hidden, channels out. Whole and broken blocks, one or many of them, narrow and wide networks.
LARGE = (
    (4, 12, 64, 64, 128, 12),
    (3, 12, 65, 67, 512, 12),
    (2, 24, 33, 31, 256, 24),
    (2, 48, 8, 8, 512, 48),
    (1, 96, 4, 5, 300, 48),
)


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["chosen", "separate", "fused"])
def execution(request, monkeypatch):
    if request.param != "chosen":
        monkeypatch.setattr(fused_network, "MULTIPROCESSORS", 0 if request.param == "fused" else 1 << 30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_shapes(execution, dtype):
    compare(TRITON, SHAPES.values(), DTYPES[dtype], DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shapes(execution, dtype, real_gpu):
    compare(TRITON, LARGE, DTYPES[dtype], DEVICE)


def test_nan_is_not_rectified(execution):
    """The interpreter's maximum passes NaN on, a GPU's does not unless it is told to."""
    shape = SHAPES["additive"]
    n, c, height, width, hidden, out = shape
    those = [p.to(DEVICE) for p in parameters(c // 2, hidden, out)]
    those[0][0, 0, 1, 1] = torch.nan
    a = state(n, c, height, width)[:, : c // 2].to(DEVICE)
    assert TRITON.trace(TRITON.fold(those, FLOAT), a, False)[0].isnan().all()


def test_tf32_is_used_where_pytorch_allows_it_and_is_no_worse_than_its_name(real_gpu):
    errors = {}
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        errors[allowed] = _error((4, 12, 64, 64, 128, 12), FLOAT)
    assert errors[False] < 3e-6 < errors[True] < 2e-3


def _error(shape, dtype):
    n, c, height, width, hidden, out = shape
    given = [p.to(DEVICE) for p in parameters(c // 2, hidden, out)]
    a = state(n, c, height, width).to(DEVICE)[:, : c // 2]
    h, _ = TRITON.trace(TRITON.fold(given, dtype), a, False)
    wide = [p.double() for p in given]
    exact, _ = network.network.trace(network.network.fold(wide, torch.float64), a.double(), False)
    return ((h.double() - exact).norm() / exact.norm()).item()


def test_same_bits_in_a_cuda_graph(real_gpu):
    n, c, height, width, hidden, out = LARGE[0]
    given = [p.to(DEVICE) for p in parameters(c // 2, hidden, out)]
    x, dh = (state(n, k, height, width, k).to(DEVICE) for k in (c, out))

    def run():
        folded = TRITON.fold(given, torch.bfloat16)
        h, kept = TRITON.trace(folded, x[:, : c // 2], True)
        g = torch.zeros_like(x)
        return [h, g, *TRITON.vjp(given, folded, x[:, : c // 2], kept, dh.bfloat16(), [True] * 9, g[:, : c // 2])]

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
