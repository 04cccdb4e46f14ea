"""What a module stores: its parameters by name, past nn.Module's own lookup, of which a level needs more than a
hundred, and whether anything hooks into its calls.
"""

from torch import Tensor, nn


def parameters(module: nn.Module, *names: str) -> list[Tensor]:
    """`getattr(module, name)` for each name, several times as fast where the module itself stores a parameter of that
    name. Where it doesn't (parametrizations, replicas, tensors put in a parameter's place) it is asked as usual.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def hooked(module: nn.Module) -> bool:
    """Whether a hook waits for calls of the module: one that reads activations, or prunes or normalises weights."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks)
