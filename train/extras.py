"""The check that runs before anything of the `[train]` extra is imported."""

from importlib.util import find_spec

PACKAGES = {
    "lightning": "lightning",
    "jsonargparse": "jsonargparse",
    "torchmetrics": "torchmetrics",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "PIL": "pillow",
    "imagecodecs": "imagecodecs",
    "tifffile": "tifffile",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "tensorboard": "tensorboard",
    "filelock": "filelock",
    "scipy": "scipy",
}


def require(find=find_spec) -> None:
    """Raise ModuleNotFoundError with one sentence that names the extra, if a package of `[train]` is missing."""
    missing = [package for module, package in PACKAGES.items() if find(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"training needs {', '.join(missing)}: install the extra with `pip install -e \".[train]\"`"
        )
