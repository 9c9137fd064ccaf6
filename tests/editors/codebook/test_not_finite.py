"""One prompt of a stream whose activations overflow: it fails alone. And modules that keep no floating-point weight."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.editors.codebook.queries import suffix_mean
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.models.loading import LoadedModel, load_model

METHODS = ("horen", "grace", "grace_norm", "grace_norm_cosine")
FACTS = run_config(["n=3"]).dataset.cases(3)
CASES = [*FACTS[:2], EditCase("bad", "How many € has the €uro club?", "Seven"), FACTS[2]]
BAD, FINE = 2, [0, 1, 3]

Build = Callable[..., CodebookEditor[Any]]


@pytest.fixture
def loaded() -> LoadedModel:
    """A fresh copy of the embedded model, on which every method writes well."""
    return load_model("embedded:tiny", dtype="float32", device="cpu")


@pytest.fixture
def build(loaded: LoadedModel) -> Build:
    """Builds editors on the embedded model."""

    def on_the_embedded_model(method: str, *overrides: str) -> CodebookEditor[Any]:
        config = run_config([f"method={method}", *overrides]).method
        editor: CodebookEditor[Any] = config.editor_class()(loaded.model, loaded.encoder, config, seed=42)
        return editor

    return on_the_embedded_model


@pytest.fixture
def overflowing(loaded: LoadedModel) -> PreTrainedModel:
    """The embedded model, but that one token overflows as soon as it is embedded."""
    token = loaded.tokenizer("€", add_special_tokens=False)["input_ids"][-1]
    embeddings, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    head.weight = nn.Parameter(embeddings.get_parameter("weight").clone(), requires_grad=False)
    embeddings.get_parameter("weight")[token] = math.inf
    return loaded.model


def said(editor: CodebookEditor[Any]) -> list[str]:
    """What the model says on every prompt, in one batch."""
    rows = editor.encoder.prompts([case.prompt for case in CASES])
    new = greedy_decode(editor.model, rows, [8] * len(rows), editor.encoder.pad_id)
    return [text.strip() for text in editor.encoder.tokenizer.batch_decode(new)]


@pytest.mark.parametrize("engine", ["parallel", "sequential"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_overflows_fails_alone(
    method: str, engine: str, overflowing: PreTrainedModel, build: Build
) -> None:
    settings = (f"method.engine={engine}", "method.n_steps=40")
    clean = build(method, *settings)
    base = said(clean)[BAD]
    actions = [record.action for record in clean.edit(FACTS)]
    expected = [clean.codebook.keys.clone(), clean.codebook.value(0)["vector"].clone()]
    clean.detach()

    editor = build(method, *settings)
    records = editor.edit(CASES)
    assert [record.action for record in records] == [*actions[:2], "failed", *actions[2:]]
    assert "not finite" in str(records[BAD].problem)
    torch.testing.assert_close(editor.codebook.keys, expected[0])
    torch.testing.assert_close(editor.codebook.value(0)["vector"], expected[1], rtol=1e-4, atol=1e-4)
    texts = said(editor)
    assert [texts[i].startswith(CASES[i].target) for i in FINE] == [True] * 3
    assert texts[BAD] == base
    routes = [route for route in editor.routes([case.prompt for case in CASES]) if route]
    assert [(route.entry, route.matched) for route in routes] == [(0, True), (1, True), (None, False), (2, True)]
    assert math.isnan(routes[BAD].score)


def test_nothing_is_written_where_the_modules_output_overflows(loaded: LoadedModel, build: Build) -> None:
    """GRACE could put a finite value in its place; HoReN could not, nor could the fast engine of either."""
    config = run_config(["method=grace"]).method
    last = len(loaded.encoder.prompts([FACTS[0].prompt])[0]) - 1

    def overflow(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([last]), math.inf) if output.shape[1] > last else output

    loaded.model.get_submodule(getattr(config, "module")).register_forward_hook(overflow)  # noqa: B009
    editor = build("grace", "method.engine=sequential")
    (record,) = editor.edit(FACTS[:1])
    assert (record.action, len(editor.codebook)) == ("failed", 0)


def test_a_query_without_finite_length_matches_nothing(build: Build) -> None:
    """An inner product with infinity lies above every threshold."""
    editor = build("horen", "method.normalize=false", "method.threshold=0.1", "method.hopfield.steps=0")
    key = torch.ones(editor.codebook.keys.shape[1])
    editor.codebook.append(key, (1,), 1)
    queries = torch.stack([key, key * math.inf, key * math.nan, key * 1e30])
    assert editor.routed(queries).matched.tolist() == [True, False, False, False]
    assert editor.match(queries[1:2]).matched.tolist() == [True]


def test_a_query_without_direction_matches_nothing_on_the_unit_sphere(build: Build) -> None:
    editor = build("horen", "method.threshold=-1", "method.hopfield.steps=0")
    editor.codebook.append(F.normalize(torch.ones(editor.codebook.keys.shape[1]), dim=0), (1,), 1)
    assert editor.routed(torch.zeros_like(editor.codebook.keys)).matched.tolist() == [False]


def test_what_is_not_pooled_may_be_anything() -> None:
    """Half of four tokens, behind one of padding."""
    inputs = torch.tensor([math.nan, math.inf, -math.inf, 2.0, 4.0])[None, :, None]
    mask = torch.tensor([[False, True, True, True, True]])
    assert suffix_mean(inputs, mask, 0.5).tolist() == [[3.0]]


class Bytes(nn.Module):
    """A linear module whose weight is whole numbers, as quantised ones have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.abs().max() / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale + 128).round().to(torch.uint8), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, (self.weight.to(states.dtype) - 128) * self.scale)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_module_is_used_for_its_activations(method: str, loaded: LoadedModel, build: Build) -> None:
    for path, module in list(loaded.model.named_modules()):
        if isinstance(module, nn.Linear) and path.startswith("model.layers"):
            loaded.model.set_submodule(path, Bytes(module))
    editor = build(method)
    editor.edit(FACTS)
    assert editor.codebook.keys.dtype == torch.float32
    texts = said(editor)
    assert [texts[i].startswith(CASES[i].target) for i in FINE] == [True] * 3


def test_rows_that_may_not_share_a_batch_are_read_apart_and_in_order(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
    editor = build("horen")
    expected = torch.cat([editor.queries([row]) for row in rows])
    monkeypatch.setattr("horen_bench.editors.codebook.editor.together", lambda _model, _lengths: [[0, 2], [1, 3]])
    widths: list[int] = []
    reads = editor.query

    def noting(inputs: Tensor, prompt_mask: Tensor) -> Tensor:
        widths.append(prompt_mask.shape[1])
        return reads(inputs, prompt_mask)

    monkeypatch.setattr(editor, "query", noting)
    torch.testing.assert_close(editor.queries(rows), expected)
    assert widths == [3, 2]
