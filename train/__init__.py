"""The application on top of flowkern: data, training loops and commands. Needs the extra `flowkern[train]`."""

import sys


def _excepthook(kind, error, trace, otherwise=sys.excepthook) -> None:
    """Ctrl-C while a command still imports, for seconds, before `train.command` sees to it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        otherwise(kind, error, trace)


sys.excepthook = _excepthook
