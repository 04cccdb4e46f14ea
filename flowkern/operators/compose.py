"""Operators one after the other."""

from torch import Tensor, nn

from flowkern.operators.base import Operator, check_operator, from_config


class Compose(Operator):
    """Compose(A1, A2, ...): A = A1 A2 ..., a product of matrices as it is written, so that the last is applied first.

    `Compose(Inpainting(mask), Blur(kernel))` blurs an image and then loses pixels of it.

    operators: one or more objects with `forward` and `adjoint`, of this package or the user's own. There is no
    `normal_inverse` or `prox`, and `config` only if all of them have one and none that learns is there twice.

    Raises ValueError without operators, TypeError for what is no operator.
    """

    def __init__(self, *operators):
        super().__init__()
        if not operators:
            raise ValueError("Compose wants at least one operator, got none")
        for operator in operators:
            check_operator(operator, "operators")
        self.operators = operators
        for index, operator in enumerate(operators):
            if isinstance(operator, nn.Module):
                self.add_module(str(index), operator)

    @property
    def size(self) -> tuple[int, int, int] | None:
        """That of the first operator to meet the image that is made for one size, with as many channels as any asks
        for.
        """
        scale = 1
        sizes = [size for operator in self.operators if (size := getattr(operator, "size", None)) is not None]
        for operator in reversed(self.operators):
            if getattr(operator, "size", None) is not None:
                _, height, width = operator.size
                return max(size[0] for size in sizes), scale * height, scale * width
            scale *= getattr(operator, "factor", 1)
        return (1, 64 * scale, 64 * scale)  # any that all their factors divide

    @property
    def images(self) -> int:
        return max(getattr(operator, "images", 1) for operator in self.operators)

    @property
    def config(self) -> dict:
        learnt = [o for o in self.operators if isinstance(o, nn.Module) and any(True for _ in o.parameters())]
        if len(set(map(id, learnt))) < len(learnt):
            raise ValueError("Compose has an operator twice that learns, which a saved configuration can't say")
        return super().config | {"operators": [operator.config for operator in self.operators]}

    @classmethod
    def from_config(cls, config: dict) -> "Compose":
        return cls(*map(from_config, config["operators"]))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> A x, of the shape that the first operator gives."""
        for operator in reversed(self.operators):
            x = operator.forward(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y, of the shape of A x -> A^T y (N, C, H, W)."""
        for operator in self.operators:
            y = operator.adjoint(y)
        return y
