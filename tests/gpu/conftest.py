"""What only a GPU shows: `pytest tests/gpu`, which `make gpu` runs.

FLOWKERN_TEST_DEVICE=cpu and TRITON_INTERPRET=1 try the tests themselves on a machine without one.
"""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture
def real_gpu():
    from gpu_device import DEVICE

    if DEVICE.type != "cuda":
        pytest.skip("a trial of the tests on the CPU: this one needs CUDA's own functions")
