"""Which transforms of torch.func, or forward-mode differentiation, are at work.

The chain's operators are opaque to vmap and have no forward-mode derivative. In memory="store" the chain can run as
plain PyTorch, which has both.
"""

import torch
from torch._C._functorch import get_interpreter_stack
from torch.autograd import forward_ad

# torch.autograd.grad(..., is_grads_batched=True) has a vmap of its own, which isn't one of torch.func's.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


def batched_or_forward() -> bool:
    """Whether this runs under vmap, as backward does for a batch of gradients, or under forward-mode differentiation
    (jvp, jacfwd, dual levels).
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._dispatch_tls_is_dispatch_key_included(_VMAP):
        return True
    stack = get_interpreter_stack() or []
    return forward_ad._current_level >= 0 or any(level.key().name in ("Vmap", "Jvp") for level in stack)


def is_transformed() -> bool:
    """Whether this runs under any transform of torch.func, or under forward-mode differentiation."""
    return batched_or_forward() or bool(get_interpreter_stack())


def is_traced() -> bool:
    """Whether torch.compile or a transform of torch.func would have to see through what is computed again."""
    return torch.compiler.is_compiling() or is_transformed()
