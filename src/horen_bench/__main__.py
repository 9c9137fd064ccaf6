"""Command line: `python -m horen_bench model=... method=... dataset=... n=...` (Hydra)."""

import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console

from horen_bench.errors import UserError
from horen_bench.resources import resource
from horen_bench.settings import resolved
from horen_bench.stream import RunResult, run
from horen_bench.tables import checkpoint_tables, notes

_ERROR, _INTERRUPTED = 2, 130


def main() -> None:
    """Run what the command line says; exit code 2 after an error of the user, 130 after an interruption."""
    console = Console()
    full_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing and exiting
    entry: Callable[[], None] = hydra.main(
        version_base="1.3", config_path=str(resource("conf")), config_name="config"
    )(lambda config: _job(config, console))
    try:
        entry()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last saved edit")
        sys.exit(_INTERRUPTED)
    except (UserError, HydraException) as error:
        if full_traceback:
            raise
        _complain(error)
        sys.exit(_ERROR)


def _job(config: DictConfig, console: Console) -> None:
    _show(run(resolved(config), console), console)


def _show(result: RunResult, console: Console) -> None:
    console.print(checkpoint_tables(result.rows))
    problem = [result.tracking_problem] if result.tracking_problem else []
    for note in [*notes(result.rows), *problem]:
        console.print(f"note: {note}", highlight=False)
    state = "already finished, nothing was run (force=true runs it again)" if result.reused else "stored"
    console.print(f"{state}: {result.store.path}", highlight=False, soft_wrap=True)


def _complain(error: Exception) -> None:
    Console(stderr=True).print(f"error: {_sentence(error)}", highlight=False, markup=False, soft_wrap=True)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
