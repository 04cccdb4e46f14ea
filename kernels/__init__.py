"""Triton kernels: the ops of `flowkern.reference` on a GPU, and on CPU tensors under TRITON_INTERPRET=1.

`flowkern.triton` registers them as a backend; nothing else imports this package. States are fp32 and channels-last, the
coupling network's output fp32, bf16 or fp16. Every reduction is summed in an order that depends on the shapes alone.
"""

from flowkern.kernels.compose import compose, compose_vjp
from flowkern.kernels.couple import couple, couple_vjp
from flowkern.kernels.couple_mix import couple_mix, mix_couple
from flowkern.kernels.mix import channel_mix
from flowkern.kernels.mix_vjp import mix_vjp
from flowkern.kernels.network import network_fold, network_trace, network_vjp
from flowkern.kernels.pointwise import data_consistency, data_consistency_vjp, shrink, shrink_vjp
from flowkern.kernels.squeeze import squeeze_mix

__all__ = [
    "channel_mix",
    "compose",
    "compose_vjp",
    "couple",
    "couple_mix",
    "couple_vjp",
    "data_consistency",
    "data_consistency_vjp",
    "mix_couple",
    "mix_vjp",
    "network_fold",
    "network_trace",
    "network_vjp",
    "shrink",
    "shrink_vjp",
    "squeeze_mix",
]
