"""What routing costs as the codebook grows: time per edit, latency of one query, throughput of a batch.

    python benchmarks/codebook_growth.py --sizes 1000 10000 50000 100000

The codebook is filled with random unit keys. `products` are three products of `B x m` by `m x C`, measured alone, the
narrow keys widened as routing does it: routing needs as many (scores, retrieval, scores again). The rest is what growth
costs beside them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import Pair, arguments, cases, fill, horen, model_and_tokenizer, seconds_of, what_ran
from horen_bench.cases import EditCase
from horen_bench.editors.codebook.hopfield import similarities
from horen_bench.profiling import Stopwatch, peak_memory


@dataclass(frozen=True, slots=True)
class Growth:
    """What a codebook of one size costs, in milliseconds.

    Attributes:
        edit: one edit, all in all.
        products: the three products that its routing needs.
        single: routing one query.
        batched: routing one query of a batch.
    """

    edit: float
    products: float
    single: float
    batched: float

    @property
    def rest(self) -> float:
        """One edit apart from the products."""
        return self.edit - self.products


def growth(pair: Pair, model: str, size: int, edits: Sequence[EditCase], **changes: Any) -> Growth:
    """Fill a codebook up to a size, with the first half of the edits to warm up, and measure on the second half."""
    editor = horen(pair, model, **changes)
    half = len(edits) // 2
    editor.edit(edits[:half])
    edits = edits[half:]
    fill(editor, size)
    queries = editor.queries([(1, 2, 3)] * 256)[: editor.block_size()]
    keys = editor.codebook.keys
    product = seconds_of(lambda: similarities(queries, keys), 5) / len(queries)
    single = seconds_of(lambda: editor.match(queries[:1]), 5)
    batched = seconds_of(lambda: editor.match(queries), 3) / len(queries)
    watch = Stopwatch()
    editor.edit(edits)
    seconds = watch.elapsed() / len(edits)
    editor.detach()
    return Growth(1000 * seconds, 3000 * product, 1000 * single, 1000 * batched)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 50_000, 100_000, 300_000])
    parser.add_argument("--edits", type=int, default=256)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(2 * options.edits)
    table = Table(
        "entries", "ms/edit", "products, ms/edit", "the rest", "rest / first", "one query, ms", "queries/s, batch"
    )
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    first_rest = 0.0
    for size in options.sizes:
        # At random initialisation early stopping means nothing.
        changes = {} if options.model == "tiny" else {"early_stopping": None}
        at = growth(pair, options.model, size, edits, **changes)
        first_rest = first_rest or at.rest
        figures = (at.edit, at.products, at.rest, at.rest / first_rest, at.single)
        table.add_row(f"{size:,}", *(f"{figure:.2f}" for figure in figures), f"{1000 / at.batched:,.0f}")
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
