"""What only a GPU shows: `pytest tests/gpu` (make gpu runs it). FLOWKERN_TEST_DEVICE=cpu tries the tests themselves, with
TRITON_INTERPRET=1, on a machine without one."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
DEVICE = torch.device(os.environ.get("FLOWKERN_TEST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def real_gpu():
    if DEVICE.type != "cuda":
        pytest.skip("a trial of the tests on the CPU: this one needs CUDA's own functions")
