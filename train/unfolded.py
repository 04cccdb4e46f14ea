"""`python -m train.unfolded`: pre-train a Glow, unfold it, train the denoiser end to end, evaluate it, report."""

import sys

from train import extras

# What a user can put right during set-up; later exceptions are defects and keep their traceback.
MISTAKES = (OSError, ValueError, TypeError, RuntimeError, ImportError)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status; a mistake of the user's ends in one sentence on stderr and status 2."""
    try:
        extras.require()
        from train import config

        settings = config.parse(arguments)
        from train import run  # takes seconds to import, so --help and mistakes in options come first

        prepared = run.prepare(settings)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        prepared.train()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
