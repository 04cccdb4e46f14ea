"""Measurement operators A of `y = A x + noise`, on images x (N, C, H, W).

To flowkern, an operator is any object with `forward(x) -> A x` and `adjoint(y) -> A^T y`, both differentiable. One with
learnt parameters may be a module; it is then trained along. The operators here are modules that offer more: their
norm, the exact solution of the regularised normal equations where there is one, and a configuration to be saved by.
"""

from flowkern.operators.base import OPERATORS, Operator, exact_consistency, from_config
from flowkern.operators.blur import Blur, gaussian_kernel
from flowkern.operators.compose import Compose
from flowkern.operators.downsample import Downsample
from flowkern.operators.pointwise import Identity, Inpainting
from flowkern.operators.projection import RandomProjection
from flowkern.operators.smooth import least_variation, smoothest

OPERATORS.update({kind.__name__: kind for kind in (Identity, Inpainting, Blur, Downsample, RandomProjection, Compose)})

__all__ = ["OPERATORS", "Blur", "Compose", "Downsample", "Identity", "Inpainting", "Operator", "RandomProjection",
           "exact_consistency", "from_config", "gaussian_kernel", "least_variation", "smoothest"]
