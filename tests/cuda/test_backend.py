"""The Python side of the backend: what it refuses before a launch, and how a failed launch reads."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from pixel_cases import DOUBLE, FLOAT, Inputs, arguments

import flowkern
from flowkern import backend as backends
from flowkern import cuda

DTYPE = "expected torch.float32 on cpu throughout, got torch"
MISTAKES = [
    ("channel_mix", 1, torch.float64, f"channel_mix: {DTYPE}.float64 on cpu"),
    ("couple", 1, torch.float64, "couple: h must be torch.float32 or torch.bfloat16 or torch.float16 on cpu, got"),
    ("couple_mix", 3, torch.bfloat16, f"couple_mix: {DTYPE}.bfloat16 on cpu"),
    ("couple_vjp", 3, torch.float64, f"couple_vjp: {DTYPE}.float64 on cpu"),
    ("mix_vjp", 0, torch.float16, "mix_vjp: a state must be float32 or float64, got torch.float16"),
    ("shrink_vjp", 1, torch.float64, f"shrink_vjp: {DTYPE}.float64 on cpu"),
]


@pytest.mark.parametrize("op,position,dtype,sentence", MISTAKES)
def test_wrong_dtype(backend, op, position, dtype, sentence):
    _, args = next(iter(arguments(op, (1, 4, 2, 2), FLOAT, FLOAT)))
    args = [a.to(dtype) if i == position else a for i, a in enumerate(args)]
    with pytest.raises(ValueError, match=sentence):
        getattr(backend, op)(*args)


@pytest.mark.parametrize("op", [op for op in backends.OPS if op != "shrink"])
def test_tensors_on_different_devices(backend, op):
    _, args = next(iter(arguments(op, (1, 4, 2, 2), FLOAT, FLOAT)))
    args = [a.to("meta") if i == 1 else a for i, a in enumerate(args)]
    with pytest.raises(ValueError, match=f"{op}: .* on cpu.*, got torch.float32 on meta"):
        getattr(backend, op)(*args)


def test_reductions_go_to_dense_memory(backend):
    make = Inputs((1, 4, 2, 2), FLOAT, FLOAT)
    into = torch.empty(4, 4).T[:, :], torch.empty(8)[::2]
    with pytest.raises(ValueError, match="mix_vjp: `into` must be dense tensors"):
        backend.mix_vjp(make.state(), make.state(), *make.mix(), into=into)


def test_failed_launch_names_op_and_shapes(backend, monkeypatch):
    """cudaSetDevice of a device that isn't there, which is where a launch fails on a machine without a GPU as well."""
    monkeypatch.setattr(cuda, "_device_and_stream", lambda x: (7, 0))
    make = Inputs((2, 6, 3, 5), FLOAT, FLOAT)
    sentence = r"could not launch channel_mix on \(2, 6, 3, 5\) float32, \(6, 6\) float32: cudaErrorInvalidValue: "
    with pytest.raises(RuntimeError, match=sentence):
        backend.channel_mix(make.state(), *make.mix()[::2])


def test_memory_that_runs_out_is_no_failed_launch(backend, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    make = Inputs((2, 6, 3, 5), FLOAT, FLOAT)
    state, mixing = make.state(), make.mix()
    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        backend.channel_mix(state, *mixing[::2])


def test_chosen_by_name(backend, monkeypatch):
    """An explicit choice that can't run says why; one that can serves both precisions of states."""
    if (why := cuda.probe()) is not None:
        with pytest.raises(RuntimeError, match="backend 'cuda' can't run here: "), flowkern.use_backend("cuda"):
            pass
        assert flowkern.backends()["cuda"] == why
    for dtype in (FLOAT, DOUBLE):
        assert backends.table(torch.device("cuda"), "cuda", dtype).couple is cuda.couple


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_extension_runs_its_cpu_part_without_a_driver():
    """Built by nvcc, it imports and serves the CPU; its kernels say what is missing."""
    built = flowkern.cpp.build_config()
    if built["cuda"] is None:
        assert shutil.which("nvcc") is None, f"nvcc is here and the kernels are not: {built['cuda_missing']}"
        pytest.skip("nvcc is not on this machine")
    x, matrix, offset = torch.ones(1, 2, 2, 2), torch.eye(2), torch.zeros(2)
    assert torch.equal(flowkern.cpp.channel_mix(x, matrix, offset), x)
    from flowkern import _C

    assert _C.cuda.runtime_error()
    with pytest.raises(RuntimeError, match="cudaError(InsufficientDriver|NoDevice|StubLibrary|InitializationError)"):
        _C.cuda.mix(0, 0, 0, 4, 2, False, x.data_ptr(), matrix.data_ptr(), 2, 1, offset.data_ptr(), x.data_ptr())


def test_a_runtime_that_finds_no_device_where_torch_finds_one_is_told(monkeypatch):
    """The extension's own, of another version than torch's, under a driver that is too old for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flowkern.cpp, "build_config", lambda: {"cuda": "80 90"})
    monkeypatch.setattr(cuda, "_native", lambda: SimpleNamespace(runtime_error=lambda: "driver is too old"))
    assert "built with finds no device, though torch's does: driver is too old" in cuda.probe.__wrapped__()
    monkeypatch.setattr(cuda, "_native", lambda: SimpleNamespace(runtime_error=lambda: ""))
    assert cuda.probe.__wrapped__() is None
