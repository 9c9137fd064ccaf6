"""Step `methods`: the other methods on a real shape, beside the paper's Table 5."""

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from common import Pair, backbone, cases, editor_of, model_spec
from gpu.suite import Figure, Step
from horen_bench.editors.alphaedit import editor as alphaedit
from horen_bench.editors.locate_edit import editor as locate_edit
from horen_bench.editors.locate_edit.null_space import NullSpace, null_space
from horen_bench.editors.shared.corpora import read_corpus
from horen_bench.editors.shared.second_moments import SecondMoment, accumulate
from horen_bench.paths import resource
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import PromptEncoder

_CORPUS = "embedded:tiny/corpus.txt"
# A ridge, because the text is too little for the inverse of a second moment.
_WITH_MOMENTS = {"rome": ["method.ridge=1.0e-3"], "memit": ["method.ridge=1.0e-3"], "alphaedit": []}


def run(step: Step) -> None:
    """Second moments, then every method; the null space before the one that needs it."""
    backbone = Backbone(step)
    step.measure("second moments", backbone.second_moments)
    for method, n_edits in step.settings["methods"].items():
        if method == "alphaedit":
            step.measure("null space", backbone.null_space)
        step.measure(method, partial(backbone.method, method, n_edits))


class Backbone:
    """A backbone at random initialisation, and the second moment and null space that serve all modules of its size.

    Speed does not depend on their values, and to take them for each module would be to measure the same thing again.
    """

    def __init__(self, step: Step) -> None:
        self._settings = step.settings
        self._device = step.device
        self._name: str = step.settings["model"]
        self._spec = model_spec(self._name)

    @cached_property
    def _pair(self) -> Pair:
        return backbone(self._name, self._device)

    @cached_property
    def _moment(self) -> SecondMoment:
        model, tokenizer = self._pair
        path, statistics = self._spec["rome"]["module"], self._spec.statistics
        assert statistics is not None
        texts = read_corpus(_CORPUS, self._settings["n_texts"])
        return accumulate(model, PromptEncoder(tokenizer), [path], texts, max_length=statistics.max_length)[path]

    @cached_property
    def _space(self) -> NullSpace:
        # The values of random weights' moments have nothing to do with the threshold: half of the directions are kept.
        middle = float(self._moment.mean.diagonal().median())
        return null_space(self._moment, middle, None, torch.device(self._device))

    def second_moments(self) -> Iterator[Figure]:
        """One pass over texts, of one module."""
        self._pair  # noqa: B018 - built before the clock starts
        watch = Stopwatch()
        moment = self._moment
        seconds = watch.elapsed()
        yield Figure("tokens", moment.n_tokens)
        yield Figure("1,000 tokens", 1e6 * seconds / moment.n_tokens, "ms")

    def null_space(self) -> Iterator[Figure]:
        """One eigendecomposition in float64."""
        self._moment  # noqa: B018 - made before the clock starts
        watch = Stopwatch()
        space = self._space
        yield Figure(f"m = {len(space.protected):,}", watch.elapsed(), "s")

    def method(self, name: str, n_edits: int) -> Iterator[Figure]:
        """Milliseconds per edit behind a first edit, which makes contexts, masks and memory pools."""
        edits = cases(n_edits)
        before = self._logits()
        with ExitStack() as stack:
            self._serve(stack, name)
            editor = editor_of(name, self._pair, self._name, *_WITH_MOMENTS.get(name, ()))
            editor.edit(edits[:1])
            watch = Stopwatch()
            records = editor.edit(edits[1:])
            seconds = watch.elapsed() / len(records)
            editor.detach()
        yield Figure("one edit", 1000 * seconds, "ms")
        paper = paper_ms(self._spec.label, name)
        yield Figure("one edit, paper's Table 5", "--" if paper is None else paper, "ms, RTX 5090")
        yield Figure("edits timed", len(records))
        yield Figure("of them written", sum(record.action != "failed" for record in records))
        yield Figure("steps per edit", sum(record.steps for record in records) / len(records))
        yield Figure("detached bit for bit", float(torch.equal(before, self._logits())))

    def _serve(self, stack: ExitStack, name: str) -> None:
        """Give the same second moment and null space to every module in place of its own."""
        if name not in _WITH_MOMENTS:
            return

        def moments(_model: Any, _encoder: Any, paths: list[str], _statistics: Any) -> dict[str, SecondMoment]:
            return dict.fromkeys(paths, self._moment)

        stack.enter_context(patch.object(locate_edit, "second_moments", moments))
        if name == "alphaedit":
            space = self._space
            stack.enter_context(patch.object(alphaedit, "null_space", lambda *_: space))

    @torch.no_grad()
    def _logits(self) -> Tensor:
        model = self._pair[0]
        logits: Tensor = model(torch.arange(5, 21, device=model.device)[None], use_cache=False).logits
        return logits


def paper_ms(model: str, method: str) -> float | None:
    """Milliseconds per edit in the paper's Table 5, by labels; None where it has none."""
    with (resource("baselines") / "paper" / "table5.csv").open(newline="", encoding="utf-8") as file:
        rows = {(row["model"], row["method"].lower()): float(row["edit_ms"]) for row in csv.DictReader(file)}
    return rows.get((model, method))
