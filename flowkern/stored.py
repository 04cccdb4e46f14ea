"""What a module stores: its parameters by name, past nn.Module's own lookup, of which a level needs more than a
hundred, and whether anything hooks into its calls.
"""

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod


def parameters(module: nn.Module, *names: str) -> list[Tensor]:
    """`getattr(module, name)` for each name, several times as fast where the module itself stores a parameter of that
    name. Where it doesn't (parametrizations, replicas, tensors put in a parameter's place) it is asked as usual.

    Raises ValueError where one is pruned: what the mask leaves is computed by a hook on a call that nobody makes.
    """
    own = module._parameters
    return [own[name] if name in own else _other(module, name) for name in names]


def _other(module: nn.Module, name: str) -> Tensor:
    refuse_pruned(module)
    return getattr(module, name)


def refuse_pruned(*modules: nn.Module) -> None:
    """Raises ValueError where a module whose parameters are read, and that nobody calls, is pruned."""
    for module in modules:
        if pruned(module):
            raise ValueError(
                f"a parameter of an {type(module).__name__} is pruned, which is read and not called: make it final "
                f"(torch.nn.utils.prune.remove), or prune the coupling networks' kernels"
            )


def hooked(module: nn.Module) -> bool:
    """Whether a hook waits for calls of the module: one that reads activations, or prunes or normalises weights."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks)


def pruned(module: nn.Module) -> bool:
    """Whether a hook of `torch.nn.utils.prune` is among them."""
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
