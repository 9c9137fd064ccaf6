"""Milliseconds per edit of what rewrites weights: cached engine beside the published way, on the same edits.

    python benchmarks/rewriting.py                 the embedded model, one CPU thread

Statistics and contexts, which are made once, are not counted. Measured is the thread's own CPU time, so that other work
on the machine counts little.
"""

import argparse
import time
from typing import Any

import torch
from common import cases, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table

from horen_bench.config.compose import build, composed
from horen_bench.config.settings import resolved


def milliseconds_per_edit(method: str, engine: str, n_edits: int) -> float:
    """CPU time of `edit` after a warm-up on one edit."""
    model, tokenizer = model_and_tokenizer("tiny", "cpu")
    settings: dict[str, Any] = {**resolved(composed([f"method={method}"]))["method"], "engine": engine}
    editor = build(settings, "method", model=model, tokenizer=tokenizer, seed=42)
    edits = cases(n_edits + 1)
    editor.edit(edits[:1])
    started = time.process_time()
    editor.edit(edits[1:])
    return 1000 * (time.process_time() - started) / n_edits


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["rome", "memit", "alphaedit", "ft_l", "ft_m"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("method", "sequential ms/edit", "cached ms/edit", "ratio")
    table.title = f"{what_ran('tiny', 'cpu')}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for method in options.methods:
        plain, fast = (milliseconds_per_edit(method, engine, options.edits) for engine in ("sequential", "cached"))
        table.add_row(method, f"{plain:.0f}", f"{fast:.0f}", f"{plain / fast:.1f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
