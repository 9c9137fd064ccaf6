"""The command line, read by Hydra: `model=... method=... dataset=... n=...`."""

import os
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from horen_bench.config.compose import in_words, validated
from horen_bench.config.help import help_text
from horen_bench.config.schema import RunConfig
from horen_bench.errors import UserError
from horen_bench.paths import resource

if TYPE_CHECKING:
    from rich.console import Console

    from horen_bench.runner import RunResult

_ERROR = 2  # exit code


def run_command() -> int:
    """Do what the command line says; the exit code, 2 after an error of the user.

    In a sweep a run that fails says why, and the others go on.
    """
    words = sys.argv[1:]
    overrides = [word for word in words if not word.startswith("-")]
    if "--help" in words or "-h" in words:
        print(help_text(overrides))  # noqa: T201
        return 0
    failed: list[str] = []
    started: list[bool] = []
    main_process = os.getpid()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing and exiting

    def job(composed: DictConfig) -> None:
        started.append(True)
        try:
            _run_and_show(validated(composed))
        except UserError as error:
            if wants_traceback:
                raise
            failed.append(str(error))
            _complain(str(error))
            if os.getpid() != main_process:  # of a launcher: its list stays there, its error comes back
                raise

    try:
        hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_traceback or started:
            raise
        failed.append(in_words(error, overrides))
        _complain(failed[-1])
    except UserError as error:
        if wants_traceback:
            raise
        failed.append(str(error))
    return _ERROR if failed else 0


def _run_and_show(config: RunConfig) -> None:
    """One run, its tables and notes.

    What it needs is imported here: a refusal and a page of help need none of it.
    """
    from rich.console import Console  # noqa: PLC0415

    from horen_bench.runner import run  # noqa: PLC0415

    console = Console()
    _show(run(config, console), console)


def _show(result: "RunResult", console: "Console") -> None:
    from horen_bench.results.console import checkpoint_tables, notes  # noqa: PLC0415

    console.print(checkpoint_tables(result.rows))
    for note in [*notes(result.rows), *filter(None, (result.tracking_problem, result.remark))]:
        console.print(f"note: {note}", highlight=False, markup=False)
    state = "already finished, nothing was run (force=true runs it again)" if result.reused else "stored"
    console.print(f"{state}: {result.store.path}", highlight=False, markup=False, soft_wrap=True)


def _complain(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
