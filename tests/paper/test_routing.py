"""What is measured for figures: early edits, queries among keys, the cost of routing."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, Probe
from horen_bench.config.compose import run_config
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.paper.figures import early_scores
from horen_bench.paper.routing import Codebooks, query_cost, routing_scores, separation

Build = Callable[..., Codebooks]


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    """Builds an editor on the reference model from the configuration."""

    def on_the_reference_model(*overrides: str) -> Codebooks:
        config = run_config(overrides)
        editor = config.method.editor_class()(golden_model, golden_tokenizer, config.method, seed=config.seed)
        assert isinstance(editor, CodebookEditor)
        return editor

    return on_the_reference_model


def axis(editor: Codebooks, *numbers: float) -> Tensor:
    """A vector with these first coordinates and zeros behind."""
    vector = torch.zeros(editor.codebook.keys.shape[1])
    vector[: len(numbers)] = torch.tensor(numbers)
    return vector


def with_keys(editor: Codebooks, *keys: tuple[float, ...]) -> Codebooks:
    for key in keys:
        editor.codebook.append(axis(editor, *key), (1,), 1)
    return editor


# --- Early edits ---------------------------------------------------------------------------------------------


def test_early_scores_are_means_over_the_first_edits_at_checkpoints_that_hold_them_all() -> None:
    cases = pd.DataFrame(
        {"n": n, "protocol": "greedy", "position": i, "rel": float(n == 2 or i == 0), "gen": 0.5, "loc": np.nan}
        for n in (1, 2, 4)
        for i in range(n)
    )
    rows = early_scores(cases, first=2, seed=0)
    assert rows["n"].tolist() == [2, 4]
    assert rows["rel"].tolist() == [1.0, 0.5]
    assert rows["items"].tolist() == [2, 2]
    assert rows["loc"].isna().all(), "no score is no zero"
    assert early_scores(cases, first=5, seed=0).empty


# --- Queries among keys --------------------------------------------------------------------------------------


def test_without_a_step_the_score_is_the_cosine_to_ones_own_key(build: Build) -> None:
    editor = with_keys(build("method=horen", "method.hopfield.steps=0", "method.threshold=0.7"), (1, 0), (0, 1))
    query = axis(editor, 0.8, 0.6)[None]
    own = separation(editor, query.repeat(2, 1), torch.tensor([0, 1]))
    assert own["score"].tolist() == pytest.approx([0.8, 0.6])
    assert own["routed"].tolist() == [True, False], "the other's key is nearer"
    far = separation(editor, axis(editor, 0.6, 0.0, 0.8)[None], None)
    assert far["score"].tolist() == pytest.approx([0.6])
    assert far["routed"].tolist() == [False]


def test_a_whole_hopfield_step_takes_a_query_to_its_retrieval(build: Build) -> None:
    """beta 20 on cosines .8 and .6: weights .98201 and .01799, whose vector has the direction (.99983, .01831)."""
    editor = with_keys(build("method=horen", "method.hopfield.alpha=1.0"), (1, 0), (0, 1))
    query = axis(editor, 0.8, 0.6)[None].repeat(2, 1)
    scores = separation(editor, query, torch.tensor([0, 1]))["score"]
    assert scores.tolist() == pytest.approx([0.99983, 0.01831], abs=1e-5)


def test_grace_measures_a_distance_and_routes_within_its_balls(build: Build) -> None:
    editor = with_keys(build("method=grace"), (0, 0), (10, 0))
    editor.codebook.radii[:] = 2  # type: ignore[attr-defined]
    queries = torch.stack([axis(editor, 0, 1.5), axis(editor, 7, 4)])
    own = separation(editor, queries, torch.tensor([0, 1]))
    assert own["score"].tolist() == [1.5, 5.0]
    assert own["routed"].tolist() == [True, False]


def test_grace_on_the_sphere_is_described_by_a_cosine(build: Build) -> None:
    editor = with_keys(build("method=grace_norm"), (1, 0))
    assert separation(editor, axis(editor, 0.6, 0.8)[None], None)["score"].tolist() == pytest.approx([0.6])
    router = editor.describe_router()
    assert (router.stage, router.measure, router.threshold) == ("last 60% pooled", "cosine", 0.5)


def test_the_keys_are_those_that_the_method_writes(build: Build) -> None:
    """A paraphrase in the edit's own words lies on its key; values are not needed for that."""
    prompt, locality = "Who founded Brightwater?", (Probe("nq question: where is the museum of clocks", "here"),)
    cases = [
        EditCase(
            "a",
            prompt,
            "Lucan Vey",
            paraphrases=(Probe(prompt, "Lucan Vey"), Probe("Brightwater was founded by", "Lucan Vey")),
            locality=locality,
        ),
        EditCase("b", "The language of Halvard Bay is", "Norrish", locality=locality),
    ]
    scores = routing_scores(build("method=horen"), cases)
    assert scores["kind"].tolist() == ["paraphrase", "paraphrase", "unrelated", "unrelated"]
    assert scores["score"][0] == pytest.approx(1, abs=1e-3)
    assert scores["routed"][0]
    assert set(scores["stage"]) == {"last 60% pooled, T = 1"}


# --- What a query costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rule"), [("horen", "Hopfield, T = 1"), ("grace", "Euclidean distance")])
def test_the_cost_of_a_query_has_a_row_per_size(build: Build, method: str, rule: str) -> None:
    editor = build(f"method={method}")
    rows = query_cost(editor, (2, 5), seed=3)
    assert rows["entries"].tolist() == [2, 5]
    assert len(editor.codebook) == 5
    assert (rows["ms_low"] > 0).all()
    assert (rows["ms_low"] <= rows["ms"]).all()
    assert (rows["ms"] <= rows["ms_high"]).all()
    assert rows[["rule", "key_size", "dtype", "device"]].iloc[0].tolist() == [rule, 176, "float32", "cpu"]
