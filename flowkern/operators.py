"""Measurement operators A of `y = A x + noise`.

An operator is any object with `forward(x) -> A x` and `adjoint(y) -> A^T y`, both differentiable. `Unfolded` asks for
nothing else. An operator with learnt parameters may be a module; it is then trained along.
"""

from torch import Tensor


class Identity:
    """A = I: denoising (Wei et al., equation 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> x."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y of any shape -> y."""
        return y
