"""A training command that is killed again and again, each time right after it has saved something, until it finishes.

Run as a script: `python interrupted.py OUT SHARE OPTIONS...`; prints how often it killed. The libraries are imported
once, in this process, which trains nothing itself; every attempt is a fork of it.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401  imported before forking: it takes seconds

from train import command, run, unfolded  # noqa: F401


def attempt(arguments, out, share):
    """Run the command until it has saved a state, and that share of the time longer, so that it comes as far on a fast
    machine as on a slow one; True if it finished before that.
    """
    before, begin = states(out), time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(unfolded.main(arguments))
    end = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"the command failed with status {status}"
            return True
        if end is None and states(out) != before:
            end = begin + (1 + share) * (time.monotonic() - begin)
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def states(out):
    found = {}
    for path in list(Path(out).glob("checkpoints/*-last.ckpt")):
        with contextlib.suppress(FileNotFoundError):  # it has just become the previous one
            found[path.name] = path.stat().st_mtime_ns
    return found


def main():
    torch.set_num_threads(1)
    out, share, *arguments = sys.argv[1:]
    rng = random.Random(0)
    killed = 0
    while not attempt(["--out", out, *arguments], out, rng.random() * float(share)):
        killed += 1
        assert killed < 100, "no attempt gets any further"
    print(f"killed {killed} times")


if __name__ == "__main__":
    main()
