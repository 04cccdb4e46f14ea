"""The folder of a run: where it is, what it holds, and when it may be continued."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from train import config as configuration
from train import ranks
from train.config import Config

ROOT = Path("runs")


@dataclass(frozen=True)
class Folder:
    """Paths inside a run's folder."""

    path: Path
    _lock: list[FileLock] = field(default_factory=list, compare=False, repr=False)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def pictures(self) -> Path:
        """Which files each split had when the run was started."""
        return self.path / "pictures.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def results(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "results.json"

    @property
    def denoised(self) -> Path:
        return self.path / "denoised.png"

    @property
    def reconstructed(self) -> Path:
        return self.path / "reconstructed.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def model(self, stage: str) -> Path:
        """The model that a finished stage leaves, in the form of `save_pretrained`."""
        return self.checkpoints / stage

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has left its model. The configuration is what is written last."""
        return (self.model(stage) / "config.json").is_file()

    def last(self, stage: str) -> Path:
        """The training state that an unfinished stage continues from."""
        return self.checkpoints / f"{stage}-last.ckpt"

    def best(self, stage: str) -> Path:
        """The weights of an unfinished stage's best validation loss."""
        return self.checkpoints / f"{stage}-best.ckpt"

    def lock(self) -> bool:
        """Claim the folder until `unlock`, or until this process ends, however it ends. False if another has it."""
        if self._lock:
            return True
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self._lock.append(lock)
        return True

    def unlock(self) -> None:
        """Let others have the folder."""
        while self._lock:
            self._lock.pop().release()


def choose(config: Config, kind: str) -> Folder:
    """The folder for this run: a new one, not made yet, or that of an interrupted run, which is locked.

    An unfinished run with the same settings is continued: in `out`, or the latest of this `kind` ("unfolded",
    "pretrain", ...) in runs/. With `resume` it must be there, and a finished one only reports again.
    Raises FileExistsError for a folder that is in use, FileNotFoundError or ValueError for one that can't be continued.
    """
    path = Path(config.out) if config.out else _latest(kind)[1]
    named = bool(config.out or config.resume)
    if path is not None and Folder(path).config.is_file():
        folder = Folder(path)
        finished = folder.results.is_file()
        try:
            differing = differences(config, folder)
        except ValueError:
            if named:
                raise
            differing = ["all"]  # not a run of this version: left alone
        if named and finished and not config.resume:
            raise FileExistsError(f"{path} holds a finished run: pass --resume to report again, or another --out")
        if named and differing:
            raise ValueError(f"{path} was started with other settings: {'; '.join(differing)}")
        if not differing and (config.resume or not finished):
            if folder.lock():
                print(f"{path} {'is finished; reporting again' if finished else 'continues'}", flush=True)
                return folder
            if named:
                raise FileExistsError(f"{path} is being written by another process")
    elif config.resume:
        raise FileNotFoundError(f"nothing to resume: {path or ROOT} holds no run")
    return fresh(config.out, kind)


def choose_for_all(config: Config, kind: str) -> Folder:
    """`choose` in the first process, the result in all of them; only the first holds the lock."""
    chosen = []
    path = ranks.from_first(lambda: chosen.append(choose(config, kind)) or chosen[0].path)
    return chosen[0] if chosen else Folder(path)


def fresh(out: str | None, kind: str) -> Folder:
    """A folder for new results: `out`, or the next free number of this `kind` in runs/. It is not made yet.

    Raises FileExistsError if there is something in it.
    """
    path = Path(out) if out else ROOT / f"{kind}-{_latest(kind)[0] + 1:03d}"
    if path.exists() and (not path.is_dir() or any(not _is_beginning(p) for p in path.iterdir())):
        raise FileExistsError(f"{path} exists, is not empty and holds no unfinished run: pass another --out")
    return Folder(path)


def create(folder: Folder, config: Config, pictures: dict[str, str]) -> None:
    """Make the folder, claim it and write into it the settings and which pictures there are (`images.listing`).

    Raises FileExistsError if another process has it, ValueError for a run that was started with other pictures.
    """
    if folder.config.is_file():
        check_pictures(folder, pictures, "put them back as they were, or pass another --out")
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    claim(folder)
    if not folder.config.is_file():
        folder.pictures.write_text(json.dumps(pictures, indent=2) + "\n")
        configuration.save(config, folder.config)
    elif differences(config, folder):
        raise FileExistsError(f"{folder.path} has been taken by another process in the meantime: start again")


def claim(folder: Folder) -> None:
    """Make the folder if it is missing, and lock it. Raises FileExistsError if another process has it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.lock():
        raise FileExistsError(f"{folder.path} is being written by another process")


def check_pictures(folder: Folder, pictures: dict[str, str], advice: str) -> None:
    """Raise ValueError in one sentence if a run was started with other files in these splits than `pictures` lists:
    what it trained on could be among what it is tested on, as pictures without splits are divided by their number.
    """
    if not folder.pictures.is_file():  # a run of before this was written down
        return
    before = json.loads(folder.pictures.read_text())
    changed = [f"{s} {before.get(s)} then, {now} now" for s, now in pictures.items() if before.get(s) != now]
    if changed:
        raise ValueError(f"{folder.path} was started with other pictures ({'; '.join(changed)}): {advice}")


def differences(config: Config, folder: Folder) -> list[str]:
    """The settings in which a run differs from the one in the folder, in words."""
    before, now = configuration.load(folder.config).of_run(), config.of_run()
    return [f"{k} was {before[k]!r} and is now {v!r}" for k, v in now.items() if before[k] != v]


def _is_beginning(path: Path) -> bool:
    """Whether this is what a run leaves that was ended while its folder was made, or an evaluation before its end."""
    empty = path.name == "checkpoints" and path.is_dir() and not any(path.iterdir())
    shown = path.name in ("denoised.png", "reconstructed.png", "table.md") and path.with_name(".lock").exists()
    return empty or shown or path.name in (".lock", "pictures.json") or path.suffix == ".partial"


def _latest(kind: str) -> tuple[int, Path | None]:
    """Number and path of the newest numbered run of this kind, (0, None) if there is none."""
    numbered = [
        (int(p.name.removeprefix(f"{kind}-")), p)
        for p in ROOT.glob(f"{kind}-*")
        if p.name.removeprefix(f"{kind}-").isdecimal()
    ]
    return max(numbered, default=(0, None))
