"""Times of calls that take turns, so that a drifting machine slows all of them alike."""

import gc
import random
import time
from collections.abc import Callable

import numpy as np

from train.memory import uncollected


def interleave(calls: dict[str, Callable], rounds: int,
               repeats: dict[str, int] | None = None) -> dict[str, list[float]]:
    """Seconds of one call of each, `rounds` times. Every round runs all of them, in another order: what ran before a
    call leaves caches and sleeping threads behind, and must not always be the same.

    repeats: how many calls in a row make one measurement, where one is too short for the clock; one more, before them,
    is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    gc.collect()
    with uncollected():
        for _ in range(rounds):
            for name in order.sample(list(calls), len(calls)):
                call, count = calls[name], repeats[name] if repeats else 1
                if count > 1:
                    call()
                begin = time.perf_counter()
                for _ in range(count):
                    call()
                seconds[name].append((time.perf_counter() - begin) / count)
            if not repeats:
                gc.collect()
    return seconds


def repeats_for(call: Callable, seconds: float) -> int:
    """How many calls fill some time; warms up."""
    call()
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < 2 * seconds:
        call()
        count += 1
    return max(1, round(seconds * count / (time.perf_counter() - begin)))


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median of the ratios within a round."""
    return float(np.median(np.array(slower) / np.array(faster)))


def summary(seconds: list[float]) -> dict:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {"seconds": seconds, "median": float(middle), "quartiles": [float(low), float(high)]}
