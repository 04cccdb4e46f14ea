"""Measures one pixel op: our backends, every eager form, a copy of as many bytes and the arithmetic's peak in turns."""

import functools
from collections.abc import Callable

import numpy as np

from bench import eager, machine
from bench.ops import Case
from bench.timing import interleave, ratio, repeats_for, summary
from flowkern import cpp

LEAST = 1e-6        # an error that is fine however exact PyTorch is
SHORT = 0.001      # seconds of one measurement


def implementations(full: bool) -> dict[str, str]:
    """Name of a row -> instruction set: the one in use; in full each that runs here."""
    if cpp.probe() is not None:
        return {}
    config = cpp.build_config()
    return {f"cpp {isa}": isa for isa in (config["isa_supported"] if full else [config["isa_active"]])}


@functools.cache
def arithmetic(isa: str) -> machine.Arithmetic:
    return machine.Arithmetic(isa)


def with_isa(function: Callable, isa: str) -> Callable:
    """A call on one instruction set. Choosing it is a store of one number."""
    from flowkern import _C

    def call():
        _C.select_isa(isa)
        return function()

    return call


def measure(case: Case, rounds: int, sets: dict[str, str]) -> dict:
    """The group of one case."""
    from flowkern import _C

    active, arguments = cpp.build_config()["isa_active"], case.arguments()
    ours = {name: with_isa(lambda: getattr(cpp, case.op)(*arguments), isa) for name, isa in sets.items()}
    forms = {f"PyTorch: {name}": form for name, form in eager.eager_forms(case).items()}
    peaks = {f"peak {isa}": arithmetic(isa) for isa in sets.values()}
    calls = {**ours, **forms, "copy": machine.copy(case.bytes())}
    try:
        errors = {name: case.error(call()) for name, call in {**ours, **forms}.items()}
        # At least two, so that one that is not timed comes first: a lone one would find caches that other rows emptied.
        repeats = {name: max(2, repeats_for(call, SHORT)) for name, call in calls.items()} | dict.fromkeys(peaks, 2)
        seconds = interleave(calls | peaks, rounds, repeats)
    finally:
        _C.select_isa(active)
    # Any of the forms that is right may be the fastest; they are compared with the one that is the specification.
    budget = max(LEAST, 2 * errors["PyTorch: reference"])
    right = {name: np.median(seconds[name]) for name in forms if errors[name] <= budget}
    fastest = min(right, key=right.get)
    bandwidth = case.bytes() / np.array(seconds["copy"])
    rows = []
    for name in (*ours, fastest):
        isa = sets.get(name, active)
        # At its best in this run: the loop is short, and a moment may be a slow one.
        flops = arithmetic(isa).flops / np.min(seconds[f"peak {isa}"])
        bound = np.maximum(case.bytes() / bandwidth, case.flops() / flops)
        row = {"name": name if name in ours else "PyTorch", "form": name.removeprefix("PyTorch: "),
               "rival": name not in ours, "error": errors[name], "error budget": budget, **summary(seconds[name]),
               "of bound": ratio(bound.tolist(), seconds[name]), "bound by": bound_by(case, bandwidth, flops),
               "bytes per second": case.bytes() / float(np.median(seconds[name]))}
        judge(row)
        if row["correct"]:
            row["speedup"] = ratio(seconds[fastest], seconds[name])
        rows.append(row)
    return {"what": str(case), "case": vars(case), "bytes": case.bytes(), "flops": case.flops(), "rounds": rounds,
            "baseline": fastest, "copy bytes per second": float(np.median(bandwidth)),
            "flops per second": {isa: float(arithmetic(isa).flops / np.min(seconds[f"peak {isa}"]))
                                 for isa in sets.values()},
            "forms": {name.removeprefix("PyTorch: "): {"median": float(np.median(seconds[name])),
                                                      "error": errors[name]} for name in forms}, "rows": rows}


def bound_by(case: Case, bandwidth: np.ndarray, flops: float) -> str:
    return "copy" if case.bytes() / np.median(bandwidth) > case.flops() / flops else "arithmetic"


def judge(row: dict) -> None:
    """Give a row `correct`, and `why` where it isn't."""
    row["correct"] = bool(row["error"] <= row["error budget"])
    if not row["correct"]:
        row["why"] = f"wrong result: error {row['error']:.1e}, at most {row['error budget']:.1e} is right"


