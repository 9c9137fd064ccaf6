"""Milliseconds per edit of what rewrites weights: cached engine beside the published way, on the same edits.

    python benchmarks/rewriting.py                                    the embedded model, one CPU thread
    python benchmarks/rewriting.py --engine cached                    one engine alone
    python benchmarks/rewriting.py --model llama31_8b --device cuda   a real shape at random initialisation

Statistics and contexts, which are made once, are not counted. On a CPU the thread's own time is measured, so that other
work on the machine counts little, on a GPU wall time. A real shape takes its second moments from `--texts` texts of the
embedded corpus, with a ridge where they are too few: speed does not depend on their values.
"""

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from common import Pair, arguments, cases, editor_of, model_and_tokenizer, what_ran

_ENGINES = ("sequential", "cached")
_WITH_MOMENTS = ("rome", "memit", "alphaedit")


def overrides(method: str, model: str, texts: int) -> list[str]:
    """What a real shape is measured with in place of the settings of its `conf/model/` file."""
    if model == "tiny" or method not in _WITH_MOMENTS:
        return []
    corpus = ["model.statistics.corpus=embedded:tiny/corpus.txt", f"method.statistics.n_texts={texts}"]
    return corpus if method == "alphaedit" else [*corpus, "method.ridge=1.0e-3"]


def milliseconds_per_edit(method: str, engine: str, pair: Pair, model: str, *, n_edits: int, texts: int) -> float:
    """Time of `edit` after a warm-up on one edit; the weights are put back."""
    editor = editor_of(method, pair, model, *overrides(method, model, texts), engine=engine)
    edits = cases(n_edits + 1)
    editor.edit(edits[:1])
    started = now()
    editor.edit(edits[1:])
    seconds = now() - started
    editor.detach()
    return 1000 * seconds / n_edits


def now() -> float:
    """Seconds: wall time with the GPU's queue emptied, or CPU time, which other processes disturb less."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["rome", "memit", "alphaedit", "ft_l", "ft_m"])
    parser.add_argument("--engine", choices=_ENGINES, help="one engine alone; without it both, and their ratio")
    parser.add_argument("--texts", type=int, default=200, help="of the second moments of a real shape")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    engines = (options.engine,) if options.engine else _ENGINES
    table = Table("method", *(f"{engine} ms/edit" for engine in engines), *([] if options.engine else ["ratio"]))
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    for method in options.methods:
        times = [
            milliseconds_per_edit(method, engine, pair, options.model, n_edits=options.edits, texts=options.texts)
            for engine in engines
        ]
        ratio = [] if options.engine else [f"{times[0] / times[1]:.1f}x"]
        table.add_row(method, *(f"{milliseconds:.0f}" for milliseconds in times), *ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
