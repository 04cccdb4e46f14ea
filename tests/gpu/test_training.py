"""Training steps on the GPU: gradients, memory, no waiting for the device, CUDA graphs, torch.compile."""

import copy

import pytest
import torch
from gpu_device import DEVICE
from helpers import MODES, VARIANTS, gradients, relative, small_glow

import flowkern

KERNELS = [name for name in ("triton", "cuda") if flowkern.backends().get(name) is True]
SIZE = (3, 16, 16)


def glow_on_device(**options):
    return small_glow(SIZE, levels=2, depth=3, hidden=16, dtype=torch.float32, **options).to(DEVICE)


@pytest.fixture(autouse=True)
def full_precision_networks():
    """cuDNN and matrix products without tf32, so that fp32 means fp32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory,anchor_every", MODES)
@pytest.mark.parametrize("backend", [*KERNELS, "auto", "reference"])
def test_gradients_in_every_mode(backend, variant, memory, anchor_every):
    options = {"memory": memory, "anchor_every": anchor_every, **VARIANTS[variant]}
    x = torch.rand(2, *SIZE, device=DEVICE)
    mine = gradients_of_both_directions(glow_on_device(backend=backend, **options), x)
    same = gradients_of_both_directions(glow_on_device(backend="reference", **options), x)
    exact = gradients_of_both_directions(glow_on_device(backend="reference", **options).double(), x.double())
    error, reference_error = (
        max(relative(g.double(), w) for g, w in zip(found, exact, strict=True)) for found in (mine, same))
    assert error <= 3 * reference_error + 1e-5


def gradients_of_both_directions(glow, x):
    z = glow(x)[0].detach()
    parameters = list(glow.parameters())

    def on_device(function):
        def run(given):
            out, logdet = function(given)
            return out.cpu(), logdet.cpu()      # the functional that is differentiated is drawn on the CPU

        return run

    inverse = on_device(lambda z: glow.inverse(z, return_logdet=True))
    return [*gradients(on_device(glow), x, parameters), *gradients(inverse, z, parameters)]


@pytest.mark.parametrize("backend", [*KERNELS, "auto"])
def test_same_bits_again(backend):
    torch.backends.cudnn.deterministic = True
    try:
        glow = glow_on_device(backend=backend)
        x = torch.rand(4, *SIZE, device=DEVICE)
        runs = [torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters())) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.backends.cudnn.deterministic = False


def test_inverse_in_double_precision():
    glow = glow_on_device().double()
    x = torch.rand(2, *SIZE, device=DEVICE, dtype=torch.float64)
    assert (glow.inverse(glow(x)[0]) - x).abs().max() < 1e-10


@pytest.mark.parametrize("backend", [*KERNELS, "auto"])
def test_a_step_never_waits_for_the_device(backend, real_gpu):
    glow = glow_on_device(backend=backend)
    x = torch.rand(4, *SIZE, device=DEVICE)
    (-glow.log_prob(x).mean()).backward()       # kernels are compiled and handles made on first use
    glow.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (-glow.log_prob(x).mean()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [*KERNELS, "auto"])
@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_a_whole_training_step_in_a_cuda_graph(backend, memory, real_gpu):
    glow = glow_on_device(backend=backend, memory=memory)
    plain = copy.deepcopy(glow)
    optimizer, plain_optimizer = (torch.optim.Adam(g.parameters(), lr=1e-3, capturable=True) for g in (glow, plain))
    x = torch.rand(4, *SIZE, device=DEVICE)

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(glow, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step(glow, optimizer)
    for _ in range(3):
        step(plain, plain_optimizer)
    for seed in range(3):
        x.copy_(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        loss = step(plain, plain_optimizer)
        torch.testing.assert_close(captured, loss, rtol=1e-4, atol=1e-3)
    for p, q in zip(glow.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


def peak(run):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", [*KERNELS, "auto"])
def test_compiled_whole_with_the_same_numbers_and_memory(backend, real_gpu):
    glow = glow_on_device(backend=backend)
    x = torch.rand(16, *SIZE, device=DEVICE)
    compiled = torch.compile(glow.log_prob, fullgraph=True)
    found = []
    for log_prob in (glow.log_prob, compiled):
        for _ in range(2):
            glow.zero_grad(set_to_none=True)
            used = peak(lambda f=log_prob: (-f(x).mean()).backward())
        found.append((log_prob(x).detach(), [p.grad.clone() for p in glow.parameters()], used))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-4, atol=1e-4)
    assert found[1][2] <= 1.1 * found[0][2] + (1 << 20)


def test_peak_memory_is_flat_in_depth(real_gpu):
    x = torch.rand(8, 3, 64, 64, device=DEVICE)

    def used(depth, memory):
        torch.manual_seed(0)
        glow = flowkern.Glow((3, 64, 64), levels=2, depth=depth, hidden=64, memory=memory).to(DEVICE)
        glow.initialize(x)
        (-glow.log_prob(x).mean()).backward()
        parameters = sum(p.numel() * p.element_size() for p in glow.parameters())
        glow.zero_grad(set_to_none=True)
        return peak(lambda: (-glow.log_prob(x).mean()).backward()) - parameters     # gradients are as large

    shallow, deep, stored = used(4, "recompute"), used(32, "recompute"), used(32, "store")
    assert deep <= 1.1 * shallow + (1 << 20)
    assert deep <= stored / 8


def test_autocast_reaches_the_network_alone():
    glow = glow_on_device()
    x = torch.rand(2, *SIZE, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        z, logdet = glow(x)
    assert z.dtype == logdet.dtype == torch.float32
    low = glow_on_device(compute_dtype=torch.bfloat16)
    torch.testing.assert_close(z, low(x)[0], rtol=0, atol=0)
    assert (z - glow(x)[0]).abs().max() > 0
