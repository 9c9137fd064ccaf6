"""Edits per second of the parallel engine beside the sequential one, on the same edits in one run.

    python benchmarks/engines.py                                    the embedded model, one CPU thread
    python benchmarks/engines.py --model llama31_8b --device cuda   a real shape at random initialisation

`all steps` takes 50 Adam steps per edit, as the published code does; `early stopping` is the default. At random
initialisation early stopping means nothing, so only `all steps` is measured there.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import Pair, arguments, cases, horen, milliseconds_per_edit, model_and_tokenizer, model_spec, what_ran
from horen_bench.cases import EditCase
from horen_bench.profiling import peak_memory
from work import ValueTraining, matrix_rate


def milliseconds(model_name: str, pair: Pair, engine: str, edits: list[EditCase], stop: bool) -> float:
    """Of one edit, by HoReN with one engine."""
    changes: dict[str, Any] = {} if stop else {"early_stopping": None}
    return milliseconds_per_edit(lambda: horen(pair, model_name, engine=engine, **changes), edits)


def training_line(model_name: str, pair: Pair, edits: list[EditCase], size: int) -> str:
    """What a step of value training makes of the device."""
    speed = ValueTraining(pair, model_spec(model_name).memory_module, edits).speed(5)
    most = matrix_rate(pair[0].dtype, str(pair[0].device), size)
    return (
        f"value training: {speed.batch} side by side, {1000 * speed.step:.1f} ms a step, {speed.rate / 1e9:,.0f} "
        f"GFLOP/s, {speed.rate / most:.0%} of the {most / 1e9:,.0f} that a {size} x {size} product reaches"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=1000, help="of the parallel engine")
    parser.add_argument("--plain-edits", type=int, default=40, help="of the sequential engine, which is slow")
    parser.add_argument("--matrix", type=int, default=2048, help="rows of the product that gives the matrix rate")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    table = Table("training", "sequential ms/edit", "parallel ms/edit", "ratio", "parallel edits/s")
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for label, stop in (("all steps", False), ("early stopping", True)):
        if stop and options.model != "tiny":
            continue
        plain = milliseconds(options.model, pair, "sequential", edits[: options.plain_edits], stop)
        fast = milliseconds(options.model, pair, "parallel", edits, stop)
        table.add_row(label, f"{plain:.1f}", f"{fast:.2f}", f"{plain / fast:.1f}x", f"{1000 / fast:.1f}")
    memory = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    table.caption = f"{training_line(options.model, pair, edits, options.matrix)}; {memory}"
    Console().print(table)


if __name__ == "__main__":
    main()
