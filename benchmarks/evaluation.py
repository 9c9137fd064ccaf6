"""Probes per second at a checkpoint: predicting all of them, and only those that the memory can have changed.

    python benchmarks/evaluation.py --edits 1000

Both give the same predictions, which is checked here as well.
"""

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from common import arguments, cases, horen, model_and_tokenizer, what_ran
from horen_bench.evaluation.probes import probes_of
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.profiling import Stopwatch, peak_memory
from horen_bench.prompts import PromptEncoder

_ALONE = 50  # probes predicted one by one


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    probes = probes_of(edits)
    evaluator = TokenMatchEvaluator(
        model=pair[0],
        encoder=PromptEncoder(pair[1]),
        batch_size=options.batch_size,
        protocol=protocol_of("greedy", "generate"),
    )
    base = evaluator.predict(probes)
    editor = horen(pair, options.model)
    editor.edit(edits)

    watch = Stopwatch()
    everything = evaluator.predict(probes)
    all_seconds = watch.elapsed()

    watch = Stopwatch()
    routes = editor.routes([probe.prompt for probe in probes])
    unknown = [i for i, route in enumerate(routes) if route is None or route.matched]
    new = evaluator.predict([probes[i] for i in unknown])
    predictions = dict(enumerate(base)) | dict(zip(unknown, new, strict=True))
    few_seconds = watch.elapsed()

    watch = Stopwatch()
    alone = probes[:_ALONE]
    for probe in alone:
        evaluator.predict([probe])
    single = watch.elapsed() / len(alone)
    editor.detach()

    same = sum(predictions[i] == prediction for i, prediction in enumerate(everything))
    n_tokens = sum(len(prediction.ids) for prediction in everything)
    table = Table("way", "probes decoded", "seconds", "probes/s", "ratio to one by one")
    table.title = f"{what_ran(options.model, options.device)}; {len(probes)} probes, {time.strftime('%Y-%m-%d')}"
    for way, decoded, seconds in (
        (f"one by one (from {len(alone)})", len(probes), single * len(probes)),
        ("everything, batched", len(probes), all_seconds),
        ("what the memory can have changed", len(unknown), few_seconds),
    ):
        speed = len(probes) / seconds
        table.add_row(way, f"{decoded}", f"{seconds:.1f}", f"{speed:,.0f}", f"{speed * single:.1f}x")
    table.caption = (
        f"same predictions: {same} of {len(probes)}; batches of {options.batch_size}: {n_tokens / all_seconds:,.0f} "
        f"tokens/s; peak memory {peak_memory() / 2**20:.0f} MiB"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
