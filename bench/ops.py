"""The pixel ops as benchmark cases: arguments, and what each must move and compute.

Arithmetic is counted as a mix's products and a coupling's elementary functions at `ELEMENTARY` operations each, which
is what a polynomial exponential in single precision takes: the bound is what the operation needs, whoever computes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern import reference

OPS = ("channel_mix", "couple", "couple_mix", "mix_couple", "couple_vjp", "mix_vjp", "shrink", "data_consistency")
LEVELS = ((12, 8, 32), (24, 8, 16), (48, 8, 8))         # channels, batch, side: the levels of 64x64 images
LARGER = ((12, 16, 32), (24, 16, 32), (48, 16, 32))
ELEMENTARY = 20
_POINTWISE = {"shrink": 1, "data_consistency": 3}       # operations a number
_FUNCTIONS = {"softclamp": 2, "sigmoid": 1}             # exponentials an element of the transformed half


@dataclass(frozen=True)
class Case:
    """An op on a state of `batch` images of side x side pixels."""

    op: str
    channels: int
    batch: int
    side: int
    scale: str = "softclamp"

    def __str__(self) -> str:
        size = f"C={self.channels} P={self.batch}x{self.side}x{self.side}"
        return f"{self.op} {size}" + ("" if self.scale == "softclamp" else f" {self.scale}")

    @property
    def pixels(self) -> int:
        return self.batch * self.side**2

    def bytes(self) -> int:
        """Read and written, each operand once: states and (raw_s, t), single precision."""
        states = {"channel_mix": 2, "couple": 3, "couple_mix": 3, "mix_couple": 3, "couple_vjp": 6, "mix_vjp": 4,
                  "shrink": 2, "data_consistency": 3}
        return 4 * states[self.op] * self.channels * self.pixels

    def flops(self) -> int:
        if self.op in _POINTWISE:
            return self.pixels * self.channels * _POINTWISE[self.op]
        mixes = {"channel_mix": 1, "couple_mix": 1, "mix_couple": 1, "mix_vjp": 3}.get(self.op, 0)
        couplings = ELEMENTARY * _FUNCTIONS[self.scale] + (14 if self.op == "couple_vjp" else 6)
        coupled = 0 if self.op in ("channel_mix", "mix_vjp") else couplings * self.channels // 2
        return self.pixels * (mixes * 2 * self.channels**2 + coupled)

    def arguments(self) -> tuple:
        """In channels-last memory, as the reference's function takes them; the same every time."""
        torch.manual_seed(self.channels)
        shape = (self.batch, self.channels, self.side, self.side)
        x, g, h = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
        matrix = torch.linalg.qr(torch.randn(self.channels, self.channels))[0].contiguous()
        offset, glogdet = torch.randn(self.channels), torch.randn(self.batch)
        scale = (self.scale, 1.0)
        return {
            "channel_mix": (x, matrix, offset),
            "couple": (x, h, *scale),
            "couple_mix": (x, h, matrix, offset, *scale),
            "mix_couple": (x, h, matrix.mT.contiguous(), offset, *scale),
            "couple_vjp": (x, g, h, glogdet, *scale),
            "mix_vjp": (x, g, matrix, matrix.mT.contiguous(), offset),
            "shrink": (x, torch.tensor(0.1)),
            "data_consistency": (x, g, torch.tensor(0.4)),
        }[self.op]

    def exact(self) -> list[Tensor]:
        """The results in double precision."""
        doubles = (a.double() if isinstance(a, Tensor) else a for a in self.arguments())
        return list(tensors(getattr(reference, self.op)(*doubles)))

    def error(self, results) -> float:
        """The largest |r - r64| / |r64| among the results."""
        return largest_error(tensors(results), self.exact())


def largest_error(results, exact) -> float:
    """The largest |r - r64| / |r64| among pairs of tensors; NaN if one is, which Python's max passes over."""
    pairs = zip(results, exact, strict=True)
    return torch.stack([(r.double() - e).norm() / e.norm() for r, e in pairs if e.numel()]).max().item()


def cases(full: bool) -> list[Case]:
    scales = ("softclamp", "sigmoid") if full else ("softclamp",)
    return [Case(op, *size, scale) for op in OPS for size in (*LEVELS, *LARGER) for scale in scales
            if scale == "softclamp" or "couple" in op]


def tensors(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
