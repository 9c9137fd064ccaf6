"""WISE: milliseconds per edit of the cached engine beside the plain one, and whether both wrote the same.

    python benchmarks/wise.py                                    the embedded model, one CPU thread
    python benchmarks/wise.py --model llama31_8b --device cuda   a real shape at random initialisation

Both engines write the same first edits; `difference` is the largest between their side weights, over the largest change
that an edit made. CPU time is what counts on a machine that others use too.
"""

import argparse
import time
from typing import Any

import torch
from common import cases, model_and_tokenizer, what_ran
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.editors.wise import WiseEditor
from horen_bench.measurement import Stopwatch, peak_memory
from horen_bench.resources import resource

_PUBLISHED = 3327  # ms per edit of the published code on a prototype of the embedded model, one CPU thread


def wise(pair: tuple[Any, Any], name: str, engine: str) -> WiseEditor:
    """WISE as `conf/method/wise.yaml` sets it for a model."""
    method = OmegaConf.load(resource("conf") / "method" / "wise.yaml")
    spec = OmegaConf.load(resource("conf") / "model" / f"{name}.yaml")
    values: Any = OmegaConf.to_container(OmegaConf.create({"method": method, "model": spec}), resolve=True)
    constants = {k: v for k, v in values["method"].items() if k not in ("_target_", "name", "label")}
    return WiseEditor(*pair, seed=42, **{**constants, "engine": engine})


def measured(
    pair: tuple[Any, Any], name: str, engine: str, edits: list[EditCase], n_compared: int
) -> tuple[float, float, float, Tensor]:
    """Wall and CPU milliseconds per edit, steps per edit, and the change of the weight after `n_compared` edits."""
    editor = wise(pair, name, engine)
    editor.edit(edits[:1])  # contexts and the engine's own set-up
    editor.detach()
    editor = wise(pair, name, engine)
    watch, processor = Stopwatch(), time.process_time()
    records = editor.edit(edits[:n_compared])
    assert editor.live is not None
    change = editor.live.weight - editor._linear.weight
    records += editor.edit(edits[n_compared:])
    wall, processor = watch.elapsed(), time.process_time() - processor
    editor.detach()
    n = len(edits)
    return 1000 * wall / n, 1000 * processor / n, sum(record.steps for record in records) / n, change


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", type=int, default=50, help="of the cached engine")
    parser.add_argument("--plain-edits", type=int, default=5, help="of the plain engine, which is slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    plain = measured(pair, options.model, "sequential", edits[: options.plain_edits], options.plain_edits)
    fast = measured(pair, options.model, "cached", edits, options.plain_edits)
    table = Table("engine", "ms/edit, wall", "ms/edit, CPU", "steps/edit")
    table.title = f"{what_ran(options.model, options.device)}; {time.strftime('%Y-%m-%d')}"
    for label, found in (("sequential", plain), ("cached", fast)):
        table.add_row(label, f"{found[0]:.0f}", f"{found[1]:.0f}", f"{found[2]:.1f}")
    difference = float((fast[3] - plain[3]).abs().max() / plain[3].abs().max())
    parts = [f"cached is {plain[1] / fast[1]:.1f}x in CPU time", f"difference {difference:.1e}"]
    if options.model == "tiny":
        parts.append(f"published code {_PUBLISHED} ms: {_PUBLISHED / fast[1]:.1f}x")
    table.caption = "; ".join([*parts, f"peak memory {peak_memory() / 2**20:.0f} MiB"])
    Console().print(table)


if __name__ == "__main__":
    main()
