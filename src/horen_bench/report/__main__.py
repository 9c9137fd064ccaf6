"""python -m horen_bench.report [RESULTS_DIR ...] [--out results/report.html]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from horen_bench.errors import UserError
from horen_bench.report import read, report
from horen_bench.results.atomic import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; the exit code, 2 where a run could not be read and is only named on it."""
    parser = argparse.ArgumentParser(prog="python -m horen_bench.report", description="One page about all stored runs.")
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        default=[Path("results")],
        metavar="RESULTS_DIR",
        help="results_dir of the runs (default: results); several are shown together",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: report.html in the first RESULTS_DIR)")
    options = parser.parse_args(arguments)
    out: Path = options.out or options.results[0] / "report.html"
    try:
        runs = read(options.results)
        write_text(out, report(runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    damaged = [run.damage for run in runs if run.damage]
    for sentence in damaged:
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
    print(out)  # noqa: T201
    return 2 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
