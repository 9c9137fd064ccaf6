"""What a figure shows and no run records: early edits on their own, prompts among the keys, what a query costs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.editors.codebook.hopfield import refine
from horen_bench.editors.grace.editor import GraceEditor
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.evaluation.aggregate import summary
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import encode_edit, encode_prompts

_REPEATS = 20  # queries timed per size
_KEYS_AT_ONCE = 4096  # drawn together


# --- Figure 5: early edits ---------------------------------------------------------------------------------


def early_scores(cases: pd.DataFrame, first: int, seed: int) -> pd.DataFrame:
    """Rel, Gen, Loc and OP of the first edits alone, at each later checkpoint and protocol, with their intervals.

    Args:
        cases: per-case rows, as `RunStore.cases` gives them.
        first: how many edits count; a checkpoint before them has no row.
        seed: of the resampling.
    """
    early = cases[(cases["n"] >= first) & (cases["position"] < first)]
    rows = [
        {"n": n, "protocol": protocol, "items": len(part), **summary(part, [], seed)}
        for (n, protocol), part in early.groupby(["n", "protocol"], sort=False)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["n", "protocol"])


# --- Figure 4: paraphrases and unrelated prompts among the keys -----------------------------------------------


def stage_of(editor: CodebookEditor) -> dict[str, str | float]:
    """How an editor compares a query with a key: `stage` in words, `measure` and `threshold`."""
    pooled = f"last {editor.pooling_ratio:.0%} pooled" if editor.pooling_ratio else "last token"
    if isinstance(editor, HorenEditor):
        stage = f"{pooled}, T = {editor.hopfield['steps']}"
        measure = "cosine" if editor.normalize else "inner product"
        return {"stage": stage, "measure": measure, "threshold": editor.threshold}
    assert isinstance(editor, GraceEditor)
    radius = float(editor.first_radius)
    if editor.normalize:
        return {"stage": pooled, "measure": "cosine", "threshold": 1 - radius**2 / 2}
    return {"stage": pooled, "measure": "distance", "threshold": radius}


@torch.no_grad()
def routing_scores(editor: CodebookEditor, cases: Sequence[EditCase]) -> pd.DataFrame:
    """How near paraphrases come to their own edit's key, and unrelated prompts to the nearest one.

    The cases' keys are written as the method writes them; values play no part in routing and stay untrained.

    Args:
        editor: with an empty codebook.
        cases: the edits.

    Returns:
        One row per prompt: `kind`, `score`, `routed`, as `separation` has them, and the columns of `stage_of`.
    """
    edits = [encode_edit(editor.tokenizer, case.prompt, case.target) for case in cases]
    entries = [decision.entry for decision in editor.decide(edits, editor.queries([edit.prompt for edit in edits]))]
    paraphrases = [(text, entry) for case, entry in zip(cases, entries, strict=True) for text in case.paraphrases]
    unrelated = [probe.prompt for case in cases for probe in case.locality]
    own = torch.tensor([entry for _, entry in paraphrases], device=editor.codebook.keys.device)
    near = separation(editor, _queries(editor, [text for text, _ in paraphrases]), own)
    far = separation(editor, _queries(editor, unrelated), None)
    return pd.concat([near.assign(kind="paraphrase"), far.assign(kind="unrelated")], ignore_index=True).assign(
        **stage_of(editor)
    )


def separation(editor: CodebookEditor, queries: Tensor, own: Tensor | None) -> pd.DataFrame:
    """Where queries lie among the keys, as the editor compares them.

    Args:
        editor: whose codebook holds the keys.
        queries: unrefined, `(B, m)`.
        own: int64 `(B,)`, the entry that each query belongs to; None: to none.

    Returns:
        One row per query: `score`, distance or cosine to its own entry's key, without one to the nearest;
        `routed`, whether that entry acts on it.
    """
    parts = [
        _separation(editor, block, None if own is None else own[chosen])
        for chosen, block in _blocks(queries, editor.block_size())
    ]
    return pd.concat(parts, ignore_index=True)


def _separation(editor: CodebookEditor, queries: Tensor, own: Tensor | None) -> pd.DataFrame:
    matches = editor.match(queries)
    entries = matches.entries if own is None else own
    routed = matches.matched & (matches.entries == entries)
    scores = _scores(editor, queries, editor.codebook.keys[entries])
    return pd.DataFrame({"score": scores.tolist(), "routed": routed.tolist()})


def _scores(editor: CodebookEditor, queries: Tensor, keys: Tensor) -> Tensor:
    """Query `i` against key `i`, `(B,)`, after what the method does to a query."""
    if isinstance(editor, HorenEditor):
        queries = refine(queries, editor.codebook.keys, normalize=editor.normalize, **editor.hopfield)
    by_product = isinstance(editor, HorenEditor) or editor.normalize
    keys = keys.float()
    scores: Tensor = (
        torch.linalg.vecdot(queries, keys) if by_product else torch.linalg.vector_norm(queries - keys, dim=1)
    )
    return scores


def _queries(editor: CodebookEditor, prompts: Sequence[str]) -> Tensor:
    return editor.queries(encode_prompts(editor.tokenizer, prompts))


def _blocks(queries: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(queries), size):
        yield slice(start, start + size), queries[start : start + size]


# --- Figure 9: what a query costs ------------------------------------------------------------------------------


@torch.no_grad()
def query_cost(editor: CodebookEditor, sizes: Sequence[int], seed: int) -> pd.DataFrame:
    """Times the routing of one query at a time against a codebook of random keys.

    Args:
        editor: with an empty codebook, which is filled.
        sizes: numbers of entries, ascending.
        seed: of keys and queries.

    Returns:
        One row per size: `rule`, `entries`, `ms` (median) and its quartiles `ms_low` and `ms_high`, `queries` timed,
        `key_size`, `dtype`, `seed`, `device`, `threads`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        _fill(editor, size, generator)
        queries = _random(1 + _REPEATS, editor, generator)
        seconds = [_seconds(editor, query) for query in queries][1:]  # the first one warms up
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1000
        rows.append({"entries": size, "ms": middle, "ms_low": low, "ms_high": high, "queries": len(seconds)})
    keys = editor.codebook.keys
    return pd.DataFrame(rows).assign(
        rule=_rule(editor),
        key_size=keys.shape[1],
        dtype=str(keys.dtype).removeprefix("torch."),
        seed=seed,
        device=torch.cuda.get_device_name(keys.device) if keys.is_cuda else keys.device.type,
        threads=torch.get_num_threads(),
    )


def _fill(editor: CodebookEditor, size: int, generator: torch.Generator) -> None:
    """Append random keys up to a size, some at a time, as they may be long."""
    while (lacking := size - len(editor.codebook)) > 0:
        for key in _random(min(lacking, _KEYS_AT_ONCE), editor, generator):
            editor.codebook.append(key, label=(), prompt_length=0)


def _random(count: int, editor: CodebookEditor, generator: torch.Generator) -> Tensor:
    """Normal vectors `(count, m)`, as unit vectors where the editor has them."""
    keys = editor.codebook.keys
    drawn = torch.randn((count, keys.shape[1]), generator=generator).to(keys.device)
    return F.normalize(drawn, dim=1) if editor.normalize else drawn


def _seconds(editor: CodebookEditor, query: Tensor) -> float:
    stopwatch = Stopwatch()
    editor.match(query[None])
    return stopwatch.elapsed()


def _rule(editor: CodebookEditor) -> str:
    return f"Hopfield, T = {editor.hopfield['steps']}" if isinstance(editor, HorenEditor) else "Euclidean distance"
