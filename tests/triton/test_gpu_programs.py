"""What `make gpu` runs, tried without a GPU, so that it works when there is one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {**os.environ, "FLOWKERN_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_tests():
    few = "autocast or double_precision or (fp64 and triton) or (empty and triton) or (nan and separate)"
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", few)
    assert "passed" in told and "failed" not in told


def test_the_benchmark_and_its_report(tmp_path):
    told = run("-m", "bench.gpu", "--trial", "--parts", "ops", "depths", "--out", str(tmp_path))
    assert told.count('"backend": "triton"') == told.count('"backend": "reference"') == 10
    run("-m", "bench.gpu_report", str(tmp_path / "gpu-trial.json"), "--folder", str(tmp_path))
    page = (tmp_path / "gpu-figures.md").read_text()
    assert page.count("| mix_vjp | 12 |") == 1 and page.count("| flowkern recompute | 2 |") == 1
    assert (tmp_path / "gpu-memory.svg").stat().st_size > 1000


def test_without_a_gpu_the_benchmark_says_so():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "torch finds no GPU" in done.stderr
