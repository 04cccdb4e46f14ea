"""`python -m flowkern`: what was built, which backends run here, and why the others don't."""

import argparse
import platform

import torch

import flowkern
from flowkern import cpp


def report() -> str:
    """The report as text."""
    lines = [f"flowkern {flowkern.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
             f"{platform.machine()}, {torch.get_num_threads()} threads", "backends"]
    for name, state in flowkern.backends().items():
        lines.append(f"  {name:<10} {'runs' if state is True else f'does not run: {state}'}")
    if (why := cpp.probe()) is None:
        built = cpp.build_config()
        threads = "OpenMP, of the runtime that torch loads" if built["openmp"] else "one: built without OpenMP"
        sets = ", ".join(f"{isa} (in use)" if isa == built["isa_active"] else isa for isa in built["isa_compiled"])
        lines += ["native extension",
                  f"  built by   {built['compiler']}, as version {built['version']}",
                  f"  threads    {threads}",
                  f"  CPU        {sets}"]
    else:
        lines.append(f"native extension: none ({why})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowkern", description=__doc__)
    parser.set_defaults(run=lambda _: print(report()))
    parser.add_subparsers(title="commands", metavar="COMMAND")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
