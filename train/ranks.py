"""The processes of one training run, as `torchrun` starts them; alone, everything here does nothing.

Only the first process touches the run's folder and speaks. What it finds out, the others are told.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 for the first or only one."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_count() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def start() -> None:
    """Connect the processes: with nccl if there are GPUs, else with gloo."""
    if count() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Disconnect them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; if it raises there, all raise."""
    if count() == 1:
        return make()
    told: list = [None, None]
    if is_first():
        try:
            told[0] = make()
        except Exception as error:  # carried to all processes and raised below
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        dist.barrier()
