"""The helper that counts allocated bytes is itself tested: it must see what it should, and refuse what it can't."""

import memory_cases as cases
import numpy as np
import pytest

from bench import memory

MIB = 1 << 20
SLACK = 16 << 10     # glibc's rounding of large blocks, and Python's own objects


def near(mib: float):
    return pytest.approx(mib * MIB, abs=SLACK)


@pytest.fixture(scope="module")
def seen():
    return memory.measure(cases.together, bytes_=MIB)


def test_marks_peaks_and_single_allocations(seen):
    known = seen["known"]
    assert known["middle"] == near(10) and known["end"] == near(3)
    assert known["peak"] == near(10) and known["peak after"] == near(10) and known["peak before"] == near(10)
    assert known["peak without kept"] == near(7)
    assert known["kept"] == near(3) and known["of its size"] == near(3)


def test_a_native_leak_is_seen(seen):
    assert seen["leak"] == near(1)


def test_every_entrance_of_the_allocator_is_counted(seen):
    assert len(seen["entrances"]) == 8
    for name, (allocated, left) in seen["entrances"].items():
        assert allocated == near(1), name
        assert abs(left) < SLACK, name


def test_scratch_that_pytorch_does_not_count_is_seen(seen):
    counted = seen["convolution"]
    packed_weights = 48 * 40 * 9 * 4
    assert counted["peak"] - counted["result"] > packed_weights
    assert counted["seen by PyTorch"] < counted["result"] + packed_weights


def test_a_storing_implementation_is_told_from_a_lean_one(seen):
    assert seen["lean"] < SLACK
    assert seen["wasteful"] == near(4)


def test_gradients_are_told_apart_exactly(seen):
    counted = seen["gradient"]
    assert counted["gradient"] == near(4) and counted["peak"] == near(10) and counted["rest"] == near(6)


def test_memory_mapped_past_the_allocator_is_refused():
    with pytest.raises(RuntimeError, match="mapped without the C allocator"):
        memory.measure(cases.mapping, bytes_=4 * MIB)


def test_a_full_ledger_is_refused():
    with pytest.raises(RuntimeError, match="do not fit a ledger of 1000"):
        memory.measure(cases.overfull, entries=1000)


def test_a_failure_in_the_measured_process_is_told():
    with pytest.raises(RuntimeError, match="a cross word"):
        memory.measure(cases.fail)


def test_an_uncounted_process_is_refused():
    with pytest.raises(RuntimeError, match="bench.memory.measure"), memory.record():
        pass


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="C compiler"):
        memory.library()


def test_history_of_the_gpu_allocator_becomes_events():
    trace = [{"action": "segment_alloc", "addr": 0, "size": 1 << 21}, {"action": "alloc", "addr": 512, "size": 1024},
             {"action": "alloc", "addr": 2048, "size": 512}, {"action": "free_requested", "addr": 512, "size": 1024},
             {"action": "free_completed", "addr": 512, "size": 1024}, {"action": "alloc", "addr": 512, "size": 256}]
    events = memory.Events()
    events._fill(memory.cuda_entries(trace), {"early": 2})
    assert (events.held("early"), events.held(), events.peak(), events.peak(after="early")) == (1536, 768, 1536, 1536)
    assert events.peak(without={1}) == 1024
    assert np.array_equal(events.bytes, [1024, 512, -1024, 256])
