"""A whole training step (forward, negative log-likelihood, backward; no optimizer), ours and rivals.

Before every measured step one step of a pacemaker (normflows, or else plain PyTorch) is run and timed, so that each
row's ratio compares steps made seconds apart and the machine's drift cancels. Each row also carries allocated bytes and
the gradient's error against double precision; one whose error is out of budget shows no ratio. Written to
bench/results/step.json; `python -m bench.report` makes a table of it.
"""

import time

import numpy as np
import pytest
import torch

from bench import results
from bench.contenders import CONTENDERS, NORMFLOWS, SAME_PRECISION, SETUP, gradient_error, memory, step
from bench.memory import measure

ROUNDS = 15
THREADS = 2


@pytest.fixture(scope="module")
def session():
    """Two threads, the pacemaker, and the rows of the result file, written when all are done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        pace_name, pacemaker = NORMFLOWS, CONTENDERS[NORMFLOWS].make(SETUP)
    except ImportError:
        pace_name = "PyTorch"
        pacemaker = CONTENDERS[pace_name].make(SETUP)
    x = SETUP.images()
    rows: list[dict] = []
    yield pacemaker, x, rows
    peaks = {"fp32": results.matmul_peak(), "bf16": results.matmul_peak(dtype=torch.bfloat16)}
    budgets = {precision: next((2 * row["gradient_error"] for row in rows if row["name"] == name), None)
               for precision, name in SAME_PRECISION.items()}
    for row in rows:
        budget = row["gradient_budget"] = budgets[row["network"]]
        if "unavailable" not in row and budget is not None:
            row["correct"] = row["gradient_error"] <= max(budget, 1e-4)
    results.write("step", {
        "what": "training step: forward, negative log-likelihood, backward", "setup": vars(SETUP) | {"rounds": ROUNDS},
        "pacemaker": pace_name, "flops": SETUP.flops(), "matmul flops per second": peaks, "rows": rows})
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CONTENDERS)
def test_step(benchmark, session, name):
    pacemaker, x, rows = session
    contender = CONTENDERS[name]
    row = {"name": name, "network": contender.network}
    rows.append(row)
    try:
        model = contender.make(SETUP)
    except ImportError as error:
        row["unavailable"] = str(error)
        pytest.skip(f"{name} is not installed: {error}")
    pace: list[float] = []

    def keep_pace():
        start = time.perf_counter()
        step(pacemaker, x)
        pace.append(time.perf_counter() - start)

    for _ in range(2):
        step(model, x)
        keep_pace()
    pace.clear()
    benchmark.pedantic(step, args=(model, x), setup=keep_pace, rounds=ROUNDS)
    seconds = np.array(benchmark.stats.stats.data)
    row |= {"seconds": seconds.tolist(), "pacemaker_seconds": pace, "median": float(np.median(seconds)),
            "quartiles": np.percentile(seconds, [25, 75]).tolist(),
            "images_per_second": SETUP.batch / float(np.median(seconds)),
            "speedup": float(np.median(np.array(pace) / seconds)),
            "gradient_error": gradient_error(name), **measure(memory, name=name)}
    benchmark.extra_info.update({key: row[key] for key in ("speedup", "gradient_error", "held", "peak")})
