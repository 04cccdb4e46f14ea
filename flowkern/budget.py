"""How many steps `memory="recompute"` keeps within a budget of bytes: the one place that knows what memory they take.

A level runs as two chains: its first steps in running order are recomputed, its last ones stored, so that what was
stored is freed before the recomputation begins, and that starts from an exact state. Which steps are stored is one
fixed order, by network evaluations saved per byte; a budget takes as much of it as fits, so a larger one never keeps
less. What fits is told by a model of the peak, from sizes alone, whose constants are upper bounds measured on
allocations (`tests/test_memory.py`).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from flowkern import backend as backends

# The working memory of one step's backward, in tensors: states with their gradients, (raw_s, t) with its gradient, and
# hidden activations with their gradients: two activations if they are not stored, and a gradient or two.
STATES, OUTPUTS, HIDDEN_RECOMPUTED, HIDDEN_STORED = 6, 2, 3, 2
# Where the network runs in tiles there are no such gradients, and each thread recomputes both activations of some
# images at a time, of so many pixels together or of one: in blocks of pixels, and longer rows by so many bytes. Numbers
# may be single precision whatever the network's, for processors that multiply those faster.
REPLAYED, BLOCK, LONGER = 512, 32, 192
# Beside them: folded weights, their gradients and the convolutions' scratch, in copies of one step's weights, of which
# there are two a thread too, and three where each has so many pixels that sums over them are divided; a share of the
# tensors, and a constant.
WEIGHTS, DIVIDED, SCRATCH, CONSTANT = 3, 1024, 1 / 16, 512 << 10
# By Winograd a 3x3 convolution's weights become so many numbers instead of nine, or fewer, and their gradients so many.
POINTS, SUMMED = 24, 16
# Where PyTorch has no oneDNN convolution for a precision it unfolds what 3x3 ones read, into nine copies.
UNFOLDED = 9
# Held whatever is kept: images, latents and the splits' parts, in states of each level, and more of them with learned
# priors; and bookkeeping of each step.
HELD_STATES, HELD_BY_PRIORS, BOOKKEEPING = 3, 3, 8 << 10
# Composing the mixes of a level: its matrices, in double precision.
MIXES = 8


class Level(NamedTuple):
    """What the memory of a level depends on."""

    depth: int
    images: int
    pixels: int  # of all images
    channels: int
    outputs: int  # of the coupling network
    hidden: int
    state_bytes: int  # of a number
    network_bytes: int
    learned_prior: bool

    @property
    def state(self) -> int:
        return self.pixels * self.channels * self.state_bytes

    @property
    def kept(self) -> int:
        """Bytes of a stored step: its input, (raw_s, t) and two hidden activations."""
        return self.state + self.pixels * (self.outputs + 2 * self.hidden) * self.network_bytes

    @property
    def weights(self) -> int:
        """Numbers in a step's convolutions, which are also the multiplications for a pixel."""
        return self._weights(9)

    def _weights(self, taps: int) -> int:
        return self.hidden * (taps * (self.channels // 2 + self.outputs) + self.hidden)

    @property
    def held(self) -> int:
        """Upper bound of what is held if nothing is kept."""
        states = HELD_STATES + HELD_BY_PRIORS * self.learned_prior
        return states * self.state + BOOKKEEPING * self.depth

    def working(self, stored: bool, machine: "Machine") -> int:
        """Upper bound of what backward of a step allocates beyond what is held."""
        outputs = OUTPUTS * self.outputs * self.pixels * self.network_bytes
        tensors = STATES * self.state + outputs + self._hidden_working(stored, machine)
        of_threads = machine.threads * (3 if self.pixels >= DIVIDED * machine.threads else 2)
        points, summed = (POINTS, SUMMED) if machine.tiled else (9, 9)
        weights = (WEIGHTS * self._weights(points) + of_threads * self._weights(summed)) * self.state_bytes
        mixes = MIXES * self.depth * self.channels**2 * 8
        return max(int((1 + SCRATCH) * tensors) + weights, mixes) + CONSTANT

    def _hidden_working(self, stored: bool, machine: "Machine") -> int:
        """Of it, hidden activations and their gradients."""
        if machine.tiled:
            # An image's bands of rows, of 129 pixels or more unless it is smaller, are whole blocks each.
            rows = -(self.pixels // max(self.images, 1) * 5 // -(4 * BLOCK)) * BLOCK
            rows = min(machine.threads * max(REPLAYED, rows), self.images * rows)
            return 0 if stored else 2 * rows * (self.hidden * self.state_bytes + LONGER)
        number = self.hidden * self.network_bytes
        return self.pixels * number * ((HIDDEN_STORED if stored else HIDDEN_RECOMPUTED) + machine.copies)


class Machine(NamedTuple):
    """What the coupling network's working memory depends on."""

    threads: int
    copies: int  # of hidden activations
    tiled: bool

    @classmethod
    def running(cls, device: torch.device, backend: str, parameters: torch.dtype, dtype: torch.dtype) -> "Machine":
        """This one, for networks in `dtype` by a resolved backend."""
        tiled = backends.table(device, backend, parameters).network_tiled(parameters, dtype)
        unfolded = not (tiled or device.type != "cpu" or multiplied_by_onednn(dtype))
        return cls(torch.get_num_threads(), UNFOLDED if unfolded else 0, tiled)


def multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions and products of this dtype for this CPU: PyTorch's own take far longer."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def peak(levels: tuple[Level, ...], kept: tuple[int, ...], anchor_every: int, reverse: bool, machine: Machine) -> int:
    """Upper bound of the allocated bytes at the peak of a training step that stores `kept` steps of each level."""
    held, highest = sum(level.held for level in levels), 0
    # In running order: backward of a level meets what was kept before it, and of its own steps the stored ones first.
    for level, stored in reversed(list(zip(levels, kept, strict=True))) if reverse else zip(levels, kept, strict=True):
        recomputed = level.depth - stored
        if anchor_every and recomputed:
            held += (recomputed - 1) // anchor_every * level.state
        if recomputed:
            highest = max(highest, held + level.working(False, machine))
        held += stored * level.kept
        if stored:
            highest = max(highest, held + level.working(True, machine))
    return highest


def plans(levels: tuple[Level, ...]) -> Iterator[tuple[int, ...]]:
    """How many steps of each level are stored, from none to all: one more each time, of the level that saves most
    multiplications per byte.
    """
    kept = [0] * len(levels)
    yield tuple(kept)
    by_worth = sorted(range(len(levels)), key=lambda i: levels[i].kept / (levels[i].pixels * levels[i].weights or 1))
    for i in by_worth:
        for _ in range(levels[i].depth):
            kept[i] += 1
            yield tuple(kept)


@torch.compiler.assume_constant_result
def plan(
    levels: tuple[tuple, ...], budget: int, anchor_every: int, reverse: bool, device: torch.device, backend: str,
    parameters_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[int, ...]:
    """How many steps of each level to store: the last of `plans` that stays within the budget, else none.

    levels: the fields of `Level`, in plain tuples, which torch.compile can evaluate. backend: resolved. dtype: the
    networks' precision.
    """
    known = tuple(Level(*fields) for fields in levels)
    machine = Machine.running(device, backend, parameters_dtype, dtype)
    return _plan(known, budget, anchor_every, reverse, machine)


@lru_cache(maxsize=256)
def _plan(
    levels: tuple[Level, ...], budget: int, anchor_every: int, reverse: bool, machine: Machine
) -> tuple[int, ...]:
    best, *others = plans(levels)
    for kept in others:
        if peak(levels, kept, anchor_every, reverse, machine) <= budget:
            best = kept
    return best
