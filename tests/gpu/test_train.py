"""Training on the GPU: a run from its settings to its folder, in both precisions, from graphs and without."""

import json

import pytest
import torch
from gpu_device import DEVICE

pytest.importorskip("lightning", reason="the GPU's machine has no training extra")

from train_cases import draw_pictures, network, rows, tiny  # noqa: E402

import flowkern  # noqa: E402
from train import config, evaluate, run  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16-mixed", "likelihood": 1e-3}, {"prox": "unet", "cuda_graphs": False}],
    ids=["graphs", "bf16", "unet"],
)
def test_a_run(settings, pictures, tmp_path):
    path = run.prepare(tiny(pictures, tmp_path / "run", **settings)).train()
    results = json.loads((path / "results.json").read_text())
    assert results["methods"]["unfolded"]["training_mib"] > 0
    assert rows(path, "unfolded")[-1]["step"] == "8"
    net = network(path).to(DEVICE).eval()
    y = torch.rand(2, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        assert net(y).isfinite().all()


@pytest.mark.parametrize("backend", [name for name in ("triton", "cuda") if flowkern.backends().get(name) is True])
def test_a_backend_that_the_cpu_does_not_have(backend, pictures, tmp_path):
    """ActNorms are initialised, memory is measured and networks are evaluated where it runs."""
    path = run.prepare(tiny(pictures, tmp_path / "run", backend=backend)).train()
    assert config.load(path / "config.yaml").backend == backend
    evaluate.prepare([str(path)], evaluate.Settings(out=str(tmp_path / "evaluated"), references=["tv"]))()
    assert (tmp_path / "evaluated" / "results.json").is_file()
