"""Floating-point work: what a device can do, and what value training makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import Pair, seconds_of
from horen_bench.cases import EditCase
from horen_bench.editors.codebook import parallel
from horen_bench.editors.codebook.adaptors import VectorAdaptor
from horen_bench.editors.codebook.parallel import train_values
from horen_bench.editors.codebook.training import Schedule, ValueJob
from horen_bench.models.architecture import check_linear, linear_sizes
from horen_bench.models.partial import UpperLayers
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import PromptEncoder


def matrix_rate(dtype: torch.dtype, device: str, size: int, repeats: int = 10) -> float:
    """FLOP/s of a square matrix product of random numbers: the most that anything made of products can reach."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), repeats)


def copy_rate(device: str, n_bytes: int, repeats: int = 10) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds_of(lambda: target.copy_(source), repeats)


def operations_of(action: Callable[[], object]) -> int:
    """FLOPs of the matrix products and attentions in a call."""
    with FlopCounterMode(display=False) as counter:
        action()
    return int(counter.get_total_flops())


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of value training.

    Attributes:
        batch: values trained side by side.
        prepare: seconds of the pass that reads the states of all edits.
        step: seconds of one step of all edits.
        step_operations: FLOPs of it.
    """

    batch: int
    prepare: float
    step: float
    step_operations: float

    @property
    def rate(self) -> float:
        """FLOP/s reached in a step."""
        return self.step_operations / self.step


class ValueTraining:
    """Vectors of some edits, trained side by side at one module, without the rest of an editor.

    Args:
        pair: model and tokenizer.
        module: dotted path of the module whose output they are added to.
        edits: what they say.
    """

    def __init__(self, pair: Pair, module: str, edits: Sequence[EditCase]) -> None:
        model, tokenizer = pair
        encoder = PromptEncoder(tokenizer)
        self.upper = UpperLayers(model, module)
        self._adaptor = VectorAdaptor(linear_sizes(check_linear(model, module, where="module"))[1], 1.0)
        generator = torch.Generator().manual_seed(0)
        self.jobs = [
            ValueJob(i, encoder.edit(case.prompt, case.target), self._adaptor.initial(generator))
            for i, case in enumerate(edits)
        ]

    def run(self, n_steps: int, batch: int | None = None) -> dict[int, torch.Tensor]:
        """Train every value for so many steps; the values by position.

        Raises:
            ValueError: a job was yielded twice.
        """
        schedule = Schedule(self._adaptor.learning_rate, n_steps, None)
        yielded = list(train_values(self.jobs, self.upper, self._adaptor.added, schedule, batch))
        values = {job.position: trained.value["vector"] for job, trained in yielded}
        if len(values) < len(yielded):
            raise ValueError("value training yielded a job twice")
        return values

    def batch(self) -> int:
        """Values that the automatic batch size puts side by side."""
        return min(len(self.jobs), parallel._fitting_batch(self.upper))

    def speed(self, n_steps: int) -> Speed:
        """Time and work of a step, from a run of so many steps less one of none."""
        batch = self.batch()
        self.run(n_steps, batch)
        watch = Stopwatch()
        self.run(0, batch)
        prepare = watch.elapsed()
        watch = Stopwatch()
        self.run(n_steps, batch)
        step = max(1e-9, watch.elapsed() - prepare) / n_steps
        work = operations_of(lambda: self.run(2, batch)) - operations_of(lambda: self.run(0, batch))
        return Speed(batch, prepare, step, work / 2)
