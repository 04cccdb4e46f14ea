"""Reading files of tensors without executing anything, and checking that a dialect used them all."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NESTED = ("state_dict", "model_state_dict", "model", "graph", "net", "glow")  # where trainers put the weights
# What readers raise for files that are cut off, or of another kind.
_BROKEN = (
    SafetensorError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError,
    zipfile.BadZipFile,
)


def read(source) -> tuple[dict[str, Tensor], str]:
    """Named tensors of a file (.npz, .safetensors, or what torch.save wrote) or of a mapping, and a name for messages.

    The prefix `module.` of DataParallel is taken off. Raises FileNotFoundError or ValueError in one sentence.
    """
    if isinstance(source, Mapping):
        return _tensors(source, "the given mapping"), "the given mapping"
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            numbers = {name: torch.from_numpy(a) for name, a in found.items() if a.dtype.kind in "biuf"}
            return _tensors(numbers, path), str(path)
        if path.suffix == ".safetensors":
            return _tensors(load_file(path), path), str(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled Python objects, which are never executed here; save model.state_dict() in its stead"
        ) from error
    except _BROKEN as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or not a file of tensors: {why}") from error
    return _tensors(loaded, path), str(path)


def _tensors(loaded, what) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):  # beside the weights there may be a tensor of the trainer's
        loaded = next((loaded[k] for k in NESTED if isinstance(loaded.get(k), Mapping)), loaded)
    tensors = {k: v.detach() for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise ValueError(f"{what} holds no named tensors")
    return {name.removeprefix("module."): t for name, t in tensors.items()}


class Reader:
    """Tensors by name, in double precision; missing ones are noted and stood in for, so that all can be told at once.

    `check` raises for what was missing, misshapen or left over; `dtype` is what a Glow takes the file's weights as: in
    half precision, which they may be stored in, a state would be of no use.
    """

    def __init__(self, tensors: dict[str, Tensor], what: str, dialect: str):
        self._tensors, self._what, self._dialect = tensors, what, dialect
        self._used: set[str] = set()
        self._missing: dict[str, tuple] = {}
        self._misshapen: dict[str, tuple] = {}
        stored = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        self.dtype = torch.promote_types(stored, torch.float32)
        self.path = None if what == "the given mapping" else Path(what)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def count(self, pattern) -> int:
        """How many of pattern(0), pattern(1), ... begin a tensor's name, without a gap."""
        n = 0
        while any(name.startswith(pattern(n)) for name in self._tensors):
            n += 1
        return n

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor on which others' depend. Raises ValueError where it is missing."""
        if name not in self._tensors:
            raise ValueError(f"{self._what} is no {self._dialect} Glow: it has no {name}")
        return tuple(self._tensors[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, of that shape."""
        tensor = self._tensors.get(name)
        self._used.add(name)
        if tensor is None:
            self._missing[name] = shape
        elif tuple(tensor.shape) != shape:
            self._misshapen[name] = shape
        else:
            return tensor.to(torch.float64)
        # Where a matrix is expected, one that has an inverse.
        stand_in = torch.zeros(shape, dtype=torch.float64)
        if len(shape) >= 2:
            stand_in.view(*shape[:2], -1)[:, :, 0].fill_diagonal_(1)
        return stand_in

    def ignore(self, *names: str) -> None:
        """Tensors that carry nothing to load: constants, classifiers, optimizer states."""
        self._used.update(names)

    def reject(self, reason: str):
        """Raise ValueError for a model that can't be represented; for missing tensors, if that is why."""
        if self._missing or self._misshapen:
            self.check(everything_read=False)
        raise ValueError(f"{self._what} can't be loaded: {reason}")

    def check(self, everything_read: bool = True) -> None:
        """Raise ValueError, in one sentence, that lists every tensor that was missing, misshapen or never used."""
        unused = [name for name in self._tensors if everything_read and name not in self._used]
        left = {name: tuple(self._tensors[name].shape) for name in unused}
        problems = [
            f"{len(found)} {kind} ({', '.join(map(describe, found.items()))})"
            for kind, found, describe in (
                ("missing", self._missing, lambda item: f"{item[0]} {item[1]}"),
                ("unknown", left, lambda item: f"{item[0]} {item[1]}"),
                (
                    "of another shape",
                    self._misshapen,
                    lambda item: f"{item[0]} {tuple(self._tensors[item[0]].shape)} instead of {item[1]}",
                ),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"the tensors in {self._what} are not those of a {self._dialect} Glow: {'; '.join(problems)}"
            )
