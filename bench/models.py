"""Measures what is done with models: one group of rows, taking turns, with memory and errors on the same rows."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import contenders, machine
from bench.contenders import Contender
from bench.memory import measure, record
from bench.timing import interleave, ratio, repeats_for, summary, uncollected
from bench.workload import Setup
from bench.works import WORKS, Errors
from flowkern import cpp

# Errors that are fine however exact PyTorch is, of results and, through the kinks of ReLU, of gradients; and errors
# that are wrong however far off PyTorch is.
LEAST = {False: {"fp32": 1e-6, "bf16": 1e-3}, True: {"fp32": 1e-4, "bf16": 1e-2}}
MOST = {"fp32": 1e-3, "bf16": 0.15}
# The same of a part of a gradient: one kind of parameter at one level, which a kink may move altogether.
PART_LEAST, PART_MOST = {"fp32": 1e-3, "bf16": 0.1}, 0.9
AGREEMENT = {"fp32": 2e-6, "bf16": 1e-3}
SHORT = 0.02                            # seconds under which calls are repeated to make one measurement


class Family:
    """Models of a set-up, made once for the works that are going to be measured. Rows that can't be made say why."""

    def __init__(self, name: str, setup: Setup, works: tuple[str, ...], full: bool,
                 rows: dict[str, Contender] | None = None):
        self.name, self.setup = name, setup
        self.contenders, self._full = rows or contenders.chosen(name, full), full
        self.models, self.reasons = {}, {}
        self._errors = Errors(setup)
        for row, contender in self.contenders.items():
            judges = row in contenders.SAME_PRECISION.values()     # its error is asked for in any case
            if not (judges or self._is_timed(row)):
                self.reasons[row] = _not_timed(contender)
                continue
            try:
                self.models[row] = contender.make(setup)
            except ImportError as error:
                self.reasons[row] = f"not installed: {how_to_install(error)}"
        # Counted in a process of its own, beside what is not timed; last what this process is compiling meanwhile.
        counted = sorted(filter(self._is_timed, self.models), key=lambda row: self.contenders[row].compiled)
        self._memory = ThreadPoolExecutor(1).submit(memories, name, works, setup, counted, full)
        self._wrong = self._disagreements() if name in ("glow", "small") else {}

    def _is_timed(self, row: str) -> bool:
        """All but rivals that would take many times as long as in single precision: minutes, which tell nothing."""
        contender = self.contenders[row]
        return not contender.rival or machine.multiplies(contender.network)

    def _disagreements(self) -> dict[str, str]:
        """Rivals that are not the same model, with the reason: other parameters, or another likelihood."""
        x, found = self.setup.images(), {}
        with torch.no_grad():
            exact = self.setup.glow().double().log_prob(x.double())
            for row, model in self.models.items():
                try:
                    difference = ((model.log_prob(x) - exact) / exact).abs().max().item()
                except Exception as error:      # a library's, whatever it is: the other rows go on
                    found[row] = f"no likelihood: {_first_line(error)}"
                    continue
                if not difference <= AGREEMENT[self.contenders[row].network]:
                    found[row] = f"another likelihood, by {difference:.1e}"
                elif hasattr(model, "check_parameters"):
                    try:
                        model.check_parameters(self.setup.glow())
                    except ValueError as error:
                        found[row] = str(error)
        return found

    def measure(self, work_name: str, rounds: int) -> dict:
        """The group of one work."""
        work, setup = WORKS[work_name], self.setup
        rows = {row: self._row(row) for row, c in self.contenders.items() if c.does(work_name, self._full)}
        calls = {}
        for row, model in ((row, self.models[row]) for row in rows if row in self.models):
            contender = self.contenders[row]
            try:
                # What is compiled meanwhile is compiled for so many threads as are in use.
                with _threads(torch.get_num_threads() if contender.compiled else 1):
                    errors = self._errors(work_name, model, contender.truth)
                rows[row] |= {"error": errors.pop("all"), "errors": errors}
                if not self._is_timed(row):
                    rows[row]["unavailable"] = _not_timed(contender)
                    continue
                arguments = work.inputs(model, setup)
            except Exception as error:      # a library's, whatever it is: the other rows go on
                if not contender.rival:
                    raise
                rows[row]["unavailable"] = _first_line(error)
                continue
            calls[row] = _call(work.run, model, arguments)
        counted = self._memory.result()
        for row in calls:
            rows[row] |= counted[row].get(work_name, {})
        repeats = {row: _repeats(call) for row, call in calls.items()}
        products = machine.products({c.network for c in self.contenders.values()})
        timed = calls | {f"product {p}": product for p, (product, _) in products.items()}
        # Behind a call that is not timed: what ran before leaves caches cold and threads spinning.
        repeats |= {f"product {p}": max(2, _repeats(product)) for p, (product, _) in products.items()}
        seconds = interleave(timed, rounds, repeats)
        rates = {p: [flops / s for s in seconds[f"product {p}"]] for p, (_, flops) in products.items()}
        peaks = machine.peaks(rates)
        for row in calls:
            contender = self.contenders[row]
            flops = work.flops(setup) * (contender.evaluations_in(setup) if work.trains else 1)
            speeds = [flops / s for s in seconds[row]]
            rows[row] |= {**summary(seconds[row]), "flops": flops, "of peak": ratio(speeds, peaks[contender.network])}
            rows[row]["per second"] = setup.batch / rows[row]["median"]
        group = {"what": work.what, "work": work_name, "family": self.name, "setup": vars(setup), "rounds": rounds,
                 "product flops per second": {p: summary(found)["median"] for p, found in rates.items()},
                 "rows": list(rows.values())}
        judge(group["rows"], self._wrong, work.trains)
        compare(group)
        return group

    def _row(self, row: str) -> dict:
        contender = self.contenders[row]
        found = {"name": row, "network": contender.network, "rival": contender.rival, "note": contender.note}
        return found | ({"unavailable": self.reasons[row]} if row in self.reasons else {})


