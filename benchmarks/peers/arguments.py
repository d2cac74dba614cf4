"""The command line that all runners share. Runners know nothing of crossmorph; they only read and write files."""

import argparse
from pathlib import Path


def parse(description: str | None, **more: int) -> argparse.Namespace:
    """FIXED, MOVING, OUTPUT (an ITK transform from fixed to moving points), --kind, --start, and ``more``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixed", type=Path)
    parser.add_argument("moving", type=Path)
    parser.add_argument("output", type=Path, help="ITK transform to write, .h5")
    parser.add_argument("--kind", choices=("multi", "mono"), default="multi", help="contrasts differ or not")
    parser.add_argument(
        "--start",
        choices=("own", "header"),
        default="own",
        help="own: centre-of-mass start and linear stages; header: deformation alone, from the world coordinates",
    )
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()
