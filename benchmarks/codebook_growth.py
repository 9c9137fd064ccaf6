"""What routing costs as the codebook grows: time per edit, latency of one query, throughput of a batch.

    python benchmarks/codebook_growth.py --sizes 1000 10000 50000 100000

The codebook is filled with random unit keys. `product` is one `B x m` by `m x C` product, measured alone: routing needs
three of them (scores, retrieval, scores again), and what is left is what growth costs beside the product itself.
"""

import argparse
import time

import torch
from common import cases, horen, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table

from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.profiling import Stopwatch, peak_memory


def fill(editor: HorenEditor, size: int) -> None:
    """Random unit keys with zero values up to `size` entries."""
    generator = torch.Generator().manual_seed(0)
    width = editor.codebook.keys.shape[1]
    for start in range(len(editor.codebook), size, 4096):
        keys = torch.nn.functional.normalize(torch.randn(min(4096, size - start), width, generator=generator), dim=1)
        for key in keys.to(editor.codebook.keys.device):
            entry = editor.codebook.append(key, (0,), 1)
            editor.codebook.set_value(entry, {name: torch.zeros(()) for name in editor.codebook.values})


def seconds_of(action: object, repeats: int) -> float:
    """Mean wall time of a call, after one to warm up."""
    assert callable(action)
    action()
    watch = Stopwatch()
    for _ in range(repeats):
        action()
    return watch.elapsed() / repeats


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 50_000, 100_000, 300_000])
    parser.add_argument("--edits", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    table = Table(
        "entries", "ms/edit", "products, ms/edit", "the rest", "rest / first", "one query, ms", "queries/s, batch"
    )
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    first_rest = 0.0
    for size in options.sizes:
        editor = horen(*pair, options.model, "parallel")
        fill(editor, size)
        queries = editor.queries([(1, 2, 3)] * 256)
        keys = editor.codebook.keys
        block = min(256, editor.block_size())
        product = seconds_of(lambda: queries[:block] @ keys.T, 5) / block  # noqa: B023 - called at once
        single = seconds_of(lambda: editor.match(queries[:1]), 5)  # noqa: B023
        batch = seconds_of(lambda: editor.match(queries[:block]), 3) / block  # noqa: B023
        watch = Stopwatch()
        editor.edit(edits)
        per_edit = 1000 * watch.elapsed() / len(edits)
        rest = per_edit - 3 * 1000 * product
        first_rest = first_rest or rest
        editor.detach()
        table.add_row(
            f"{size:,}",
            f"{per_edit:.2f}",
            f"{3000 * product:.2f}",
            f"{rest:.2f}",
            f"{rest / first_rest:.2f}",
            f"{1000 * single:.2f}",
            f"{1 / batch:,.0f}",
        )
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
