"""Checkpoints of other Glow implementations, read into `flowkern.Glow`: one short file for each.

A dialect is a module with

    NAME            what `dialect=` calls it
    SHIFT           what it subtracts from images in [0, 1]
    matches(names)  whether these tensors are its own
    convert(file, **options) -> (arguments of `flowkern.Glow`, its state_dict)

`file` is a `Reader`, which hands out tensors by name and remembers what was missing, misshapen or never asked for.
"""

import torch

from flowkern.dialects import chaiyujin, glowip, normflows, openai, rosinality
from flowkern.dialects.reader import Reader, read

DIALECTS = {module.NAME: module for module in (rosinality, chaiyujin, glowip, openai, normflows)}


def load(source, dialect: str | None = None, size=None, **options) -> tuple[dict, dict, torch.dtype]:
    """Arguments, state_dict and dtype of the `flowkern.Glow` that equals the model in `source` (a path, or named
    tensors). size: of the images, an int or (H, W), needed where the file does not tell it.

    Raises FileNotFoundError; ValueError for a file that is not one of tensors, is of no known dialect, or whose tensors
    don't fit it (all of them listed, with shapes); TypeError for an option that the dialect does not have.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(map(repr, DIALECTS))}")
    tensors, what = read(source)
    found = [name for name, module in DIALECTS.items() if module.matches(tensors)]
    if dialect is None:
        if len(found) != 1:
            raise ValueError(
                f"the tensors in {what} are of no known dialect ({', '.join(DIALECTS)}); the first are "
                f"{', '.join(sorted(tensors)[:3])}"
            )
        dialect = found[0]
    file = Reader(tensors, what, dialect)
    module = DIALECTS[dialect]
    try:
        arguments, state = module.convert(file, **options)
    except TypeError as error:
        if "convert()" in str(error):
            raise TypeError(f"dialect {dialect!r}: {str(error).replace('convert() ', '')}") from None
        raise
    file.check()
    channels, known = arguments["size"]
    size = size or known
    if size is None:
        raise ValueError(f"{what} does not tell the size of its images; pass size=(H, W)")
    arguments["size"] = (channels, *((size, size) if isinstance(size, int) else size))
    return {"shift": module.SHIFT, **arguments}, state, file.dtype
