"""Every pixel op of the CUDA kernels, executed on the CPU, against the specification."""

import pytest
import torch
from pixel_cases import COUPLINGS, DOUBLE, FLOAT, PRECISIONS, SPREADS, arguments, compare, results

from flowkern import backend as backends
from flowkern import reference

SHAPES = ((1, 2, 1, 1), (3, 4, 1, 1), (2, 6, 5, 3), (3, 10, 1, 7), (1, 12, 9, 11), (2, 24, 5, 13), (1, 48, 7, 9),
          (2, 96, 3, 7), (2, 34, 4, 8), (1, 192, 3, 2))


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_op_against_reference(backend, op, precision):
    if op in COUPLINGS:
        for spread in SPREADS.values():
            compare(backend, op, precision, spread, SHAPES)
    elif precision in ("fp32", "fp64"):
        compare(backend, op, precision, 1.0, ((2, 3, 4, 5), *SHAPES))
