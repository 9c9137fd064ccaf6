"""Questions per second at a checkpoint: asking everything, and asking only what the memory can have changed.

    python benchmarks/evaluation.py --edits 1000

Both give the same answers, which is checked here as well.
"""

import argparse
import time

import torch
from common import cases, horen, model_and_tokenizer, what_ran
from rich.console import Console
from rich.table import Table

from horen_bench.evaluation import Examiner, protocol_of, questions_about
from horen_bench.profiling import Stopwatch, peak_memory


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = model_and_tokenizer(options.model, options.device)
    edits = cases(options.edits)
    questions = questions_about(edits)
    examiner = Examiner(model, tokenizer, protocol_of("greedy", "generate"), options.batch_size)
    base = examiner.ask(questions)
    editor = horen(model, tokenizer, options.model, "parallel")
    editor.edit(edits)

    watch = Stopwatch()
    everything = examiner.ask(questions)
    all_seconds = watch.elapsed()

    watch = Stopwatch()
    routes = editor.routes([question.prompt for question in questions])
    asking = [i for i, route in enumerate(routes) if route is None or route.matched]
    answers = dict(enumerate(base)) | dict(zip(asking, examiner.ask([questions[i] for i in asking]), strict=True))
    few_seconds = watch.elapsed()

    watch = Stopwatch()
    for question in questions[:50]:
        examiner.ask([question])
    single = watch.elapsed() / 50

    same = sum(answers[i] == answer for i, answer in enumerate(everything))
    table = Table("way", "questions decoded", "seconds", "questions/s", "ratio to one by one")
    table.title = f"{what_ran(options.model, options.device)}; {len(questions)} questions, {time.strftime('%Y-%m-%d')}"
    for way, decoded, seconds in (
        ("one by one (from 50)", len(questions), single * len(questions)),
        ("everything, batched", len(questions), all_seconds),
        ("what the memory can have changed", len(asking), few_seconds),
    ):
        speed = len(questions) / seconds
        table.add_row(way, f"{decoded}", f"{seconds:.1f}", f"{speed:,.0f}", f"{speed * single:.1f}x")
    table.caption = f"same answers: {same} of {len(questions)}; peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
