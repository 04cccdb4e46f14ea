"""Shared fixtures: every backend that can run here, a seed for each test, and memory that is handed out poisoned."""

import zlib

import pytest
import torch

import flowkern

RUNNABLE = [name for name, state in flowkern.backends().items() if state is True]


def pytest_configure(config):
    # Most tensors here are tiny: a second thread only waits, and on a busy machine it waits long.
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for what files make while they are collected
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty and its relatives as they are in this test")


@pytest.fixture(params=RUNNABLE)
def backend(request):
    """The name of each backend that can run on this machine, in turn."""
    return request.param


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2"])
def wide_isa(request):
    """Each instruction set that has native coupling networks and that this machine has, in use."""
    from helpers import instruction_set

    if request.param not in flowkern.cpp.build_config()["isa_supported"]:
        pytest.skip(f"this machine has no {request.param}")
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures to train on, see `train_cases`."""
    import train_cases

    return train_cases.draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """The folder of one whole training run, to be read only."""
    import train_cases

    from train import run

    return run.prepare(train_cases.tiny(pictures, tmp_path_factory.mktemp("runs") / "whole")).train()


def _poison(tensor):
    """NaN, or for integers the lowest value, in everything that was promised to no one."""
    if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor) or "out" in kwargs:
            return tensor
        return _poison(tensor)

    return wrapper


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws numbers of its own, the same in every run and in any order: what fails can be seen again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """What torch.empty, empty_like, empty_strided, Tensor.new_empty and new_empty_strided return holds NaN, so that a
    kernel that leaves a number unwritten can't pass by luck."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
                        (torch.Tensor, "new_empty_strided")]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
