"""The `triton` backend: the kernels of flowkern.kernels, on NVIDIA and AMD GPUs.

Under TRITON_INTERPRET=1 it serves CPU tensors too, slowly: that is how it is tested without a GPU.
"""

import functools
import importlib
import importlib.util
import os

import torch

from flowkern.backend import OPS, Backend, register

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def probe() -> str | None:
    """None where the kernels can run, else one sentence that says why not."""
    if importlib.util.find_spec("flowkern.kernels") is None:
        return "flowkern is not installed (pip install -e .)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not (_INTERPRETED or torch.cuda.is_available()):
        return "torch finds no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    try:
        load()
    except Exception as error:  # whatever a broken or too old Triton raises while the kernels are declared
        return f"the kernels do not load: {type(error).__name__}: {error}"
    return None


def load():
    return importlib.import_module("flowkern.kernels")


register(
    Backend(
        "triton",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        probe=probe,
        load=load,
        # Measured on an H200 (docs/gpu.md): the coupling network is faster than cuDNN's convolutions. The other ops
        # serve where the CUDA kernels, which register after these, are not built.
        preferred={
            "cuda": (*OPS, "compose", "compose_vjp", "squeeze_mix", "network_fold", "network_trace", "network_vjp")
        },
        dtypes=(torch.float32,),
    )
)
