"""Parameter groups for optimizers with weight decay."""

from torch import nn

from flowkern.layers import InvertibleConv1x1
from flowkern.operators import Operator
from flowkern.prior import Prior


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: kernels and matrices of coupling networks, split priors and contexts, which decay,
    and everything else, which doesn't.

    Of the rest, ActNorms, log-scales and the factors of the 1x1 convolutions fix the map's volume, constants of priors
    where latents lie, and what an operator learns is how images were measured: pulling them towards zero is not a
    regularisation but a change of the model. Biases don't decay either, as usual.

    >>> import torch, flowkern
    >>> glow = flowkern.Glow((1, 4, 4), levels=1, depth=1, hidden=4)
    >>> adam = torch.optim.AdamW(parameter_groups(glow, weight_decay=0.01), lr=1e-3)
    """
    kept = {
        id(p)
        for part in module.modules()
        for name, p in part.named_parameters(recurse=False)
        if isinstance(part, InvertibleConv1x1 | Operator) or (isinstance(part, Prior) and name == "map")
    }
    decayed, others = [], []
    for p in module.parameters():
        if p.requires_grad:
            (decayed if p.dim() >= 2 and id(p) not in kept else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
