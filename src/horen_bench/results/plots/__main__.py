"""Curves of one stored run: `python -m horen_bench.results.plots RUN_DIRECTORY --out results/figures/stress`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from horen_bench.errors import UserError
from horen_bench.results.plots.stream import stream_figure
from horen_bench.results.plots.style import save
from horen_bench.results.store import RunStore


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one run; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horen_bench.results.plots", description="Curves of one stored run."
    )
    parser.add_argument("run", type=Path, help="a run directory, as the run printed it")
    parser.add_argument("--protocol", default="greedy", help="of the checkpoints to draw (default: greedy)")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    options = parser.parse_args(arguments)
    try:
        stored = RunStore(options.run).checkpoints()
        rows = stored[stored["protocol"] == options.protocol]
        if len(rows) < 2:
            raise UserError(
                f"{options.run} has {len(rows)} checkpoints under protocol {options.protocol}; a curve needs at "
                "least two"
            )
        for path in save(stream_figure(rows), {"": rows}, options.out):
            print(path)  # noqa: T201
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
