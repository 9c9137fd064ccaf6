"""WISE: milliseconds per edit of the plain engine, the cached one, and the cached one with shards side by side.

    python benchmarks/wise.py                                    the embedded model, one CPU thread
    python benchmarks/wise.py --model llama31_8b --device cuda   a real shape at random initialisation

All write the same edits, each as a shard of its own. `difference` is the largest between the side weights and those of
the plain engine, over the largest change that an edit made, after ten steps: at the published learning rate further
steps amplify rounding, whatever computes them. CPU time is what counts on a machine that others use too.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import Pair, arguments, cases, editor_of, model_and_tokenizer, what_ran
from horen_bench.cases import EditCase
from horen_bench.editors.wise.editor import WiseEditor
from horen_bench.profiling import Stopwatch, peak_memory

_PUBLISHED = 3327  # ms per edit of the published code on a prototype of the embedded model, one CPU thread


def wise(pair: Pair, name: str, engine: str, shards_at_once: int, **changes: Any) -> WiseEditor:
    """WISE as `conf/` sets it for a model, but for shards of one edit, which are never merged."""
    shards = {"shards_at_once": shards_at_once, "save_freq": 1, "merge_freq": 1_000_000}
    editor = editor_of("wise", pair, name, engine=engine, **shards, **changes)
    assert isinstance(editor, WiseEditor)
    return editor


def milliseconds(editor: WiseEditor, edits: list[EditCase]) -> tuple[float, float, float]:
    """Wall and CPU milliseconds and steps, per edit."""
    editor.edit(edits[:1])  # contexts and the engine's own set-up
    watch, processor = Stopwatch(), time.process_time()
    records = editor.edit(edits)
    wall, processor = watch.elapsed(), time.process_time() - processor
    editor.detach()
    n = len(edits)
    return 1000 * wall / n, 1000 * processor / n, sum(record.steps for record in records) / n


def changes(editor: WiseEditor, edits: list[EditCase]) -> Tensor:
    """What each edit adds to the weight."""
    editor.edit(edits)
    editor.detach()
    return torch.stack([memory.weight - editor.weights.base for memory in editor.weights.stored])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=48, help="of the cached engine")
    parser.add_argument("--plain-edits", type=int, default=4, help="of the plain engine, which is slow")
    parser.add_argument("--shards", type=int, nargs="*", default=[2, 4, 8], help="numbers of shards side by side")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits, few = cases(options.edits), cases(options.plain_edits)
    table = Table("engine", "ms/edit, wall", "CPU", "ratio", "published code / ours", "steps/edit", "difference")
    table.title = f"{what_ran(options.model, options.device)}; {time.strftime('%Y-%m-%d')}"
    plain = (0.0, 0.0, 0.0)
    expected = torch.zeros(0)
    for engine, at_once in (("sequential", 1), *(("cached", n) for n in (1, *options.shards))):
        built = (pair, options.model, engine, at_once)
        wall, processor, steps = times = milliseconds(wise(*built), few if engine == "sequential" else edits)
        moved = changes(wise(*built, n_steps=10), few)
        if engine == "sequential":
            plain, expected = times, moved
        published = f"{_PUBLISHED / processor:.1f}x" if options.model == "tiny" else "--"
        difference = float((moved - expected).abs().max() / expected.abs().max())
        label = engine if at_once == 1 else f"{engine}, {at_once} shards"
        figures = (f"{wall:.0f}", f"{processor:.0f}", f"{plain[1] / processor:.1f}x", published, f"{steps:.1f}")
        table.add_row(label, *figures, f"{difference:.1e}")
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
