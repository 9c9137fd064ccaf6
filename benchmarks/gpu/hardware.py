"""Step `hardware`: what the machine is, and the two rates that bound everything else."""

import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from gpu.suite import Figure, Step
from work import copy_rate, matrix_rate


def run(step: Step) -> None:
    """Device, driver and versions; matrix products in bfloat16 and float32; a copy."""
    step.measure("machine", lambda: machine(step.device))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        step.measure(f"matrix product {name}", partial(product, step, dtype))
    step.measure("copy", lambda: copy(step))


def machine(device: str) -> Iterator[Figure]:
    """What a figure may depend on beside the code."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield Figure("device", properties.name)
        yield Figure("memory", properties.total_memory / 2**30, "GiB")
        yield Figure("multiprocessors", properties.multi_processor_count)
        yield Figure("compute capability", f"{properties.major}.{properties.minor}")
        yield Figure("driver", _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
        yield Figure("CUDA", str(torch.version.cuda))
        yield Figure("cuDNN", str(torch.backends.cudnn.version()))  # type: ignore[no-untyped-call]
    else:
        yield Figure("device", f"{platform.machine()} CPU")
    yield Figure("Python", platform.python_version())
    for package in ("torch", "transformers"):
        yield Figure(package, version(package))
    yield Figure("commit", _output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"))


def product(step: Step, dtype: torch.dtype) -> Iterator[Figure]:
    """The rate of a large square product of random numbers."""
    rate = matrix_rate(dtype, step.device, step.settings["matrix"], step.settings["repeats"])
    yield Figure("rate", rate / 1e12, "TFLOP/s")


def copy(step: Step) -> Iterator[Figure]:
    """Bytes read and written per second."""
    yield Figure("bandwidth", copy_rate(step.device, step.settings["copied"], step.settings["repeats"]) / 1e12, "TB/s")


def _output_of(*command: str) -> str:
    """What a program prints, in one line; `unknown` where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
