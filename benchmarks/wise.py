"""WISE: milliseconds per edit of the plain engine, the cached one, and the cached one with shards side by side.

    python benchmarks/wise.py                                    the embedded model, one CPU thread
    python benchmarks/wise.py --model llama31_8b --device cuda   a real shape at random initialisation

All write the same edits, each as a shard of its own. `difference` is the largest between the side weights and those of
the plain engine, over the largest change that an edit made, after ten steps: at the published learning rate further
steps amplify rounding, whatever computes them. CPU time is what counts on a machine that others use too.
"""

import argparse
import time
from typing import Any

import torch
from common import cases, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.config.compose import composed
from horen_bench.config.settings import build_editor, resolved
from horen_bench.editors.wise import WiseEditor
from horen_bench.profiling import Stopwatch, peak_memory

_PUBLISHED = 3327  # ms per edit of the published code on a prototype of the embedded model, one CPU thread


def wise(pair: tuple[Any, Any], name: str, engine: str, shards_at_once: int, *more: str) -> WiseEditor:
    """WISE as `conf/` sets it for a model, but for shards of one edit, which are never merged."""
    shards = [f"method.shards_at_once={shards_at_once}", "method.save_freq=1", "method.merge_freq=1000000"]
    config = resolved(composed([f"model={name}", "method=wise", f"method.engine={engine}", *shards, *more]))
    editor = build_editor(config, *pair)
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
    return torch.stack([one.weight - editor._linear.weight for one in editor.memories])


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", type=int, default=48, help="of the cached engine")
    parser.add_argument("--plain-edits", type=int, default=4, help="of the plain engine, which is slow")
    parser.add_argument("--shards", type=int, nargs="*", default=[2, 4, 8], help="numbers of shards side by side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits, few = cases(options.edits), cases(options.plain_edits)
    table = Table("engine", "ms/edit, wall", "CPU", "ratio", "published code / ours", "steps/edit", "difference")
    table.title = f"{what_ran(options.model, options.device)}; {time.strftime('%Y-%m-%d')}"
    plain = (0.0, 0.0, 0.0)
    expected = torch.zeros(0)
    for engine, at_once in (("sequential", 1), *(("cached", n) for n in (1, *options.shards))):
        built = (pair, options.model, engine, at_once)
        wall, processor, steps = found = milliseconds(wise(*built), few if engine == "sequential" else edits)
        moved = changes(wise(*built, "method.n_steps=10"), few)
        if engine == "sequential":
            plain, expected = found, moved
        published = f"{_PUBLISHED / processor:.1f}x" if options.model == "tiny" else "--"
        difference = float((moved - expected).abs().max() / expected.abs().max())
        label = engine if at_once == 1 else f"{engine}, {at_once} shards"
        figures = (f"{wall:.0f}", f"{processor:.0f}", f"{plain[1] / processor:.1f}x", published, f"{steps:.1f}")
        table.add_row(label, *figures, f"{difference:.1e}")
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
