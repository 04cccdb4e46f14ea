"""`python -m flowkern`: what was built, which backends run here, and why the others don't.

`python -m flowkern audit CHECKPOINT`: how exactly a saved Glow, or each fold's Glow of a saved Unfolded, inverts, and
how good the gradient is that recomputation gives.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

import flowkern
from flowkern import cpp, saving
from flowkern.audit import Audit, audit, smooth_fields


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
                  f"  CPU        {sets}",
                  f"  CUDA       {cuda_built(built)}"]
    else:
        lines.append(f"native extension: none ({why})")
    return "\n".join(lines)


def cuda_built(built: dict) -> str:
    """What the extension holds for GPUs, or why nothing."""
    if built["cuda"] is None:
        return f"none: {built['cuda_missing']}"
    targets = ", ".join(f"sm_{arch}" for arch in built["cuda"].split())
    return f"kernels for {targets} and later, by {built['cuda_compiler']}"


def load_glows(path: str, **options) -> dict[str, flowkern.Glow]:
    """The Glow saved in a folder, or those of a saved Unfolded's folds, by name. Raises what `from_pretrained` does."""
    config, _ = saving.read(path, "Glow")
    if "kind" not in config:
        return {"Glow": flowkern.Glow.from_pretrained(path, **options)}
    if config["kind"] != "GlowProx":
        raise ValueError(f"{path} holds an Unfolded with a {config['kind']}, in which there is no Glow to audit")
    net = flowkern.Unfolded.from_pretrained(path, **options)
    return {f"fold {k + 1}": prox.glow for k, prox in enumerate(net.proxes)}


def read_images(files: list[str], size: tuple[int, int, int]) -> Tensor:
    """The middle (C, H, W) of each picture of 8 or 16 bits, stacked: (N, C, H, W) in [0, 1]. Raises ValueError, naming
    the file.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError:
        raise ValueError("reading pictures needs Pillow: pip install pillow") from None
    c, h, w = size
    if c not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels and this Glow wants {c}; leave out --image")
    batch = []
    for file in files:
        try:
            with Image.open(file) as picture:
                deep = picture.mode.startswith("I;16")  # of one channel, which `convert` would clip at 255
                if not deep and picture.mode in ("I", "F"):
                    raise ValueError(f"{file} is of mode {picture.mode}, on no known scale; 8 and 16 bits are read")
                pixels = np.array(picture if deep else picture.convert("L" if c == 1 else "RGB"))
        except OSError as error:
            raise ValueError(f"{file} is not a readable picture: {error}") from error
        height, width = pixels.shape[:2]
        if height < h or width < w:
            raise ValueError(f"{file} is {height}x{width} and the Glow wants at least {h}x{w}")
        top, left = (height - h) // 2, (width - w) // 2
        pixels = torch.from_numpy(pixels[top : top + h, left : left + w].astype(np.float32).reshape(h, w, -1))
        batch.append((pixels / (65535 if deep else 255)).expand(h, w, c).permute(2, 0, 1))
    return torch.stack(batch)


def audit_table(found: Audit) -> str:
    """The audit as text, a row per level."""
    rows = [("level", "steps", "channels", "rebuilt x", "smallest", "largest", "gradient error", ""),
            ("", "", "", "off by", "scale", "cond(M)", "recomputed", "stored")]
    for level in found.levels:
        errors = (level.gradient, level.stored_gradient)
        rows.append((str(level.level), str(level.steps), str(level.channels), f"{level.reconstruction:.1e}",
                     f"{level.smallest_scale:.3g}", f"{level.condition:.3g}", *(f"{e:.1e}" for e in errors)))
    rows.append(("all", "", "", f"{found.reconstruction:.1e}", "", "", f"{found.gradient:.1e}",
                 f"{found.stored_gradient:.1e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def run_audit(arguments: argparse.Namespace) -> int:
    """Print the audit of a checkpoint. Returns 0, 1 when a level is of concern, 2 when nothing could be measured."""
    try:
        glows = load_glows(arguments.checkpoint, backend=arguments.backend, anchor_every=arguments.anchor_every)
        glow = next(iter(glows.values()))
        if arguments.image:
            x = read_images(arguments.image, glow.size)
            source = f"the middle of {len(x)} picture(s)"
        else:
            x = smooth_fields(arguments.batch, glow.size)
            source = f"{len(x)} smooth random fields (seed 0), which are no pictures; --image FILE measures on yours"
        found = {}
        for name, glow in glows.items():
            glow.compute_dtype = getattr(torch, arguments.network) if arguments.network else None
            found[name] = audit(glow, x.to(next(glow.parameters()).dtype))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    parameters, dtype = sum(p.numel() for p in glow.parameters()), next(glow.parameters()).dtype
    print(f"{Path(arguments.checkpoint)}: {tuple(glow.size)}, {parameters:,} parameters in {dtype}, "
          f"networks in {arguments.network or 'the same'}, anchors {arguments.anchor_every or 'none'}")
    print(f"batch: {source}")
    for name, result in found.items():
        print(f"\n{name}\n{audit_table(result)}")
        for sentence in result.concerns or ["rebuilding activations is as good as storing them"]:
            print(f"-> {sentence}")
    return int(any(result.concerns for result in found.values()))


def positive(text: str) -> int:
    """An int >= 1 for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants an integer >= 1, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowkern", description=__doc__.splitlines()[0])
    parser.set_defaults(run=lambda _: print(report()))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    command = commands.add_parser(
        "audit", help="how exactly a saved Glow inverts, and how good its recomputed gradient is",
        description="Per level: by how much inverse(forward(x)) misses the level's input x (largest deviation over the "
                    "root mean square of x; in the last row over the whole model and in the image's units), the "
                    "smallest coupling scale, the largest condition number of a channel mix, and the relative error of "
                    "the likelihood's gradient against double precision, with activations recomputed and stored. "
                    "Exit status: 1 when a level is of concern, 2 when nothing could be measured.")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder written by save_pretrained")
    command.add_argument("--image", nargs="+", metavar="FILE", help="pictures to measure on, cut to the Glow's size")
    command.add_argument("--batch", type=positive, default=4, metavar="N", help="without --image: how many fields")
    command.add_argument("--anchor-every", type=positive, metavar="N", help="measure with an exact state every N steps")
    command.add_argument("--network", choices=("bfloat16", "float32", "float64"), help="precision of coupling networks")
    command.add_argument("--backend", default="auto", help="backend of the pixel ops (default: auto)")
    command.set_defaults(run=run_audit)
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    main()
