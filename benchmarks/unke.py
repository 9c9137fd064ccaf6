"""Milliseconds per edit of UnKE's two engines, and where they go, on the same edits in one run; CPU time without a GPU.

    python benchmarks/unke.py                                    the embedded model, one CPU thread
    python benchmarks/unke.py --target-tokens 200                targets of so many tokens
    python benchmarks/unke.py --model llama31_8b --device cuda   a real shape at random initialisation

`value` is stage 1, the target vector; `states` what is read at the block before stage 2; `block` its training.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import arguments, cases, editor_of, model_and_tokenizer, what_ran
from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor
from horen_bench.profiling import peak_memory

STAGES = {"_target_vectors": "value", "block_targets": "states", "_train": "block"}


def measured(editor: Editor[Any], edits: list[EditCase]) -> dict[str, float]:
    """Milliseconds per edit after a warm-up, in all and by stage; the parameters are put back."""
    editor.edit(edits[:1])
    spent = dict.fromkeys(STAGES.values(), 0.0)
    for method, stage in STAGES.items():
        setattr(editor, method, timed(getattr(editor, method), spent, stage))
    started = now()
    editor.edit(edits)
    total = now() - started
    editor.detach()
    return {"all": 1000 * total / len(edits)} | {stage: 1000 * seconds / len(edits) for stage, seconds in spent.items()}


def now() -> float:
    """Seconds: wall time with the GPU's queue emptied, or CPU time, which other processes disturb less."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(method: Any, spent: dict[str, float], stage: str) -> Any:
    """The method, adding its time to a stage."""

    def call(*args: Any) -> Any:
        started = now()
        result = method(*args)
        spent[stage] += now() - started
        return result

    return call


def lengthened(case: EditCase, tokenizer: Any, n_tokens: int) -> EditCase:
    """The case with its target repeated up to so many tokens."""
    n_repeats = 1 + n_tokens // len(tokenizer(f" {case.target}", add_special_tokens=False)["input_ids"])
    return replace(case, target=" ".join([case.target] * n_repeats))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--target-tokens", type=int, help="of each target; without it targets are those of the facts")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    if options.target_tokens:
        edits = [lengthened(case, pair[1], options.target_tokens) for case in edits]
    preservation = {"corpus": "embedded:tiny/preservation.txt"}
    table = Table("engine", "ms/edit", *(f"{stage} ms" for stage in STAGES.values()))
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for engine in ("sequential", "cached"):
        times = measured(editor_of("unke", pair, options.model, engine=engine, preservation=preservation), edits)
        table.add_row(engine, f"{times['all']:.0f}", *(f"{times[stage]:.0f}" for stage in STAGES.values()))
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
