"""Milliseconds per edit of UltraEdit, and of its two forms of the closed-form solution, on the same edits in one run.

    python benchmarks/ultraedit.py                                    the embedded model, one CPU thread
    python benchmarks/ultraedit.py --model llama31_8b --device cuda   a real shape at random initialisation

`plain` solves the `d_in x d_in` system of the paper, `smaller` the `N x N` one of the rows where that is smaller; both
give the same shift. `forward and backward` is what remains without any solution: the floor of the method.
"""

import time
from collections.abc import Sequence
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import arguments, cases, editor_of, model_and_tokenizer, model_spec, what_ran
from horen_bench.cases import EditCase
from horen_bench.editors.ultraedit import editor as ultraedit
from horen_bench.editors.ultraedit.editor import Features, RowStatistics, Shift, UltraEditEditor
from horen_bench.profiling import Stopwatch, peak_memory


def plain_form(features: Features, statistics: RowStatistics, learning_rate: float) -> Shift:
    """The shift from the system that the published code solves."""
    inputs = features.inputs.float()
    normalized = statistics.normalized(features.joined)
    keys, gradients = normalized[:, : inputs.shape[1]], normalized[:, inputs.shape[1] :]
    changes = -learning_rate * keys.square().sum(dim=1, keepdim=True) * gradients
    gram = inputs.T @ inputs + torch.eye(inputs.shape[1], device=inputs.device)
    left: Tensor = torch.linalg.solve(gram, inputs.T).T
    return Shift(left, changes)


def milliseconds_per_edit(editor: UltraEditEditor, edits: list[EditCase]) -> float:
    """Wall time of `edit` after the same edits to warm up; the weights are put back."""
    editor.edit(edits)
    editor.detach()
    watch = Stopwatch()
    editor.edit(edits)
    seconds = watch.elapsed()
    editor.detach()
    return 1000 * seconds / len(edits)


def milliseconds_of_features(editor: UltraEditEditor, edits: list[EditCase]) -> float:
    """Wall time of the forward and backward passes alone."""
    sentences = [sentence for sentence in map(editor._sentence, edits) if sentence]
    watch = Stopwatch()
    for sentence in sentences:
        editor.batch_features([sentence])
    return 1000 * watch.elapsed() / len(sentences)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--modules", type=int, help="edit only the first so many modules")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pair = model_and_tokenizer(options.model, options.device)
    modules = model_spec(options.model)["ultraedit"]["modules"][: options.modules]
    editor = editor_of("ultraedit", pair, options.model, modules=modules)
    assert isinstance(editor, UltraEditEditor)
    edits = cases(options.edits)
    smaller = milliseconds_per_edit(editor, edits)
    floor = milliseconds_of_features(editor, edits)
    with patch.object(ultraedit, "closed_form", plain_form):
        plain = milliseconds_per_edit(editor, edits)
    table = Table("modules", "plain ms/edit", "smaller ms/edit", "ratio", "forward and backward ms", "edits/s")
    table.title = f"{what_ran(options.model, options.device)}; {options.edits} edits, {time.strftime('%Y-%m-%d')}"
    n = str(len(editor.pristine.weights))
    table.add_row(
        n, f"{plain:.1f}", f"{smaller:.2f}", f"{plain / smaller:.1f}x", f"{floor:.2f}", f"{1000 / smaller:.0f}"
    )
    table.caption = f"peak memory {peak_memory() / 2**20:.0f} MiB"
    Console().print(table)


if __name__ == "__main__":
    main()
