"""Parameter groups for optimizers with weight decay."""

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: kernels and matrices of coupling networks, split priors and contexts, which decay,
    and everything else, which doesn't.

    Of the rest, ActNorms, log-scales and the factors of the 1x1 convolutions fix the map's volume: pulling them towards
    zero is not a regularisation but a change of the model. Biases don't decay either, as usual.

    >>> import torch, flowkern
    >>> glow = flowkern.Glow((1, 4, 4), levels=1, depth=1, hidden=4)
    >>> adam = torch.optim.AdamW(parameter_groups(glow, weight_decay=0.01), lr=1e-3)
    """
    decayed, others = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (decayed if p.dim() >= 2 and name.rsplit(".", 1)[-1] not in ("lower", "upper") else others).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
