"""`python -m horen_bench model=... method=... dataset=... n=...`."""

import sys

from horen_bench.interruption import Interrupted, Interruptions


def main() -> None:
    """Do what the command line says; exit code 2 after an error, 128 and its number after a signal."""
    try:
        with Interruptions():
            # Behind the door, so that Ctrl-C during the imports is a sentence too.
            from horen_bench.command_line import run_command  # noqa: PLC0415

            code = run_command()
    except KeyboardInterrupt as stop:
        signal = stop if isinstance(stop, Interrupted) else Interrupted()
        print(signal.sentence)  # noqa: T201
        code = signal.code
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
