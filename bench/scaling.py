"""How time and memory of a training step grow with depth, batch and image size: `pytest bench --full` measures it."""

from dataclasses import replace
from functools import partial

from bench.contenders import CHECKPOINT, GLOWS, RECOMPUTE
from bench.models import memories
from bench.timing import interleave, summary
from bench.workload import Setup
from bench.works import WORKS

SETUP = Setup(scale="sigmoid")
SWEEPS = {"depth": (1, 2, 4, 8, 16), "batch": (1, 2, 4, 8, 16), "size": (32, 48, 64, 96, 128)}
MEMORY_DEPTHS = (4, 8, 16, 32, 64)
TIMED = ("PyTorch", "normflows", "flowkern store", RECOMPUTE, "flowkern recompute, bf16 network")
COUNTED = ("PyTorch", "PyTorch, torch.compile", CHECKPOINT, "normflows", "FrEIA", "nflows", "memcnn",
           "flowkern store", "flowkern checkpoint", RECOMPUTE, "flowkern recompute, bf16 network")


def times(sweep: str, setup: Setup = SETUP, values: tuple[int, ...] = (), rounds: int = 9) -> dict:
    """Training steps of `TIMED` at each value, all of them taking turns."""
    work, calls, missing = WORKS["train"], {}, {}
    for value in values or SWEEPS[sweep]:
        varied = replace(setup, **{sweep: value})
        for name in TIMED:
            try:
                model = GLOWS[name].make(varied)
            except ImportError as error:
                missing[name] = str(error)
                continue
            calls[name, value] = partial(work.run, model, varied.images())
    for call in calls.values():
        call(), call()
    points: dict = {}
    for (name, value), seconds in interleave(calls, rounds).items():
        points.setdefault(name, {})[str(value)] = summary(seconds)
    return {"what": f"training step against {sweep}", "sweep": sweep, "setup": vars(setup), "rounds": rounds,
            "points": points, "unavailable": missing}


def memory(setup: Setup = SETUP, depths: tuple[int, ...] = MEMORY_DEPTHS) -> dict:
    """Allocated bytes, held for backward and at the peak, of a training step at each depth."""
    names, missing = [], {}
    for name in COUNTED:
        try:
            GLOWS[name].make(replace(setup, levels=1, depth=1, size=8, batch=1))
            names.append(name)
        except ImportError as error:
            missing[name] = str(error)
    points: dict = {name: {} for name in names}
    for depth in depths:
        for name, found in memories("glow", ("train",), replace(setup, depth=depth), names).items():
            points[name][str(depth)] = found.get("train", {})
    return {"what": "allocated bytes of a training step against depth", "sweep": "memory", "setup": vars(setup),
            "points": points, "unavailable": missing}
