"""`python -m train.denoise CHECKPOINT IMAGE ...`: a trained network denoises pictures."""

import argparse
import io
import os
import sys
from pathlib import Path

from train import extras
from train.command import MISTAKES

DESCRIPTION = """\
Denoise pictures with a network that `python -m train.unfolded` trained. Each result is written beside its picture as
NAME-denoised.EXT, or NAME-denoised-2.EXT and so on if that is taken: nothing is ever overwritten."""

DETAILS = """\
pictures:
  All formats that Pillow reads, and 16-bit PNG and TIFF; of a file with several pictures, the first. PNG, TIFF, BMP,
  PPM and TGA keep their format if it can hold the result, others (JPEG, ...) become PNG. 16-bit PNG and TIFF, and
  16-bit grey of any format, stay 16-bit; all else is 8-bit. Results are turned upright as EXIF says. Alpha stays as it
  is; the colour profile is kept and, except in TIFF, EXIF data.
  Grey stays grey: the network wants three channels, so it gets grey in each, and the result is their mean. Palettes,
  CMYK and the like become RGB.

noise:
  A network trained with --noise-aware is told how strong the noise is: by --sigma, or as estimated from each picture.
  The estimate takes fine texture for noise; it is printed. Any other network removes noise of the strength that it was
  trained for: weaker noise comes out too smooth, stronger noise is left in. What it was trained for is printed if the
  run's config.yaml is there.

exit status:
  0  every picture was denoised
  1  some could not be read, denoised or written; each is named in one line on stderr, and the others are done
  2  none was, or options, checkpoint or paths are wrong; then nothing was written
  130  interrupted; what was reported is written"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with a message and status 2 on unknown options and values."""
    parser = argparse.ArgumentParser(
        prog="python -m train.denoise",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one written by Unfolded.save_pretrained")
    parser.add_argument(
        "image", nargs="+", help="a picture, or a folder: all pictures in it and in its folders but NAME-denoised ones"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results here; made if missing")
    parser.add_argument(
        "--sigma",
        type=float,
        help="standard deviation of the noise on pixels in [0, 1], for a network that is told (default: estimated from "
        "each picture)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is")
    parser.add_argument(
        "--tile", type=int, default=256, help="side of the tiles that the network sees, in pixels (default: 256)"
    )
    parser.add_argument(
        "--overlap", type=int, default=64, help="by how many pixels tiles overlap at least (default: 64)"
    )
    parser.add_argument("--batch", type=int, default=4, help="tiles at once; lower it if memory runs out (default: 4)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status, as --help lists them; mistakes end in one sentence on stderr."""
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text at all
    try:
        extras.require()
        from train import denoising, noise_level, picture_files, tiling  # take seconds to import, so --help comes first

        files = picture_files.find(options.image)
        net = denoising.load(options.checkpoint, options.device)
        denoising.check_level(net, options.sigma)
        settings = {name: getattr(options, name) for name in ("tile", "overlap", "batch")}
        settings["multiple"] = tiling.grid(net)
        tiling.check(**settings)
        if options.out and options.out.is_file():
            raise NotADirectoryError(f"{options.out} is a file; --out wants a folder")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        for folder in {options.out or file.parent for file in files}:
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"results can't be written into {folder}: it is write-protected; pass --out")
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(denoising.trained_for(options.checkpoint, noise_level.is_told(net)), flush=True)
    failed = 0
    for file in files:
        try:
            print(denoising.denoise(net, file, options.out or file.parent, options.sigma, **settings), flush=True)
        except KeyboardInterrupt:
            print(f"interrupted at {file}", file=sys.stderr)
            return 130
        except denoising.FAILURES as error:
            print(f"error: {file}: {error}", file=sys.stderr)
            failed += 1
    return 0 if not failed else 1 if failed < len(files) else 2


if __name__ == "__main__":
    sys.exit(main())
