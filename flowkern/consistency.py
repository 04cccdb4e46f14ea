"""The data consistency of a fold, which draws an image towards those whose measurement is y.

Of an exact step, and of a gradient step, only image, measurement, weight and the operator's own tensors are kept for
backward, all of which exist anyway: the residual, Fourier coefficients and mirrored borders are made again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flowkern import ops, transforms
from flowkern.operators import OPERATORS, Identity, exact_consistency
from flowkern.operators.base import residual
from flowkern.replay import Applied


def gradient_step(operator, x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    """x - mu A^T (A x - y). x (N, C, H, W), y as `operator.forward` gives it, mu (). Differentiable.

    Raises ValueError for a y that does not fit.
    """
    if type(operator) is Identity:
        return ops.data_consistency(x, y, mu)
    return _recomputed(_gradient, operator, x, y, mu)


def exact_step(operator, x: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    """`flowkern.operators.exact_consistency`, kept for backward as the module says."""
    return _recomputed(exact_consistency, operator, x, y, rho)


def _gradient(operator, x: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    return x + mu * operator.adjoint(residual(operator, x, y))


def _recomputed(step: Callable, operator, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """step(operator, x, y, weight), computed again in backward; ordinary autograd for operators that may not do the
    same twice, and where torch.compile or torch.func would have to see through the recomputation.
    """
    if not is_pure(operator) or not torch.is_grad_enabled() or transforms.is_traced():
        return step(operator, x, y, weight)
    applied = Applied(partial(step, operator), [operator])
    tensors = dict(applied.named_parameters()) | dict(applied.named_buffers())

    # The tensors are arguments, so that backward has those of now, whatever mask the operator has by then.
    def run(x, y, weight, *values):
        return functional_call(applied, dict(zip(tensors, values, strict=True)), (x, y, weight))

    return checkpoint(run, x, y, weight, *tensors.values(), use_reentrant=False, preserve_rng_state=False)


def is_pure(operator) -> bool:
    """Whether an operator, and all that it is composed of, is of a kind that does the same when it is run again."""
    known = OPERATORS.get(type(operator).__name__) is type(operator)
    return known and all(map(is_pure, getattr(operator, "operators", ())))
