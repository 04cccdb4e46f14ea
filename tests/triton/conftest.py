"""The Triton kernels on CPU tensors, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests interpret the kernels: set TRITON_INTERPRET=1 (make triton does)")

sys.path.insert(0, str(Path(__file__).parents[1]))
