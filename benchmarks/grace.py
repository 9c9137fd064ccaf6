"""GRACE and GRACE+Norm: milliseconds per edit of the parallel engine beside the sequential one, on the same edits.

    python benchmarks/grace.py                                    the embedded model, one CPU thread
    python benchmarks/grace.py --model llama31_8b --device cuda   a real shape at random initialisation

All 100 Adam steps are taken, as the published code does.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import arguments, cases, editor_of, milliseconds_per_edit, model_and_tokenizer, what_ran
from horen_bench.editors.base import Editor
from horen_bench.profiling import peak_memory


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=1000, help="of the parallel engine")
    parser.add_argument("--plain-edits", type=int, default=20, help="of the sequential engine, which is slow")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    table = Table("method", "sequential ms/edit", "parallel ms/edit", "ratio", "parallel edits/s")
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for method in ("grace", "grace_norm"):

        def make(engine: str, method: str = method) -> Editor[Any]:
            return editor_of(method, pair, options.model, engine=engine)

        plain = milliseconds_per_edit(lambda: make("sequential"), edits[: options.plain_edits])
        fast = milliseconds_per_edit(lambda: make("parallel"), edits)
        table.add_row(method, f"{plain:.1f}", f"{fast:.2f}", f"{plain / fast:.1f}x", f"{1000 / fast:.1f}")
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
