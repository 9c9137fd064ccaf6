"""Edits per second of the parallel engine beside the sequential one, on the same edits in one run.

    python benchmarks/engines.py                                    the embedded model, one CPU thread
    python benchmarks/engines.py --model llama31_8b --device cuda   a real shape at random initialisation

`all steps` takes 50 Adam steps per edit, as the published code does; `early stopping` is the default. At random
initialisation early stopping means nothing, so only `all steps` is measured there.
"""

import argparse
import time

import torch
from common import cases, horen, milliseconds_per_edit, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table

from horen_bench.cases import EditCase
from horen_bench.profiling import peak_memory


def milliseconds(model_name: str, pair: tuple, engine: str, edits: list[EditCase], stop: bool) -> float:  # type: ignore[type-arg]
    """Of one edit, by HoReN with one engine."""
    changes = {} if stop else {"early_stopping": None}
    return milliseconds_per_edit(lambda: horen(*pair, model_name, engine, **changes), edits)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", type=int, default=1000, help="of the parallel engine")
    parser.add_argument("--plain-edits", type=int, default=40, help="of the sequential engine, which is slow")
    options = parser.parse_args()
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
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
