"""Parameter groups for optimizers with weight decay."""

from torch import nn

from flowkern.layers import InvertibleConv1x1
from flowkern.operators import Operator
from flowkern.prior import Prior
from flowkern.unfolded import Unfolded


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
    kept = set()
    for part in module.modules():
        if isinstance(part, InvertibleConv1x1 | Operator):
            kept.update(map(id, part.parameters()))
        if isinstance(part, Unfolded) and isinstance(part.operator, nn.Module):
            kept.update(map(id, part.operator.parameters()))
        if isinstance(part, Prior) and part.map is not None:
            kept.add(id(part.map))
    decayed, others = [], []
    for p in module.parameters():
        if p.requires_grad:
            (decayed if p.dim() >= 2 and id(p) not in kept else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
