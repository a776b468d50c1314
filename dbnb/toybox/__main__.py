"""`python -m dbnb.toybox`: photographs of a toy of your own, to train on."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dbnb.toybox import ACCESSORIES, COLORS, KINDS, PATTERNS, Toy
from dbnb.toybox.sample import PICTURES, write_toy


def _parser() -> argparse.ArgumentParser:
    colors = f"one of {', '.join(COLORS)}, or '#rrggbb'"
    parser = argparse.ArgumentParser(
        prog="python -m dbnb.toybox", description="Photograph a toy of your own: pictures to train on, and others."
    )
    parser.add_argument("--kind", default="dog", help=f"one of {', '.join(KINDS)} (default: %(default)s)")
    parser.add_argument("--body", default="red", help=f"colour of the body: {colors} (default: %(default)s)")
    parser.add_argument(
        "--accent", default="white", help="colour of ears, pattern and accessory (default: %(default)s)"
    )
    parser.add_argument("--pattern", default="plain", help=f"one of {', '.join(PATTERNS)} (default: %(default)s)")
    parser.add_argument("--accessory", default="none", help=f"one of {', '.join(ACCESSORIES)} (default: %(default)s)")
    parser.add_argument("--head", type=float, default=1.0, help="size of the head, 0.6 to 1.4 (default: %(default)s)")
    parser.add_argument("--girth", type=float, default=1.0, help="of the body, 0.6 to 1.4 (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, help="where photos/ and references/ go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures and print how to train on them; returns the exit code: 0, or after one sentence 2."""
    settings = vars(_parser().parse_args(argv))
    folder = Path(settings.pop("output_dir"))
    try:
        toy = Toy(**settings)
        photographs = write_toy(toy, folder)
    except (ValueError, OSError) as error:
        print(f"dbnb.toybox: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{len(shots)} pictures in {folder / name}" for name, shots in PICTURES.items()))
    command = ["python", "-m", "dbnb", "--instance_data_dir", str(photographs), "--class_word", toy.kind]
    print(shlex.join([*command, "--reference_data_dir", str(folder / "references")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
