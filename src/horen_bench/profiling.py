"""What the runner measures around a method: time, memory, and the machine that a number comes from."""

import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Wall time since it was made, with the accelerator's queue emptied at both ends."""

    def __init__(self) -> None:
        _synchronize()
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds."""
        _synchronize()
        return time.perf_counter() - self._started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the GPUs' peak where there is one, else the largest resident size of this process."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: str) -> dict[str, Any]:
    """What a number may depend on beside the configuration."""
    packages = ("horen_bench", "torch", "transformers", "numpy", "tokenizers")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def _git(*words: str) -> str | None:
    """What git says of the checkout that the package runs from; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
