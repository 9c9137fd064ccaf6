"""GRACE and GRACE+Norm: milliseconds per edit of the parallel engine beside the sequential one, on the same edits.

    python benchmarks/grace.py                                    the embedded model, one CPU thread
    python benchmarks/grace.py --model llama31_8b --device cuda   a real shape at random initialisation

All 100 Adam steps are taken, as the published code does.
"""

import argparse
import time

import torch
from common import cases, milliseconds_per_edit, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import composed
from horen_bench.config.settings import build_editor, resolved
from horen_bench.profiling import peak_memory


def milliseconds(
    overrides: list[str], pair: tuple[PreTrainedModel, PreTrainedTokenizerBase], edits: list[EditCase]
) -> float:
    """Of one edit, by the method that the overrides choose."""
    return milliseconds_per_edit(lambda: build_editor(resolved(composed(overrides)), *pair), edits)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", type=int, default=1000, help="of the parallel engine")
    parser.add_argument("--plain-edits", type=int, default=20, help="of the sequential engine, which is slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    table = Table("method", "sequential ms/edit", "parallel ms/edit", "ratio", "parallel edits/s")
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for method in ("grace", "grace_norm"):
        overrides = [f"model={options.model}", f"method={method}"]
        plain = milliseconds([*overrides, "method.engine=sequential"], pair, edits[: options.plain_edits])
        fast = milliseconds([*overrides, "method.engine=parallel"], pair, edits)
        table.add_row(method, f"{plain:.1f}", f"{fast:.2f}", f"{plain / fast:.1f}x", f"{1000 / fast:.1f}")
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
