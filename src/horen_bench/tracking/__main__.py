"""W&B beside a run.

python -m horen_bench.tracking workspace --project horen-bench     the dashboard of sequential edits
python -m horen_bench.tracking upload results/runs/*               runs that were not tracked while they ran
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from horen_bench.errors import UserError
from horen_bench.results.atomic import write_text
from horen_bench.tracking import workspace
from horen_bench.tracking.upload import defaults, upload


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.act(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m horen_bench.tracking", description="W&B beside a run.")
    actions = parser.add_subparsers(required=True, metavar="{workspace,upload}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--entity", default="", help="W&B user or team (default: yours)")
    common.add_argument("--project", default=defaults().project, help="W&B project (default: %(default)s)")

    one = actions.add_parser("workspace", parents=[common], help="make the dashboard: scores against edits")
    one.add_argument("--model", action="append", default=[], help="show this model's runs alone; may be repeated")
    one.add_argument("--dataset", action="append", default=[], help="show this dataset's runs alone; may be repeated")
    one.add_argument("--out", type=Path, help="write the specification into this file and save nothing in W&B")
    one.add_argument("--dry-run", action="store_true", help="print the specification and save nothing in W&B")
    one.set_defaults(act=_workspace)

    two = actions.add_parser("upload", parents=[common], help="copy stored runs; nothing is copied twice")
    two.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIRECTORY", help="default: all in results/runs")
    two.add_argument("--offline", action="store_true", help="write local files, to be sent with `wandb sync`")
    two.add_argument("--tag", action="append", default=[], help="label of the runs; may be repeated")
    two.set_defaults(act=_upload)
    return parser


def _workspace(options: argparse.Namespace) -> None:
    built = workspace.build(options.project, options.entity, models=options.model, datasets=options.dataset)
    specification = json.dumps(workspace.specification(built), indent=2) + "\n"
    if options.out is not None:
        write_text(options.out, specification)
    if options.dry_run:
        print(specification, end="")  # noqa: T201
    if not options.dry_run and options.out is None:
        print(workspace.save(built))  # noqa: T201


def _upload(options: argparse.Namespace) -> None:
    runs = options.runs or sorted(path for path in Path("results/runs").glob("*") if path.is_dir())
    if not runs:
        raise UserError("results/runs holds no runs; name run directories.")
    mode = "offline" if options.offline else "online"
    changes = {"project": options.project, "entity": options.entity or None, "mode": mode, "tags": options.tag}
    for run in runs:
        state = "copied" if upload(run, changes) else "nothing new; files written offline are sent with `wandb sync`"
        print(f"{run}: {state}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
