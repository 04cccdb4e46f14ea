"""A picture of any size through a network for small ones: overlapping tiles, blended so that no seam shows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# A network that squeezes or pools sees the same picture differently when it is shifted by less than this: tiles start
# at multiples of it, so that each of them is the whole picture's result but for its own borders.
GRID = 16


def grid(net: nn.Module) -> int:
    """What heights, widths and positions of tiles must be multiples of, for an `Unfolded`: of `GRID` at least."""
    return math.lcm(GRID, net.proxes[0].multiple)


def check(tile: int, overlap: int, batch: int, multiple: int = GRID) -> None:
    """Raise ValueError in one sentence for sizes, in pixels, that `denoise_tiled` can't work with."""
    if tile < 1 or tile % multiple:
        raise ValueError(f"tile must be a positive multiple of {multiple} for this network, got {tile}")
    if not 0 <= overlap <= tile - multiple:
        raise ValueError(f"overlap must be 0 to {tile - multiple} for tiles of {tile} pixels, got {overlap}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def starts(size: int, tile: int, overlap: int, multiple: int = GRID) -> list[int]:
    """Where tiles start along a side of `size` pixels: as few as overlap by at least `overlap`, evenly spread.

    The last one ends where `size`, rounded up to a multiple of `multiple`, does.
    """
    steps = -(-max(size - tile, 0) // multiple)
    gaps = -(-steps // ((tile - overlap) // multiple))
    return [i * steps // gaps * multiple for i in range(gaps)] + [steps * multiple]


def weights(size: int, tile: int, overlap: int, multiple: int = GRID) -> Tensor:
    """The share of each tile in each pixel along a side of `size` pixels, (tiles, min(tile, size rounded up)), float64.

    At each pixel of the picture the shares of all tiles add up to one. Where a tile meets another, its outermost
    quarter of the overlap counts for nothing, because there the network saw a border that the picture doesn't have;
    from there its share rises smoothly. Pixels beyond the picture have the share 0.
    """
    first = starts(size, tile, overlap, multiple)
    length = min(tile, -(-size // multiple) * multiple)
    margin = overlap // 4
    distance = torch.arange(length, dtype=torch.float64) + 0.5 - margin
    rise = torch.sin(math.pi / 2 * (distance / max(overlap - 2 * margin, 1)).clamp(0, 1)) ** 2
    shares = torch.ones(len(first), length, dtype=torch.float64)
    shares[1:] *= rise
    shares[:-1] *= rise.flip(0)
    total = torch.zeros(first[-1] + length, dtype=torch.float64)
    for start, share in zip(first, shares, strict=True):
        total[start : start + length] += share
    for start, share in zip(first, shares, strict=True):
        share /= total[start : start + length]
        share[max(size - start, 0) :] = 0
    return shares


@torch.no_grad()
def denoise_tiled(
    net: nn.Module,
    image: Tensor,
    tile: int = 256,
    overlap: int = 64,
    batch: int = 4,
    progress: Callable = lambda batches, total: batches,
    multiple: int = GRID,
    **known: float,
) -> Tensor:
    """What `net` makes of `image`, (C, H, W) -> (C, H, W) of the same dtype, on the CPU; not clipped.

    net: maps (N, C, h, w) to the same shape, for all h and w that are multiples of `multiple`. It runs where its
    parameters are, in their precision. image: floating point, H and W at least 1; it is continued by reflection to the
    next multiple. tile, overlap: in pixels; a picture that is smaller than a tile is one tile of its own size.
    batch: tiles at once. progress: wraps the iteration over the batches. known: what the network is told, by name.

    Memory: the result and one batch of tiles; the picture is neither copied nor padded.

    Raises ValueError for sizes that don't fit together, FloatingPointError when the network's result is not finite.
    """
    check(tile, overlap, batch, multiple)
    if image.ndim != 3 or not image.is_floating_point() or not image.numel():
        raise ValueError(f"image must be floating point and (C, H, W), got {tuple(image.shape)} of {image.dtype}")
    height, width = image.shape[1:]
    tops, lefts = (starts(side, tile, overlap, multiple) for side in (height, width))
    down, across = (weights(side, tile, overlap, multiple).to(image.dtype) for side in (height, width))
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    like = next(net.parameters(), image)
    result = torch.zeros_like(image, memory_format=torch.contiguous_format)
    batches = [places[i : i + batch] for i in range(0, len(places), batch)]
    for group in progress(batches, len(batches)):
        tiles = [
            image[:, _reflected(tops[i], down.shape[1], height)[:, None], _reflected(lefts[j], across.shape[1], width)]
            for i, j in group
        ]
        estimates = net(torch.stack(tiles).to(like), **known).to(image)
        if not torch.isfinite(estimates).all():
            raise FloatingPointError("the network's result is not finite")
        for (i, j), estimate in zip(group, estimates, strict=True):
            part = result[:, tops[i] : tops[i] + tile, lefts[j] : lefts[j] + tile]
            share = down[i, : part.shape[1], None] * across[j, : part.shape[2]]
            part += share * estimate[:, : part.shape[1], : part.shape[2]]
    return result


def _reflected(start: int, length: int, size: int) -> Tensor:
    """The pixels at start, start + 1, ... of a side of `size` pixels that goes on mirrored at its last pixel."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, start + length) % period
    return torch.minimum(index, period - index)
