"""Command line: `python -m horen_bench model=... method=... dataset=... n=...` (Hydra)."""

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console

from horen_bench.config.compose import plain_words
from horen_bench.config.settings import resolved
from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.results.console import checkpoint_tables, notes
from horen_bench.runner import RunResult, run

_ERROR, _INTERRUPTED = 2, 130


def main() -> None:
    """Do what the command line says; exit code 2 after an error of the user, 130 after an interruption.

    In a sweep a run that fails says why, and the others go on.
    """
    failed: list[str] = []
    main_process = os.getpid()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing and exiting

    def job(config: DictConfig) -> None:
        console = Console()
        try:
            _show(run(resolved(config), console), console)
        except UserError as error:
            if wants_traceback:
                raise
            failed.append(str(error))
            _complain(str(error))
            if os.getpid() != main_process:  # of a launcher: its list stays there, its error comes back
                raise

    try:
        hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name="config")(job)()
    except KeyboardInterrupt:
        Console().print("interrupted; the same command goes on from the last saved edit")
        sys.exit(_INTERRUPTED)
    except HydraException as error:
        if wants_traceback:
            raise
        _complain(plain_words(error))
        sys.exit(_ERROR)
    except UserError as error:
        if wants_traceback:
            raise
        failed.append(str(error))
    if failed:
        sys.exit(_ERROR)


def _show(result: RunResult, console: Console) -> None:
    console.print(checkpoint_tables(result.rows))
    problem = [result.tracking_problem] if result.tracking_problem else []
    for note in [*notes(result.rows), *problem]:
        console.print(f"note: {note}", highlight=False, markup=False)
    state = "already finished, nothing was run (force=true runs it again)" if result.reused else "stored"
    console.print(f"{state}: {result.store.path}", highlight=False, markup=False, soft_wrap=True)


def _complain(sentence: str) -> None:
    Console(stderr=True).print(f"error: {sentence}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
