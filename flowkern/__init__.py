"""flowkern: Glow normalizing flows that train deep in little memory, and the unfolded denoiser built on them."""

import torch  # noqa: F401  first: the native extension uses the OpenMP runtime that torch has loaded

from flowkern import cpp, cuda, distributions, operators, ops, triton  # noqa: F401  backends register themselves
from flowkern.backend import backends, use_backend
from flowkern.glow import Glow
from flowkern.map import map_estimate
from flowkern.prox import GlowProx, ResNetProx, UNetProx
from flowkern.sequence import ReversibleSequence
from flowkern.unfolded import Unfolded

__version__ = "0.1.0"
__all__ = ["Glow", "GlowProx", "ResNetProx", "ReversibleSequence", "UNetProx", "Unfolded", "backends", "distributions",
           "map_estimate", "operators", "ops", "use_backend"]
