"""Saved models: a folder with the weights (safetensors) and the configuration (JSON), enough by itself."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flowkern import stored

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write(path: str | Path, module: nn.Module, config: dict) -> None:
    """Write the folder `path`, made if missing. An interruption leaves previous files whole.

    Raises ValueError for weights that stand for others, which the module that the configuration makes would not have,
    and OSError where there is no room.
    """
    _check_plain(module, config)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory, as those of tied folds do.
    weights = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, t in module.state_dict().items()}
    try:
        save_file(weights, path / f"{WEIGHTS}.partial", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path / WEIGHTS} can't be written: {error}") from error
    (path / f"{CONFIG}.partial").write_text(json.dumps(config, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        with (path / f"{name}.partial").open("rb") as file:
            os.fsync(file.fileno())  # a name must not come to stand for what is not on the disk yet
        (path / f"{name}.partial").replace(path / name)


def read(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights of the saved `kind` (a class name, for messages) in the folder `path`.

    Raises FileNotFoundError for a missing file, ValueError for one that is truncated or of another kind.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved {kind}: it has no {name}")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} is not the configuration of a {kind}")
    try:
        return config, load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} is truncated or not a safetensors file: {error}") from error


def fill(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """`load_state_dict`, with one sentence (ValueError) that names the first tensors that don't fit."""
    own = module.state_dict()
    missing = [f"{name} {tuple(own[name].shape)}" for name in own if name not in weights]
    unknown = [f"{name} {tuple(weights[name].shape)}" for name in weights if name not in own]
    changed = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", changed))
        if names
    ]
    if problems:
        raise ValueError(f"{what} don't fit this configuration: {'; '.join(problems)}")
    module.load_state_dict(weights)


def _check_plain(module: nn.Module, config: dict) -> None:
    for name, part in module.named_modules():
        pruned = stored.pruned(part)
        changed = is_parametrized(part)
        made_by = type(part).__mro__[changed].__module__  # a parametrized module is of a class derived from its own
        # Networks and operators of one's own are made by their owner, parametrizations and all.
        own = config.get("network") == "custom" and ".coupling.net" in name or not made_by.startswith("flowkern.")
        if not own and (pruned or changed):
            what, undo = "pruned", "prune.remove"
            if not pruned:
                what, undo = "parametrized", "parametrize.remove_parametrizations"
            raise ValueError(
                f"{name} is {what}, which a saved configuration can't say; make it final first "
                f"(torch.nn.utils.{undo}), or save the state_dict"
            )
