"""Signals that end a run: it may finish what it is at, is saved, and ends with the exit code that shells expect."""

import _thread
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# Ctrl-C; what schedulers and `kill` send; a terminal that is closed (not on Windows).
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_PATIENCE = 10.0  # seconds; schedulers kill half a minute after their first signal


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: of the signal.
        saved_n: edits that are saved, from which the next run goes on; None where no run was at work.
    """

    def __init__(self, number: int = signal.SIGINT, saved_n: int | None = None) -> None:
        self.number = number
        self.saved_n = saved_n
        super().__init__(self.sentence)

    @property
    def code(self) -> int:
        """The exit code: 130 after Ctrl-C."""
        return 128 + self.number

    @property
    def sentence(self) -> str:
        """What happened, and where the same command goes on."""
        where = "there" if self.saved_n is None else f"N={self.saved_n}"
        done = "what is finished is kept" if self.saved_n is None else f"{self.saved_n} edits are saved"
        return f"interrupted by {signal.Signals(self.number).name}: {done}, and the same command goes on from {where}"


class Interruptions:
    """While entered, SIGINT, SIGTERM and SIGHUP raise `Interrupted`, but in a block of `finishing` at its end.

    A signal that the process ignores (`nohup`) stays ignored, and outside the main thread nothing changes.

    Args:
        patience: seconds that a block may take to its end after the first signal; a second signal ends it at once.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience = patience
        self._before: dict[int, Any] = {}
        self._finishing = False
        self._received: int | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop_timer()
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    @property
    def received(self) -> int | None:
        """The signal that came while a block was finishing."""
        return self._received

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A block that a signal does not end at once; see `received` behind it."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False
            self._stop_timer()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self._finishing or self._received is not None:
            self._finishing = False
            raise Interrupted(number if self._received is None else self._received)
        self._received = number
        self._timer = threading.Timer(self._patience, _thread.interrupt_main, [number])
        self._timer.daemon = True
        self._timer.start()
        # Not through sys.stderr, which the signal may have caught in the middle of a write.
        os.write(2, f"\n{signal.Signals(number).name}: finishing these edits; once more ends at once\n".encode())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
