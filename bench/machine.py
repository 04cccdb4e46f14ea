"""What a machine gives to code that does nothing else: copies, arithmetic and matrix products, as calls to be timed.

They take turns with what is measured, so that a share of the peak compares the same moments.
"""

import ctypes
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.native import compiled
from flowkern.budget import multiplied_by_onednn

PRODUCT = 1536          # rows and columns of the matrix products
AVX512 = ("-mavx512f", "-mprefer-vector-width=512", "-DWIDTH=16")
FLAGS = {"amx": AVX512, "avx512bf16": AVX512, "avx512": AVX512, "avx2": ("-mavx2", "-mfma", "-DWIDTH=8"),
         "baseline": ("-DWIDTH=4",)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def product(precision: str, size: int = PRODUCT) -> tuple[Callable, int]:
    """A square matrix product and its floating-point operations."""
    a, b = (torch.randn(size, size).to(DTYPES[precision]) for _ in range(2))
    out = torch.empty(size, size, dtype=DTYPES[precision])
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def product_by_onednn(size: int = PRODUCT) -> tuple[Callable, int]:
    """The same in fp32, by the library that multiplies PyTorch's convolutions. `torch.mm` leaves fp32 to MKL, which
    reaches half as much on a Zen 5.
    """
    a, b = torch.randn(size, size).to_mkldnn(), torch.randn(size, size)
    return lambda: F.linear(a, b), 2 * size**3


def multiplies(precision: str) -> bool:
    """Whether PyTorch has vector instructions for products of this precision on this processor. Its other loops for
    bf16 take a hundred times as long as fp32's.
    """
    return precision != "bf16" or multiplied_by_onednn(torch.bfloat16)


def products(precisions: Collection[str]) -> dict[str, tuple[Callable, int]]:
    """The products that tell these precisions' peaks: fp32's always, by both libraries where there are two, and bf16's
    where PyTorch `multiplies` it.
    """
    found = {"fp32": product("fp32")}
    if torch.backends.mkldnn.is_available():
        found["fp32 by oneDNN"] = product_by_onednn()
    if "bf16" in precisions and multiplies("bf16"):
        found["bf16"] = product("bf16")
    return found


def peaks(rates: dict[str, list[float]]) -> dict[str, list[float]]:
    """Precision -> operations per second at the most, by round, from those of `products`. bf16 numbers can be
    multiplied as the fp32 numbers that they are, too, which on some processors is the faster way.
    """
    def fastest(names: Collection[str]) -> list[float]:
        return [max(found) for found in zip(*(rates[name] for name in names), strict=True)]

    return {"fp32": fastest([name for name in rates if name != "bf16"]), "bf16": fastest(rates)}


def copy(moved: int) -> Callable:
    """A copy that reads and writes `moved` bytes together, as often as it is called the same ones."""
    source, target = torch.randn(moved // 8), torch.zeros(moved // 8)
    return lambda: target.copy_(source)


class Arithmetic:
    """Fused multiply-adds of one instruction set on every thread, in registers. Raises RuntimeError without `cc`."""

    def __init__(self, isa: str, rounds: int = 3_000_000):
        library = ctypes.CDLL(str(compiled(Path(__file__).with_name("fma.c"), *FLAGS[isa], "-ffp-contract=fast")))
        self._run, self._rounds = library.fma_rounds, ctypes.c_long(rounds)
        self._run.restype = ctypes.c_float
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)
        library.fma_operations.restype = ctypes.c_long
        self.flops = library.fma_operations() * rounds * self._threads

    def __call__(self) -> None:
        list(self._pool.map(self._run, [self._rounds] * self._threads))
