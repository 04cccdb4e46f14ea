"""Unfolded networks in folders: what is saved comes back the same, and what could not come back is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrizations
from unfolded_cases import EXACT, MEASUREMENTS, Mask, make_glow, make_net, measured

import flowkern
from flowkern.operators import OPERATORS, Identity, Operator


@pytest.mark.parametrize("kind", ["network", "prox"])
def test_what_could_not_be_loaded_is_not_saved(kind, tmp_path):
    class Own(flowkern.ResNetProx):
        pass

    if kind == "network":
        glow = flowkern.Glow((3, 8, 8), levels=2, depth=1, network=lambda a, b: nn.Conv2d(a, b, 1))
        prox = flowkern.GlowProx(glow)
    else:
        prox = Own(3, 4)
    with pytest.raises(ValueError, match="only an Unfolded of alike, library-made proxes"):
        flowkern.Unfolded(prox, folds=2).save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_saved_and_loaded_is_bitwise_the_same(tmp_path):
    net = make_net(dtype=torch.float32, final="consistency", init="adjoint")
    net.save_pretrained(tmp_path)
    loaded = flowkern.Unfolded.from_pretrained(tmp_path, memory="checkpoint")
    y = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(y), net(y))
    assert (loaded.final, loaded.init, loaded.proxes[0].glow.memory) == ("consistency", "adjoint", "checkpoint")
    assert all(prox.glow.is_initialized for prox in loaded.proxes)
    make_net().save_pretrained(tmp_path)
    assert flowkern.Unfolded.from_pretrained(tmp_path).mu.dtype == torch.float64


def test_broken_checkpoints(tmp_path):
    net = flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), folds=2)
    with pytest.raises(FileNotFoundError, match="is not a saved Unfolded: it has no config.json"):
        flowkern.Unfolded.from_pretrained(tmp_path)
    net.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    saved, content = json.loads(config.read_text()), weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        flowkern.Unfolded.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config.write_text(json.dumps(saved | {"folds": 3}))
    with pytest.raises(
        ValueError, match="don't fit this configuration: .* missing .* 1 of another shape .mu .2,. instead"
    ):
        flowkern.Unfolded.from_pretrained(tmp_path)
    net.proxes[0].glow.save_pretrained(tmp_path / "glow")
    with pytest.raises(ValueError, match="does not hold the configuration of an Unfolded"):
        flowkern.Unfolded.from_pretrained(tmp_path / "glow")
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        flowkern.Unfolded.from_pretrained(tmp_path)


@pytest.mark.parametrize("consistency", ["gradient", "exact"])
@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name != "own"])
def test_saved_and_loaded_with_its_operator(name, consistency, tmp_path):
    if consistency == "exact" and name not in EXACT:
        return
    options = {"consistency": consistency, "noise_aware": True, "sigma_ref": 0.1}
    net = make_net(2, torch.float32, operator=MEASUREMENTS[name](), **options)
    net.save_pretrained(tmp_path)
    loaded = flowkern.Unfolded.from_pretrained(tmp_path)
    y = measured(net.operator, dtype=torch.float32)
    assert torch.equal(loaded(y, sigma=0.15), net(y, sigma=0.15))
    assert type(loaded.operator) is type(net.operator) and loaded.operator.config == net.operator.config
    assert {option: getattr(loaded, option) for option in options} == options
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in net.named_parameters()]
    net.double().save_pretrained(tmp_path)
    assert {p.dtype for p in flowkern.Unfolded.from_pretrained(tmp_path).parameters()} == {torch.float64}


def test_a_registered_operator_of_ones_own_is_saved(monkeypatch, tmp_path):
    class Negative(Operator):
        def forward(self, x):
            return -x

        adjoint = forward

    net = make_net(1, torch.float32, operator=Negative())
    with pytest.raises(ValueError, match="save the state_dict of this one"):
        net.save_pretrained(tmp_path)
    monkeypatch.setitem(OPERATORS, "Negative", Negative)
    net.save_pretrained(tmp_path)
    assert isinstance(flowkern.Unfolded.from_pretrained(tmp_path).operator, Negative)
    monkeypatch.delitem(OPERATORS, "Negative")
    with pytest.raises(ValueError, match="configuration has a 'kind' among .* got 'Negative'"):
        flowkern.Unfolded.from_pretrained(tmp_path)


def test_an_operator_of_ones_own_may_be_parametrized(monkeypatch, tmp_path):
    """Its class makes it so again."""

    class Learned(Operator):
        def __init__(self):
            super().__init__()
            self.inside = parametrizations.weight_norm(nn.Conv2d(3, 3, 1, bias=False))

        def forward(self, x):
            return self.inside(x)

        adjoint = forward

        @classmethod
        def from_config(cls, config):
            return cls()

    monkeypatch.setitem(OPERATORS, "Learned", Learned)
    net, y = make_net(dtype=torch.float32, operator=Learned()), torch.rand(2, 3, 8, 8)
    net.save_pretrained(tmp_path)
    assert torch.equal(flowkern.Unfolded.from_pretrained(tmp_path)(y), net(y))


def test_folders_from_before_there_were_operators(tmp_path):
    net = make_net(dtype=torch.float32)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {name: config[name] for name in ("folds", "init", "final", "kind", "prox")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded, y = flowkern.Unfolded.from_pretrained(tmp_path), torch.rand(2, 3, 8, 8)
    assert isinstance(loaded.operator, Identity) and torch.equal(loaded(y), net(y))
    for wrong in ({"operator": {"kind": "Blur"}}, {"operator": None}, {"consistency": "none"}, {"sigma_ref": "x"}):
        (tmp_path / "config.json").write_text(json.dumps(old | wrong))
        with pytest.raises(ValueError) as caught:
            flowkern.Unfolded.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"operator": Mask()}, {"init": lambda y: y}])
def test_what_a_configuration_cannot_name_is_not_saved(options, tmp_path):
    with pytest.raises(ValueError, match="save the state_dict of this one"):
        flowkern.Unfolded(flowkern.GlowProx(make_glow(dtype=torch.float32)), **options).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    one, other = make_glow(dtype=torch.float32), make_glow(dtype=torch.float32)
    with torch.no_grad():
        other.levels[0].steps[0].actnorm.bias.add_(1)
    one.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_folder_has_its_configuration_last(tmp_path, monkeypatch):
    """Which is how it is known to be complete."""
    glow, replace = make_glow(dtype=torch.float32), Path.replace

    def once(self, target):
        replace(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        glow.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_disk_without_room_is_told_as_that(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr("flowkern.saving.save_file", full)
    with pytest.raises(OSError, match="model.safetensors can't be written: I/O error: File too large"):
        make_glow(dtype=torch.float32).save_pretrained(tmp_path)
