"""Where the time of a call goes: kernels, launches, and waits of the host for the device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from horen_bench.profiling import Stopwatch

_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
_LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}
_WAITS_ON_CPU = {"aten::_local_scalar_dense", "aten::nonzero"}  # what would be a wait on a GPU


@dataclass(frozen=True, slots=True)
class Profile:
    """What a call does, in seconds and numbers.

    Attributes:
        wall: without the profiler.
        kernels: busy time by kernel; on a CPU, by operation, of the operation itself.
        launches: kernels launched; on a CPU, operations called.
        waits: times that the host waited for the device, copies to the host included.
    """

    wall: float
    kernels: Counter[str]
    launches: float
    waits: float

    @property
    def idle(self) -> float:
        """Share of the wall time in which no kernel runs."""
        return max(0.0, 1 - sum(self.kernels.values()) / self.wall)

    def less(self, other: "Profile", times: int) -> "Profile":
        """One of so many equal parts of what this does beyond another."""
        kernels = Counter(
            {name: (spent - other.kernels[name]) / times for name, spent in self.kernels.items() if spent > 0}
        )
        return Profile(
            max(1e-9, (self.wall - other.wall) / times),
            kernels,
            (self.launches - other.launches) / times,
            (self.waits - other.waits) / times,
        )

    def top(self, n: int) -> list[tuple[str, float]]:
        """The `n` kernels with the most time, and their share of all kernels' time."""
        total = sum(self.kernels.values())
        return [(name, spent / total) for name, spent in self.kernels.most_common(n)]


def profile_of(action: Callable[[], object], device: str) -> Profile:
    """Call once for the wall time and once under torch's profiler."""
    watch = Stopwatch()
    action()
    wall = watch.elapsed()
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        action()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in profiler.key_averages():
        names[event.key] += event.count
        if on_gpu and event.device_type.name == "CUDA":
            kernels[event.key] += event.self_device_time_total / 1e6
        elif not on_gpu:
            kernels[event.key] += event.self_cpu_time_total / 1e6
    launches = sum(names[name] for name in _LAUNCHES) if on_gpu else sum(names.values())
    waits = sum(names[name] for name in (_WAITS if on_gpu else _WAITS_ON_CPU))
    return Profile(wall, kernels, launches, waits)
