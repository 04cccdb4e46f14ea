"""Dataclasses of settings as command lines: an option a field, with its group and its explanation."""

from dataclasses import field, fields

PHOTOS = "photos"  # for `--data`: scikit-image's photographs, no folder


def setting(group: str, default, text: str):
    """A field of a dataclass of settings: its group in --help, default and explanation."""
    return field(default=default, metadata={"group": group, "help": text})


def add_settings(result, settings: type, hidden: tuple[str, ...] = ()) -> None:
    """An option per field of a dataclass of settings, for a jsonargparse.ArgumentParser. Those of `hidden` groups or
    names are accepted, but not in --help.
    """
    import jsonargparse  # of the extra, for which `command.run` looks first

    groups = {}
    for f in fields(settings):
        group = f.metadata["group"]
        unseen = group in hidden or f.name in hidden
        # An empty group would print its title: settings that are not shown go to the parser itself.
        place = result if unseen else groups.setdefault(group, result.add_argument_group(group))
        option = "--" + f.name.replace("_", "-")
        text = jsonargparse.SUPPRESS if unseen else f.metadata["help"]
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        if f.type is bool:
            switch = jsonargparse.ActionYesNo(yes_prefix="", no_prefix="no-")
            place.add_argument(option, action=switch, default=default, help=text)
        else:
            place.add_argument(option, type=f.type, default=default, help=text)
