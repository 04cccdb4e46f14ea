"""What the benchmark compares must be the same function; what its report prints must follow from its checks."""

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import contenders, eager, machine, models, ops, pixels, plots, report, results, scaling, timing, works
from bench.conftest import Book
from bench.rivals import NFlows, NormFlows, Reference
from bench.rivals.base import trainable
from bench.workload import Setup
from flowkern import reference

SMALL = Setup(levels=2, depth=2, hidden=16, size=16, batch=4, scale="sigmoid", folds=2)
# Those that torch.compile takes half a minute for are measured by pytest bench alone.
QUICK = {name: c for name, c in contenders.GLOWS.items() if "torch.compile" not in name}


def made(contender: contenders.Contender, setup: Setup = SMALL) -> torch.nn.Module:
    try:
        return contender.make(setup)
    except ImportError as error:
        pytest.skip(models.how_to_install(error))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", QUICK)
def test_every_row_is_the_same_model(name):
    contender, x, glow = QUICK[name], SMALL.images(), SMALL.glow()
    model = made(contender)
    expected = glow.double().log_prob(x.double())
    tolerance = models.AGREEMENT[contender.network]
    with torch.no_grad():
        assert torch.allclose(model.log_prob(x).double(), expected, rtol=tolerance)
        z, _ = model(x)
        assert torch.allclose(model.inverse(z), x, atol=1e-5 if contender.network == "fp32" else 1e-2)
    if hasattr(model, "check_parameters"):
        model.check_parameters(SMALL.glow())
    works.WORKS["train"].run(model, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("work", works.WORKS)
def test_errors_are_small_for_every_contender(work):
    family, setup = {"step": ("step", SMALL), "denoise": ("unfolded", SMALL)}.get(work, ("glow", SMALL))
    errors = works.Errors(setup)
    for name, contender in contenders.FAMILIES[family].items():
        if "torch.compile" in name or not contender.does(work, full=True):
            continue
        try:
            model = contender.make(setup)
        except ImportError:
            continue
        found = errors(work, model, contender.truth)
        assert found["all"] <= {"fp32": 1e-4, "bf16": 0.03}[contender.network], name
        assert len(found) == 2 or len(found) > 5 and max(found.values()) < 0.9, name


def test_an_error_is_the_median_over_inputs_that_differ_in_their_last_bits():
    given = []

    def result(model, x):
        if x.dtype == torch.float64:
            return {"result": torch.ones(1)}
        given.append(x)
        return {"result": torch.tensor([1.0 + [0.1, 0.0, 0.3, 0.2, 0.0][len(given) - 1]])}

    work = works.Work(lambda model, setup: (torch.ones(100),), None, result, None, "a work", draws=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(works.WORKS, "a work", work)
        error = works.Errors(SMALL)("a work", torch.nn.Identity(), lambda setup: torch.nn.Identity())
    assert error == {"all": pytest.approx(0.1), "result": pytest.approx(0.1)}
    assert torch.equal(given[0], torch.ones(100)) and len(given) == 5
    assert all(0 < (x - 1).abs().max() < 1e-6 for x in given[1:]) and not torch.equal(given[1], given[2])


def test_declared_differences_are_the_only_ones():
    glow = SMALL.glow()
    rival = Reference(glow)
    rival.check_parameters(glow)
    rival.differs = {"nothing": 1}
    with pytest.raises(ValueError, match="nothing"):
        rival.check_parameters(glow)


def test_libraries_say_what_they_can_not_express():
    pytest.importorskip("normflows")
    with pytest.raises(ValueError, match="sigmoid"):
        NormFlows(Setup(levels=1, depth=1, hidden=4, size=8).glow())
    pytest.importorskip("nflows")
    glow = SMALL.glow()
    glow.levels[0].steps[0].conv.sign[0] = -1
    with pytest.raises(ValueError, match="signs"):
        NFlows(glow)


def test_counting_parameters():
    glow = SMALL.glow()
    by_hand = sum(p.numel() for p in glow.parameters())
    glow.levels[0].steps[0].conv.lower.requires_grad_(False)
    assert trainable(glow) == by_hand - 12 * 12


def test_checkpointed_and_plain_reference_have_the_same_gradient():
    glow, x = SMALL.glow().double(), SMALL.images().double()
    forward = works.WORKS["train"].forward
    plain = works.gradient(Reference(glow), x, forward=forward)
    lean = works.gradient(Reference(glow, checkpointed=True), x, forward=forward)
    assert list(lean) == list(plain) and all(torch.allclose(lean[kind], plain[kind], rtol=1e-12) for kind in plain)
    assert {"levels.0.weight1", "levels.1.actnorm.bias", "levels.1.norm2.log_scale", "levels.0.log_s"} <= set(plain)
    before = copy.deepcopy(glow.state_dict())
    assert all(torch.equal(before[name], value) for name, value in glow.state_dict().items())


# The pixel ops


def test_every_eager_form_computes_its_op():
    for case in ops.cases(full=True):
        if case.batch == 8:
            for name, form in eager.eager_forms(case).items():
                assert case.error(form()) <= 1e-6, (str(case), name)


def test_bytes_and_operations_of_the_mixes():
    case = ops.Case("channel_mix", 12, 1, 2)
    assert (case.bytes(), case.flops()) == (2 * 4 * 12 * 4, 2 * 144 * 4)
    assert ops.Case("mix_vjp", 12, 1, 2).flops() == 3 * case.flops()


def test_a_wrong_op_is_found_and_gets_no_ratio(monkeypatch):
    if pixels.cpp.probe() is not None:
        pytest.skip(pixels.cpp.probe())
    real = pixels.cpp.channel_mix
    monkeypatch.setattr(pixels.cpp, "channel_mix", lambda *arguments: real(*arguments) * 1.0001)
    active = pixels.cpp.build_config()["isa_active"]
    group = pixels.measure(ops.Case("channel_mix", 12, 1, 4), 2, {f"cpp {active}": active})
    ours, theirs = group["rows"]
    assert not ours["correct"] and "speedup" not in ours and "wrong result" in ours["why"]
    assert theirs["correct"] and theirs["speedup"] == 1.0
    text = report.ops_table({"groups": {"x": group}})
    assert "wrong result" in text.splitlines()[2]


# Times and their comparison


def test_every_round_runs_every_call_in_another_order():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abcdef"}
    seconds = timing.interleave(calls, 20)
    rounds = ["".join(order[i:i + 6]) for i in range(0, len(order), 6)]
    assert {"".join(sorted(r)) for r in rounds} == {"abcdef"} and [len(s) for s in seconds.values()] == [20] * 6
    # Nobody has the same predecessor always.
    assert all(len({r[r.index(name) - 1] for r in rounds}) > 2 for name in "abcdef")


def test_short_calls_are_repeated_behind_one_that_is_not_timed():
    order: list[str] = []
    timing.interleave({"a": lambda: order.append("a")}, 2, {"a": 3})
    assert len(order) == 2 * (3 + 1)


def test_ratios_compare_within_rounds():
    # The machine became three times slower in the second round, for both alike.
    assert timing.ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == 2.0


def row(name, seconds, error=1e-5, rival=False, network="fp32", **more):
    return {"name": name, "network": network, "rival": rival, "note": "", "error": error, **timing.summary(seconds),
            "per second": 80.0, "of peak": 0.5, "held": 1 << 20, "peak": 3 << 20} | more


def figures_of(group):
    return {"environment": results.environment(), "groups": {"train": group}}


def judged(*rows, wrong=()):
    group = {"what": "training step", "setup": vars(SMALL), "rounds": 3, "rows": list(rows),
             "product flops per second": {"fp32": 1e11}}
    models.judge(group["rows"], dict(wrong), trains=True)
    models.compare(group)
    return group


def test_the_fastest_correct_rival_is_the_measure():
    group = judged(row("PyTorch", [4.0] * 3, rival=True), row("wrong", [1.0] * 3, error=1.0, rival=True),
                   row("quick", [3.0] * 3, rival=True), row("ours", [1.5] * 3))
    assert group["baseline"] == "quick"
    found = {r["name"]: r.get("speedup") for r in group["rows"]}
    assert found == {"PyTorch": 0.75, "wrong": None, "quick": 1.0, "ours": 2.0}


@pytest.mark.parametrize("network, wrong", [("fp32", 0.9), ("fp32", 2e-3), ("bf16", 1.0), ("bf16", float("nan"))])
def test_a_wrong_part_of_a_gradient_is_seen_however_small_it_is_in_the_whole(network, wrong):
    name = contenders.SAME_PRECISION[network]
    right = {"levels.0.weight1": 1e-6, "levels.1.weight1": 1e-6}

    def rows(ours):
        errors = {name: right, "ours": ours}
        found = [row(n, [1.0] * 3, errors=e, rival=n == name, network=network) for n, e in errors.items()]
        return judged(*found)["rows"]

    assert all(r["correct"] for r in rows(right))
    ours = rows(right | {"levels.1.weight1": wrong})[1]
    assert not ours["correct"] and "of levels.1.weight1, at most" in ours["why"] and "speedup" not in ours


def test_rows_in_bf16_are_compared_with_their_own_too():
    eager = row("PyTorch, bf16 network", [3.0] * 3, rival=True, network="bf16")
    group = judged(row("PyTorch", [4.0] * 3, rival=True), eager,
                   row("compiled", [2.0] * 3, rival=True, network="bf16"), row("ours", [1.0] * 3, network="bf16"))
    assert group["baseline"] == "PyTorch" and group["bf16 baseline"] == "compiled"
    assert report.verdict(group["rows"][3]) == "4.00 (2.00)" and report.verdict(group["rows"][0]) == "1.00"
    assert "in brackets to compiled, the fastest in bf16" in report.model_caption(group, figures_of(group))


@pytest.mark.parametrize("error, wrong, why", [(1e-2, {}, "wrong result"), (float("nan"), {}, "wrong result"),
                                               (1e-6, {"ours": "another likelihood, by 0.1"}, "another likelihood")])
def test_a_wrong_row_shows_why_and_no_ratio(error, wrong, why):
    group = judged(row("PyTorch", [4.0] * 3, rival=True), row("ours", [1.25] * 3, error=error), wrong=wrong)
    line = report.model_table(group).splitlines()[3]
    assert why in line and "3.20" not in line
    assert "3.20" in report.model_table(judged(row("PyTorch", [4.0] * 3, rival=True), row("ours", [1.25] * 3)))


def test_an_unchecked_row_shows_no_ratio():
    group = judged(row("PyTorch", [4.0] * 3, rival=True), row("ours", [1.25] * 3))
    del group["rows"][1]["correct"]
    assert "unchecked" in report.model_table(group) and "3.20" not in report.model_table(group)


def test_the_budget_is_twice_pytorchs_error_at_the_same_precision():
    rows = [row("PyTorch", [1.0], error=4e-4, rival=True), row("ours", [1.0], error=7e-4),
            row("ours, bf16", [1.0], error=9e-3, network="bf16")]
    models.judge(rows, {}, trains=True)
    assert [r["correct"] for r in rows] == [True, True, True]
    models.judge(rows, {}, trains=False)
    assert [r["correct"] for r in rows] == [True, True, False]  # a likelihood is summed up: little is allowed there
    rows[1]["error"] = 9e-4
    models.judge(rows, {}, trains=True)
    assert not rows[1]["correct"]


def test_nothing_passes_because_pytorch_is_wrong_too():
    rows = [row("PyTorch, bf16 network", [1.0], error=0.4, rival=True, network="bf16"),
            row("ours, bf16", [1.0], error=0.3, network="bf16")]
    models.judge(rows, {}, trains=True)
    assert [r["correct"] for r in rows] == [False, False]


def test_the_faster_library_s_product_is_the_peak():
    rates = {"fp32": [4.0, 2.0], "fp32 by oneDNN": [3.0, 5.0], "bf16": [9.0, 1.0]}
    assert machine.peaks(rates) == {"fp32": [4.0, 5.0], "bf16": [9.0, 5.0]}
    multiply, flops = machine.product_by_onednn(8)
    assert multiply().to_dense().shape == (8, 8) and flops == 2 * 8**3


def test_bf16_numbers_may_be_multiplied_in_fp32():
    assert machine.peaks({"fp32": [4.0, 2.0]}) == {"fp32": [4.0, 2.0], "bf16": [4.0, 2.0]}
    assert machine.peaks({"fp32": [4.0, 2.0], "bf16": [3.0, 9.0]})["bf16"] == [4.0, 9.0]


def test_bf16_without_vectors_is_not_timed_but_its_error_counts(monkeypatch):
    monkeypatch.setattr(machine, "multiplies", lambda precision: precision != "bf16")
    in_fp32 = ["fp32", "fp32 by oneDNN"] if torch.backends.mkldnn.is_available() else ["fp32"]
    assert list(machine.products({"fp32", "bf16"})) == in_fp32
    names = "PyTorch", "PyTorch, bf16 network", "flowkern recompute, bf16 network"
    rows = {name: contenders.GLOWS[name] for name in names}
    rows["another in bf16"] = replace(rows[names[1]], make=lambda setup: 1 / 0)    # nor made, as nothing rests on it
    family = models.Family("glow", SMALL, ("log_prob",), False, rows)
    group = family.measure("log_prob", 2)
    plain, emulated, ours, another = group["rows"]
    assert another["unavailable"] == emulated["unavailable"]
    assert "seconds" in plain and "not timed" in emulated["unavailable"] and "seconds" not in emulated
    assert ours["error budget"] >= 2 * emulated["error"] > 0
    assert list(group["product flops per second"]) == in_fp32 and ours["of peak"] > 0
    assert "not timed" in report.model_table(group)


def test_every_backend_of_this_machine_is_measured():
    if pixels.cpp.probe() is not None:
        pytest.skip(pixels.cpp.probe())
    assert set(pixels.implementations(full=True).values()) == set(pixels.cpp.build_config()["isa_supported"])


def test_missing_libraries_are_named_with_the_command():
    assert models.how_to_install(ImportError("no", name="memcnn.models")) == contenders.INSTALL["memcnn"]
    group = judged(row("PyTorch", [4.0], rival=True))
    group["rows"].append({"name": "memcnn", "network": "fp32", "rival": True, "unavailable": "pip install x"})
    assert "pip install x" in report.model_table(group)


def test_a_group_is_measured_from_end_to_end():
    names = ("PyTorch", "PyTorch, checkpoint", "flowkern store", contenders.RECOMPUTE)
    rows = {name: contenders.GLOWS[name] for name in names}
    family = models.Family("glow", SMALL, ("train",), full=False, rows=rows)
    group = family.measure("train", 2)
    found = {r["name"]: r for r in group["rows"]}
    assert all(r["correct"] and len(r["seconds"]) == 2 for r in found.values())
    if "held" in found["PyTorch"]:
        assert found[contenders.RECOMPUTE]["held"] < found["flowkern store"]["held"] < found["PyTorch"]["held"]
    assert found["flowkern store"]["flops"] == 3 * SMALL.flops()
    assert found[contenders.RECOMPUTE]["flops"] == 4 * SMALL.flops()


# Results and the report


@pytest.fixture
def stored(tmp_path) -> Path:
    group = judged(row("PyTorch", [0.4, 0.5, 0.6], rival=True), row("ours", [0.2, 0.25, 0.3]))
    results.write("here-2-models", {"full": False, "load before": 3.0, "groups": {"train": group}}, tmp_path)
    points = {str(k): {"held": k << 20, "peak": 2 * k << 20} for k in (4, 8, 16)}
    times = {str(k): timing.summary([0.1 * k]) for k in (2, 4, 8)}
    sweeps = {"memory": {"sweep": "memory", "points": {"PyTorch": points, contenders.RECOMPUTE: points}},
              **{s: {"sweep": s, "points": {"PyTorch": times}} for s in scaling.SWEEPS}}
    results.write("here-2-scaling", {"groups": sweeps}, tmp_path)
    return tmp_path


def test_report_of_stored_figures(stored):
    topics = report.load(stored, report.chosen(stored, "here-2"))
    text = report.page(topics, stored)
    assert "| ours | fp32 | 250.0 ms" in text.replace("250 ms", "250.0 ms") and "| 2.00 |" in text
    assert "3.0 processes of others" in text and "commit" in text and "K=16" in text
    assert "| PyTorch | 200 | 400 | 800 | 0 + 1e+02 depth | 0% | +0% (+0% to +0%) |" in text.replace("-0%", "+0%")
    assert "## Machines" in text and "| here-2\\* |" in text
    assert [p.suffix for p in report.draw(topics, stored)] == [".svg"] * 3


def test_a_line_is_fitted_and_what_is_off_is_told():
    slope, intercept, off = plots.line_fit([1, 2, 4], [12, 14, 18])
    assert (slope, intercept, off) == (pytest.approx(2), pytest.approx(10), pytest.approx(0, abs=1e-9))
    assert plots.line_fit([1, 2, 4], [1, 4, 16])[2] > 0.3


def test_what_bends_is_told_from_a_line_with_an_intercept():
    xs = [1, 2, 4, 8, 16]
    straight = [[30 + 14 * x + wobble * (-1) ** i for wobble in (0.0, 0.1, -0.1)] for i, x in enumerate(xs)]
    assert abs(plots.bend(xs, straight)[1]) < 1e-9
    assert plots.bend(xs, [[x**2.0] for x in xs])[1] == pytest.approx(1)
    low, middle, high = plots.bend(xs, [[30 + 14 * x + 0.2 * x**2] * 3 for x in xs])
    assert low == middle == high == pytest.approx(0.2 * 256 / (30 + 14 * 16 + 0.2 * 256))


def test_the_readmes_table_is_replaced_between_its_marks():
    text = f"before\n{report.START}\nold\n{report.END}\nafter\n"
    new = report.with_block(text, "| new |")
    assert "old" not in new and "| new |" in new and new.startswith("before") and new.endswith("after\n")
    assert report.with_block(new, "| new |") == new
    with pytest.raises(ValueError, match="no <!--"):
        report.with_block("text", "x")
    readme = (results.ROOT / "README.md").read_text()
    assert readme.count(report.START) == readme.count(report.END) == 1


def test_machines_side_by_side(tmp_path):
    group = judged(row("PyTorch", [4.0] * 3, rival=True), row("flowkern store", [1.25] * 3),
                   row("flowkern recompute", [1.0] * 3, error=1.0))
    for name in ("b-2", "a-2"):
        results.write(f"{name}-models", {"groups": {"train": group}}, tmp_path)
    *_, first, second = report.machines_table(tmp_path).splitlines()
    assert first.startswith("| a-2 | 3.20 | wrong result") and second.startswith("| b-2 | 3.20") and "–" in second
    results.write("a-2-models", {"load before": 64.0, "groups": {"train": group}}, tmp_path)
    assert report.machines_table(tmp_path).splitlines()[2].startswith("| a-2\\* | 3.20")


def test_no_figures_is_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="pytest bench"):
        report.chosen(tmp_path, None)
    results.write("there-2-models", {"groups": {"small": {}}}, tmp_path)
    for arguments, message in ((["--machine", "nosuch"], "no figures of nosuch in .*; --machine takes there-2"),
                               (["--machine", "there-2", "--readme"], "these figures have no training step")):
        monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        assert stopped.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_some_groups_do_not_take_the_place_of_all_of_another_commit(tmp_path, monkeypatch):
    every, name = ("a", "b"), results.machine()

    def measured(*groups):
        book = Book(tmp_path, False)
        for group in groups:
            book.group("ops", group, lambda group=group: {"what": group, "at": results.environment()["commit"]}, every)
        return {p.name: sorted(json.loads(p.read_text())["groups"]) for p in tmp_path.glob("*.json")}

    whole, partial = f"{name}-ops.json", f"{name}-ops-partial.json"
    monkeypatch.setattr(results, "_commit", lambda: "one")
    assert measured("a") == {whole: ["a"]} and measured("b") == {whole: ["a", "b"]}
    monkeypatch.setattr(results, "_commit", lambda: "another")
    assert measured("b") == {whole: ["a", "b"], partial: ["b"]}
    assert json.loads((tmp_path / whole).read_text())["environment"]["commit"] != "another"
    assert measured("a") == {whole: ["a", "b"]}
    assert measured("a") == {whole: ["a", "b"]}
    monkeypatch.setattr(results, "_commit", lambda: "another with changes")
    assert measured("a") == {whole: ["a", "b"], partial: ["a"]} and measured("b") == {whole: ["a", "b"], partial: ["b"]}
    stored = json.loads((tmp_path / whole).read_text())
    assert stored["environment"]["commit"] == "another" and {g["at"] for g in stored["groups"].values()} == {"another"}


def test_a_commit_is_unknown_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.environment()["commit"] == "unknown"


def test_result_files_keep_lists_of_numbers_on_a_line(tmp_path):
    path = results.write("x", {"seconds": [0.123456789, 2.0], "bad": float("nan"), "names": ["a"]}, tmp_path)
    assert '"seconds": [0.123457, 2.0]' in path.read_text()
    found = json.loads(path.read_text())
    assert found["bad"] is None and found["environment"]["machine"] == results.machine()


def test_virtual_machines_of_two_generations_have_two_names(monkeypatch):
    told = {"model name": ["AMD EPYC"] * 2, "cpu family": ["26"] * 2}
    monkeypatch.setattr(results, "_cpuinfo", told.get)
    newer = results.machine()
    told["cpu family"] = ["25"] * 2
    older = results.machine()
    assert newer.startswith("amd-epyc-1ah-") and older == newer.replace("1ah", "19h")


def test_scaling_runs_small():
    small = Setup(levels=1, depth=1, hidden=8, size=8, batch=2, scale="sigmoid")
    found = scaling.times("batch", small, (1, 2), rounds=2)
    assert set(found["points"][contenders.RECOMPUTE]) == {"1", "2"}


@pytest.mark.parametrize("op", ["couple", "mix_vjp"])
def test_a_nan_in_any_result_of_an_op_is_no_small_error(op):
    case = next(case for case in ops.cases(False) if case.op == op)
    results = [t.clone() for t in ops.tensors(getattr(reference, op)(*case.arguments()))]
    assert case.error(results) < 1e-4
    results[-1].view(-1)[0] = torch.nan
    row = {"error": case.error(results), "error budget": 1.0, "rival": False}
    pixels.judge(row)
    assert not row["correct"]


def test_quick_figures_are_no_full_ones(monkeypatch):
    monkeypatch.setattr(results, "_commit", lambda: "one")
    found = {"environment": results._readable(results.environment()), "full": True}
    assert results.same(found, {"full": True}) and not results.same(found, {"full": False})


def test_figures_that_cannot_be_written_leave_those_before(tmp_path, monkeypatch):
    path = results.write("some", {"found": 1}, tmp_path)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        results.write("some", {"found": 2}, tmp_path)
    assert path.read_text() == before
