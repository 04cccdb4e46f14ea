"""The Triton kernels on CPU tensors, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests interpret the kernels: set TRITON_INTERPRET=1 (make triton does)")

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_configure(config):
    # Numbers beyond fp32 are part of some tests, and numpy, which interprets the kernels, remarks on them.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
