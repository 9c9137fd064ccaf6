"""Stored runs, checked: `python -m horen_bench.results verify results` or `... verify RUN_DIRECTORY ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from horen_bench.errors import UserError
from horen_bench.results.verify import damaged_predictions, problems, run_directories


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what cannot be trusted; the exit code, 1 if there is such a thing, 2 if there is no run."""
    parser = argparse.ArgumentParser(prog="python -m horen_bench.results", description="Checks stored runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="say which cells of stored runs cannot be trusted")
    verify.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of results")
    options = parser.parse_args(arguments)
    try:
        paths = run_directories(options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    sound = [_verified(path) for path in paths]
    predictions = damaged_predictions(paths)
    for sentence in predictions:
        print(sentence)  # noqa: T201
    print(f"{sum(sound)} of {len(sound)} runs are as they were written")  # noqa: T201
    return 0 if all(sound) and not predictions else 1


def _verified(path: Path) -> bool:
    sentences = problems(path)
    print(f"{path}: {'sound' if not sentences else ''}".rstrip())  # noqa: T201
    for sentence in sentences:
        print(f"  {sentence}")  # noqa: T201
    return not sentences


if __name__ == "__main__":
    sys.exit(main())
