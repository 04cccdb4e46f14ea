"""Figures that only a GPU gives: `python -m bench.gpu` (make gpu runs it) writes bench/results/gpu-<device>.json.

- "ops": GB/s of every pixel op on states of many times the L2, against the copy bandwidth of the same run.
- "steps": a training step of L=4, K=32, hidden 512 at 64x64, batch 64: ms launched from Python and replayed from a CUDA
  graph, allocated bytes held and at the peak, for the reference (eager, torch.utils.checkpoint) and for ours, networks
  in bf16, fp32 and tf32. "compiled": the same for the reference under torch.compile.
- "batches": the largest batch of that model that fits, found from two measured peaks and tried.
- "depths": peak memory against K for 256x256, batch 8, L=3, width 256: the configuration of a published curve.

What is not finished when `--seconds` have passed is left out, and said. `--trial` runs everything tiny, on any device,
to try the program itself; it writes no file.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flowkern
from bench import results
from bench.rivals import Compiled, Reference
from bench.workload import Setup
from flowkern import backend as backends

PARTS = ("steps", "depths", "ops", "compiled", "batches")
PUBLISHED = {4: 5.1, 8: 7.9, 16: 13.5, 32: 24.9, 48: 36.2}  # GB, normflows' Glow, InvertibleNetworks.jl's measurement
PRECISIONS = ("bf16", "fp32", "tf32")
COMPILED = "PyTorch, torch.compile"
MOST = 4096  # images of the largest batch that is tried


def contenders(precision: str) -> dict:
    """Name -> how to make a model with `log_prob` from a Glow."""
    dtype = torch.bfloat16 if precision == "bf16" else None

    def ours(memory, backend="auto"):
        def make(glow):
            glow.memory, glow.backend, glow.compute_dtype = memory, backend, dtype
            return glow

        return make

    return {
        "PyTorch": lambda glow: Reference(glow, dtype),
        "PyTorch, checkpoint": lambda glow: Reference(glow, dtype, checkpointed=True),
        "flowkern store": ours("store"),
        "flowkern recompute": ours("recompute"),
        "PyTorch, channels-last weights": lambda glow: Reference(glow, dtype, channels_last=True),
        COMPILED: lambda glow: Compiled(glow, dtype),
    }


class Device:
    """Clocks and counters of the device in use; on a CPU, for trials, counters read zero."""

    def __init__(self, name: str):
        self.name, self.cuda = name, name == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, run, repeats: int) -> list[float]:
        """Durations of `repeats` calls, warmed up."""
        run(), run()
        found = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return found

    def graph_seconds(self, runs: list, repeats: int) -> float:
        """Median duration of one of `runs`, replayed in turn from a CUDA graph so that no launch gaps count."""
        for run in runs:
            run()
        if not self.cuda:
            return statistics.median(self.seconds(runs[0], repeats))
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return statistics.median(self.seconds(graph.replay, repeats)) / len(runs)


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    (-model.log_prob(x).mean()).backward()


def set_precision(precision: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def copy_bandwidth(device: Device, numbers: int) -> float:
    """Bytes per second, read and written, of PyTorch's fastest kernel that reads a tensor and writes one.

    Not of `copy_`: in a graph that is the copy engine's work, at 2.7 TB/s on an H200 where kernels moved up to 4.2.
    """
    sources = [torch.randn(numbers, device=device.name) for _ in range(2)]
    targets = [torch.empty_like(s) for s in sources]
    runs = [lambda s=s, t=t: torch.neg(s, out=t) for s, t in zip(sources, targets, strict=True)]
    return 8 * numbers / device.graph_seconds(runs, 20)


def product_peak(device: Device, size: int, dtype: torch.dtype, precision: str) -> float:
    """FLOP/s of a square matrix product on random numbers."""
    set_precision(precision)
    a, b = (torch.randn(size, size, device=device.name).to(dtype) for _ in range(2))
    return 2 * size**3 / device.graph_seconds([lambda: a @ b], 20)


def op_calls(channels: int, numbers: int, device: str) -> dict:
    """For each op: its arguments and the bytes that it must move, for states of `numbers` fp32 numbers."""
    side = int((numbers / (16 * channels)) ** 0.5)
    shape = (16, channels, side, side)
    torch.manual_seed(0)

    def state(dtype=torch.float32):
        return torch.empty(shape, device=device, memory_format=torch.channels_last).normal_().to(dtype)

    x, y, g, h = state(), state(), state(), state(torch.bfloat16)
    matrix = torch.linalg.qr(torch.randn(channels, channels, device=device))[0].contiguous()
    inverse, offset = matrix.mT.contiguous(), torch.randn(channels, device=device)
    gl, strength = torch.randn(16, device=device), torch.tensor(0.3, device=device)
    s, b = 4 * x.numel(), 2 * x.numel()  # bytes of a state, and of a bf16 network's output
    scale = ("softclamp", 1.0)
    return {
        "channel_mix": ((x, matrix, offset, False), 2 * s),
        "couple": ((x, h, *scale, False), 2 * s + b),
        "couple_mix": ((x, h, matrix, offset, *scale), 2 * s + b),
        "mix_couple": ((x, h, inverse, offset, *scale), 2 * s + b),
        "couple_vjp": ((x, g, h, gl, *scale, False, False), 4 * s + 2 * b),
        "mix_vjp": ((x, g, matrix, inverse, offset, False, False), 4 * s),
        "shrink": ((x, strength), 2 * s),
        "shrink_vjp": ((x, g, strength), 3 * s),
        "data_consistency": ((x, y, strength), 3 * s),
        "data_consistency_vjp": ((x, y, g, strength), 5 * s),
    }


def measure_ops(device: Device, trial: bool):
    numbers = 1 << (12 if trial else 27)
    bandwidth = copy_bandwidth(device, numbers)
    yield {"copy GB/s": bandwidth / 1e9}
    set_precision("fp32")  # the reference's mixes
    here = [name for name in ("cuda", "triton") if flowkern.backends().get(name) is True]
    for name, channels in itertools.product(["reference", *here], (12,) if trial else (12, 24, 48, 96)):
        for op, (arguments, moved) in op_calls(channels, numbers, device.name).items():
            function = getattr(backends.table(torch.device(device.name), name), op)
            seconds = device.graph_seconds([lambda f=function, a=arguments: f(*a)], 1 if trial else 10)
            yield {"op": op, "channels": channels, "backend": name, "us": 1e6 * seconds,
                   "GB/s": moved / seconds / 1e9, "of copy": moved / seconds / bandwidth}  # fmt: skip


def measure_step(model: nn.Module, x: Tensor, device: Device, repeats: int) -> dict:
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds = device.seconds(lambda: step(model, x), repeats)
    model.zero_grad(set_to_none=True)
    device.reset_peak()
    before = device.allocated()
    value = -model.log_prob(x).mean()
    device.synchronize()
    held = device.allocated() - before
    value.backward()
    device.synchronize()
    peak = device.peak()
    quartiles = statistics.quantiles(seconds, n=4)
    return {"ms": 1e3 * statistics.median(seconds), "quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
            "images/s": len(x) / statistics.median(seconds), "held MiB": held / 2**20,
            "peak MiB": (peak - before - parameters) / 2**20, "all GB": peak / 1e9}  # fmt: skip


def replayed_ms(model: nn.Module, x: Tensor, device: Device, repeats: int) -> float | None:
    """Milliseconds of a step that a CUDA graph replays, so that launches cost nothing; None where it can't be captured.
    """
    try:
        return 1e3 * device.graph_seconds([lambda: step(model, x)], repeats)
    except RuntimeError:  # PyTorch's checkpointing asks for the state of the random numbers, for example
        return None


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    step(model, x)
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def measure_steps(device: Device, trial: bool):
    size = 256 if trial else 8192
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        yield {"precision": precision, "product TFLOP/s": product_peak(device, size, dtype, precision) / 1e12}
    yield from _steps(device, trial, [name for name in contenders("fp32") if name != COMPILED])


def measure_compiled(device: Device, trial: bool):
    """Of its own, because compiling takes as long as all the rest."""
    yield from _steps(device, trial, [COMPILED])


def _steps(device: Device, trial: bool, names: list[str]):
    deep = Setup(levels=2, depth=2, hidden=8, size=16) if trial else Setup(levels=4, depth=32, hidden=512)
    batch = 2 if trial else 64
    setup = replace(deep, batch=batch)
    glow, x = deep.glow(device.name), setup.images().to(device.name)
    few = deep.images()[:2].to(device.name)
    truth = gradient_of(Reference(glow).double(), few.double())
    # Two images over and over have the mean gradient of the two, in the shape for which a model has been compiled.
    many = few.repeat(batch // 2, 1, 1, 1)
    for precision, name in itertools.product(PRECISIONS, names):
        set_precision(precision)
        row = {"name": name, "precision": precision, "batch": batch}
        try:
            model = contenders(precision)[name](copy.deepcopy(glow))
            error = ((gradient_of(model, many) - truth).norm() / truth.norm()).item()
            row |= {"gradient error": error, **measure_step(model, x, device, 5)}
            row["graph ms"] = replayed_ms(model, x, device, 5)
            row["network TFLOP/s"] = setup.flops() * 3 / min(row["ms"], row["graph ms"] or row["ms"]) / 1e9
        except torch.OutOfMemoryError:
            row["unavailable"] = "out of memory"
        model = None
        yield row


def measure_depths(device: Device, trial: bool):
    set_precision("fp32")
    for depth in (1, 2) if trial else (4, 8, 16, 32, 48, 64):
        setup = Setup(levels=3, depth=depth, hidden=8 if trial else 256, size=16 if trial else 256, batch=8)
        # Made on the GPU, where that takes no time, and kept elsewhere: peaks are absolute here.
        glow, x = setup.glow(device.name).cpu(), setup.images().to(device.name)
        for name in ("flowkern recompute", "flowkern store", "PyTorch", "PyTorch, checkpoint"):
            row = {"name": name, "depth": depth, "published GB": PUBLISHED.get(depth)}
            try:
                model = contenders("fp32")[name](copy.deepcopy(glow).to(device.name))
                row |= measure_step(model, x, device, 2)
            except torch.OutOfMemoryError:
                row["unavailable"] = "out of memory"
            model = None
            yield row


def measure_batches(device: Device, trial: bool):
    deep = Setup(levels=2, depth=2, hidden=8, size=16) if trial else Setup(levels=4, depth=32, hidden=512)
    total = torch.cuda.get_device_properties(0).total_memory if device.cuda else 1 << 30
    glow, images = deep.glow(device.name), deep.images()
    for precision in ("bf16", "fp32"):
        for name, make in contenders(precision).items():
            if name == COMPILED:  # for every batch anew, which takes minutes
                continue
            set_precision(precision)
            model = make(copy.deepcopy(glow))
            step(model, images[:2].to(device.name))
            row, peaks, batch = {"name": name, "precision": precision}, {}, 0
            try:
                for batch in (16, 48):
                    device.reset_peak()
                    step(model, images[:1].to(device.name).expand(batch, -1, -1, -1).contiguous())
                    peaks[batch] = device.peak()
                per_image = max(1, (peaks[48] - peaks[16]) // 32)
                fits = int(0.93 * (total - peaks[16]) / per_image) + 16
                batch = min(MOST, fits) if device.cuda else 16
                step(model, images[:1].to(device.name).expand(batch, -1, -1, -1).contiguous())
                row |= {"MiB per image": per_image / 2**20, "batch": batch}
                row["largest"] = f"at least {batch}" if fits > batch else str(batch)
            except torch.OutOfMemoryError:
                row["unavailable"] = f"a batch of {batch} did not fit"
            model = None
            yield row


MEASURES = {"steps": measure_steps, "depths": measure_depths, "ops": measure_ops,
            "compiled": measure_compiled, "batches": measure_batches}


def rows(parts, device: Device, trial: bool):
    """(part, row) of every measurement, one after the other."""
    for part in parts:
        for row in MEASURES[part](device, trial):
            yield part, row


def options(prog: str, doc: str) -> argparse.ArgumentParser:
    """Those of a program that measures row after row on a GPU."""
    parser = argparse.ArgumentParser(prog=prog, description=doc.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420, help="stop starting new measurements after this long")
    parser.add_argument("--out", type=Path, help="a folder in which the JSON is written too")
    parser.add_argument("--trial", action="store_true", help="tiny sizes, any device, nothing written but to --out")
    return parser


def device_for(parser: argparse.ArgumentParser, trial: bool) -> Device:
    """The GPU; a CPU for a trial alone. cuDNN chooses its algorithms by timing them, as in a training run."""
    if not trial and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --trial tries the program on the CPU")
    torch.backends.cudnn.benchmark = True
    return Device("cuda" if torch.cuda.is_available() else "cpu")


def record(kind: str, found: Iterable[tuple[str, dict]], figures: dict[str, list], arguments) -> None:
    """Print each (part, row) and add it to figures[part], which <kind>-<device>.json then holds, for --seconds."""
    start = time.monotonic()
    name = "trial" if arguments.trial else torch.cuda.get_device_name().lower().replace(" ", "-")
    folders = ([] if arguments.trial else [results.RESULTS]) + ([arguments.out] if arguments.out else [])
    for part, row in found:
        figures[part].append(row)
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        print(part, json.dumps(shown), flush=True)
        if time.monotonic() - start > arguments.seconds:
            figures["cut short"] = f"after {arguments.seconds:.0f} s, in {part}"
        for folder in folders:  # after every row, so that a call that is cut off loses nothing
            results.write(f"{kind}-{name}", figures, folder)
        if "cut short" in figures:
            break


def main() -> None:
    parser = options("python -m bench.gpu", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    device = device_for(parser, arguments.trial)
    found = rows(arguments.parts, device, arguments.trial)
    record("gpu", found, {part: [] for part in arguments.parts}, arguments)


if __name__ == "__main__":
    main()