@contextlib.contextmanager
def _threads(count: int):
    """Two threads that wait for each other spin, on cores that the process that counts memory needs, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(run: Callable, model, arguments: tuple) -> Callable:
    return lambda: run(model, *arguments)


def _not_timed(contender: Contender) -> str:
    return f"not timed: PyTorch multiplies {contender.network} without vectors here"


def _repeats(call: Callable) -> int:
    """How often a call has to be repeated to be timed. A first one may find cold caches, and so seem long."""
    with uncollected():
        begin = time.perf_counter()
        call()
        short = time.perf_counter() - begin < 3 * SHORT
    return repeats_for(call, SHORT) if short else 1


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def judge(rows: list[dict], wrong: dict[str, str], trains: bool) -> None:
    """Give each measured row `correct`, and `why` where it isn't. wrong: reasons known already, by row.

    The error must be at most twice that of PyTorch at the same precision in the same group, or negligible; and never
    large, so that nothing passes because PyTorch is wrong, too. Of a gradient's parts, each at most three times the
    worst of PyTorch's (which one a kink moves is chance): in the whole, a small one that is wrong would not show.
    """
    exact = {p: next((r for r in rows if r["name"] == name), {}) for p, name in contenders.SAME_PRECISION.items()}
    for row in rows:
        if "unavailable" in row:
            continue
        precision, why = row["network"], wrong.get(row["name"])
        reference = exact[precision]
        budget = min(max(LEAST[trains][precision], 2 * (reference.get("error") or 0)), MOST[precision])
        row["error budget"] = budget
        if why is None and not row["error"] <= budget:
            why = f"wrong result: error {row['error']:.1e}, at most {budget:.1e} is right"
        worst = max(reference.get("errors", {}).values(), default=0)
        budget = min(max(PART_LEAST[precision], 3 * worst), PART_MOST)
        for part, error in (row.get("errors", {}) if trains else {}).items():
            if why is None and not error <= budget:
                why = f"wrong result: error {error:.1e} of {part}, at most {budget:.1e} is right"
        row["correct"] = why is None
        if why is not None:
            row["why"] = why


def compare(group: dict) -> None:
    """Name the fastest rival that is correct, in single precision and in bf16, and give every correct row its ratio to
    the first, and those in bf16 theirs to the second.
    """
    fastest = {p: min((r for r in group["rows"] if r["rival"] and r.get("correct") and r["network"] == p),
                      key=lambda r: r["median"], default=None) for p in ("fp32", "bf16")}
    group["baseline"], group["bf16 baseline"] = (r["name"] if r else None for r in fastest.values())
    for row in group["rows"]:
        if row.get("correct") and fastest["fp32"]:
            row["speedup"] = ratio(fastest["fp32"]["seconds"], row["seconds"])
        if row.get("correct") and row["network"] == "bf16" and fastest["bf16"]:
            row["speedup in bf16"] = ratio(fastest["bf16"]["seconds"], row["seconds"])


def memories(family: str, works: tuple[str, ...], setup: Setup, rows: list[str], full: bool = True,
             timeout: float = 1200) -> dict:
    """Row -> work -> allocated bytes "held" between forward and backward (training alone) and at the "peak".

    Above what exists before, without the parameters' gradients; the scratch memory that our threads keep is counted at
    the peak. Nothing for a row where counting fails.
    """
    try:
        return measure(_memories, timeout, family=family, works=list(works), setup=vars(setup), rows=rows,
                       full=full)
    except (RuntimeError, subprocess.TimeoutExpired) as error:  # no Linux, no C compiler: the times are worth having
        print(f"\nno memory figures: {error}")
        return {row: {} for row in rows}


def _memories(family: str, works: list[str], setup: dict, rows: list[str], full: bool) -> dict:
    """Runs in a process started by `bench.memory.measure`."""
    found: dict = {}
    for row in rows:
        model = contenders.FAMILIES[family][row].make(Setup(**setup))
        found[row] = {}
        for name in works:
            if not contenders.FAMILIES[family][row].does(name, full):
                continue
            try:
                cpp.kept_scratch(afresh=True)
                footprint = _footprint(WORKS[name], model, Setup(**setup))
                if not contenders.FAMILIES[family][row].rival:
                    footprint["peak"] += cpp.kept_scratch()
                found[row][name] = footprint
            except Exception as error:      # as in `Family.measure`
                found[row][name] = {"memory unavailable": _first_line(error)}
        del model
    return found


def _footprint(work, model, setup: Setup) -> dict:
    arguments = work.inputs(model, setup)
    work.run(model, *arguments)
    model.zero_grad(set_to_none=True)
    with record() as events:
        if not work.trains:
            work.run(model, *arguments)
        else:
            value = work.forward(model, *arguments)
            events.mark("forward")
            value.backward()
            del value
    peak = {"peak": events.peak(without=events.alive())}
    return peak | ({"held": events.held("forward")} if work.trains else {})


def how_to_install(error: ImportError) -> str:
    """The command that installs what an import did not find."""
    name = (error.name or str(error)).split(".")[0]
    return contenders.INSTALL.get(name, str(error))
