"""What routing figures show and no run records: prompts among the keys, and what a query costs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.config.schema import RunConfig
from horen_bench.editors.codebook.config import CodebookConfig
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.errors import UserError
from horen_bench.models.loading import default_device, load_model
from horen_bench.profiling import Stopwatch

Codebooks = CodebookEditor[CodebookConfig]  # whatever their settings

_REPEATS = 20  # queries timed per size
_KEYS_AT_ONCE = 4096  # drawn together


@contextmanager
def bare_editor(config: RunConfig) -> Iterator[Codebooks]:
    """A run's method on its model, with nothing written.

    Raises:
        UserError: the method has no codebook, or the model cannot be loaded.
    """
    editor_class = config.method.editor_class()
    if not issubclass(editor_class, CodebookEditor):
        raise UserError(
            f"this figure is about methods with a codebook, and method={config.method.name} has none; leave method= out"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    model = config.model
    loaded = load_model(
        model.hub_id,
        dtype=model.dtype,
        device=config.device or default_device(),
        device_map=model.device_map,
        revision=model.revision,
        template=config.template,
        template_date=config.template_date,
    )
    editor: Codebooks = editor_class(loaded.model, loaded.encoder, config.method, seed=config.seed)
    yield editor
    editor.detach()


# --- Figure 4: paraphrases and unrelated prompts among the keys -----------------------------------------------


@torch.no_grad()
def routing_scores(editor: Codebooks, cases: Sequence[EditCase]) -> pd.DataFrame:
    """How near paraphrases come to their own edit's key, and unrelated prompts to the nearest one.

    The cases' keys are written as the method writes them; values play no part in routing and stay untrained.

    Args:
        editor: with an empty codebook.
        cases: the edits.

    Returns:
        One row per prompt: `kind`, `score`, `routed`, as `separation` has them, and `stage`, `measure`, `threshold` of
        the router's description.
    """
    edits = [editor.encoder.edit(case.prompt, case.target) for case in cases]
    entries = [decision.entry for decision in editor.decide(edits, editor.queries([edit.prompt for edit in edits]))]
    paraphrases = [
        (probe.prompt, entry) for case, entry in zip(cases, entries, strict=True) for probe in case.paraphrases
    ]
    unrelated = [probe.prompt for case in cases for probe in case.locality]
    own = torch.tensor([entry for _, entry in paraphrases], device=editor.codebook.keys.device)
    near = separation(editor, _queries(editor, [text for text, _ in paraphrases]), own)
    far = separation(editor, _queries(editor, unrelated), None)
    rows = pd.concat([near.assign(kind="paraphrase"), far.assign(kind="unrelated")], ignore_index=True)
    router = editor.describe_router()
    return rows.assign(stage=router.stage, measure=router.measure, threshold=router.threshold)


def separation(editor: Codebooks, queries: Tensor, own: Tensor | None) -> pd.DataFrame:
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
        _separation(editor, block, None if own is None else own[place])
        for place, block in _blocks(queries, editor.block_size())
    ]
    return pd.concat(parts, ignore_index=True)


def _separation(editor: Codebooks, queries: Tensor, own: Tensor | None) -> pd.DataFrame:
    matches = editor.match(queries)
    entries = matches.entries if own is None else own
    routed = matches.matched & (matches.entries == entries)
    scores = editor.similarity(queries, editor.codebook.keys[entries])
    return pd.DataFrame({"score": scores.tolist(), "routed": routed.tolist()})


def _queries(editor: Codebooks, prompts: Sequence[str]) -> Tensor:
    return editor.queries(editor.encoder.prompts(prompts))


def _blocks(queries: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(queries), size):
        yield slice(start, start + size), queries[start : start + size]


# --- Figure 9: what a query costs ------------------------------------------------------------------------------


@torch.no_grad()
def query_cost(editor: Codebooks, sizes: Sequence[int], seed: int) -> pd.DataFrame:
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
        rule=editor.describe_router().rule,
        key_size=keys.shape[1],
        dtype=str(keys.dtype).removeprefix("torch."),
        seed=seed,
        device=torch.cuda.get_device_name(keys.device) if keys.is_cuda else keys.device.type,
        threads=torch.get_num_threads(),
    )


def _fill(editor: Codebooks, size: int, generator: torch.Generator) -> None:
    """Append random keys up to a size, some at a time, as they may be long."""
    while (lacking := size - len(editor.codebook)) > 0:
        for key in _random(min(lacking, _KEYS_AT_ONCE), editor, generator):
            editor.codebook.append(key, label=(), prompt_length=0)


def _random(count: int, editor: Codebooks, generator: torch.Generator) -> Tensor:
    """Normal vectors `(count, m)`, as unit vectors where the editor has them."""
    keys = editor.codebook.keys
    drawn = torch.randn((count, keys.shape[1]), generator=generator).to(keys.device)
    return F.normalize(drawn, dim=1) if editor.config.normalize else drawn


def _seconds(editor: Codebooks, query: Tensor) -> float:
    stopwatch = Stopwatch()
    editor.match(query[None])
    return stopwatch.elapsed()
