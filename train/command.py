"""How every command begins and ends: the extra is there, mistakes are one sentence, all processes agree."""

import sys
from collections.abc import Callable

from train import extras, ranks

# What a user can put right during set-up; later exceptions are defects and keep their traceback.
MISTAKES = (OSError, ValueError, TypeError, RuntimeError, ImportError)


def run(prepare: Callable[[], Callable[[], object]]) -> int:
    """Run a command and return its exit status.

    prepare: checks everything that can be checked and returns what then does the work. What ends early ends in one
    sentence on stderr: a mistake of the user's with status 2, a loss that is no longer finite with 3, a file that can't
    be written or read any more with 4, an interruption with 130, or 143 by SIGTERM. Under torchrun only the first
    process speaks, but for options that can't be parsed, which each refuses.
    """
    try:
        try:
            extras.require()
            ranks.start()
            work = prepare()
        except MISTAKES as error:
            return _told(error, 2)
        try:
            work()
        except FloatingPointError as error:
            return _told(error, 3)
        except OSError as error:
            return _told(f"{error}: make room or mend it, and the same command continues", 4)
        return 0
    except KeyboardInterrupt:
        if ranks.is_first():
            print("interrupted; what has begun is continued by the same command", file=sys.stderr)
        return 130
    finally:
        ranks.stop()


def _told(error: Exception | str, status: int) -> int:
    if ranks.is_first():
        print(f"error: {error}", file=sys.stderr)
    return status
