"""The target vector: the layers above on cached states give what the whole model gives, alone and side by side."""

from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.config import TargetVectorTraining
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.editors.locate_edit.requests import PromptRow, request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import (
    PerturbedUpperLayers,
    PerturbedWholeModel,
    keys_and_outputs,
    train_target_vectors,
)
from horen_bench.models.partial import UpperLayers
from horen_bench.prompts import PromptEncoder

CASES = [
    EditCase("a", "Who founded Brightwater?", "Lucan Vey", "Brightwater"),
    EditCase("b", "The language spoken by the fishermen of Halvard Bay is", "Norrish", "Halvard Bay"),
    EditCase("c", "Edda Quillfeather was born where?", "Grenholm by the Sea", "Edda Quillfeather"),
]
CONTEXTS = Contexts.given([[""], ["I walked along. ", "The old tower. ", "I walked along. "]])
TRAINING = TargetVectorTraining(n_steps=8, learning_rate=0.3, weight_decay=0.5, clamp=0.9, kl=0.0625)
KEYED = "model.layers.1.mlp.down_proj"


@pytest.fixture
def rows(golden_tokenizer: Any) -> list[PromptRow]:
    encoder = PromptEncoder(golden_tokenizer)
    return rows_of(encoder, [request_of(encoder, case) for case in CASES], CONTEXTS)


@pytest.mark.parametrize("path", [KEYED, "model.layers.2"])
def test_upper_layers_give_what_the_whole_model_gives(golden_model: Any, rows: list[PromptRow], path: str) -> None:
    module, projections = golden_model.get_submodule(path), {KEYED: golden_model.get_submodule(KEYED)}
    plain = PerturbedWholeModel(golden_model, module, projections, rows)
    fast = PerturbedUpperLayers(UpperLayers(golden_model, path), projections, rows)
    torch.testing.assert_close(fast.keys[KEYED], plain.keys[KEYED], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.prompt_keys[KEYED], plain.prompt_keys[KEYED], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.initial, plain.initial, rtol=1e-5, atol=1e-5)
    delta, everyone = 0.3 * torch.randn(3, 64), torch.ones(3, dtype=torch.bool)
    for ours, theirs in zip(fast.nll_and_essence(delta, everyone), plain.nll_and_essence(delta, everyone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    trained, expected = train_target_vectors(fast, TRAINING), train_target_vectors(plain, TRAINING)
    torch.testing.assert_close(trained.delta, expected.delta, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor(trained.losses), torch.tensor(expected.losses), rtol=1e-3, atol=1e-4)


def test_requests_side_by_side_are_requests_apart_even_if_one_is_done_early(
    golden_model: Any, golden_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, encoder = UpperLayers(golden_model, "model.layers.2"), PromptEncoder(golden_tokenizer)
    requests = [request_of(encoder, case) for case in CASES]
    free = train_target_vectors(PerturbedUpperLayers(upper, {}, rows_of(encoder, requests, CONTEXTS)), TRAINING)
    bound = sorted(losses[3][0] for losses in free.losses)[0] + 1e-3  # the easiest request is done by then
    monkeypatch.setattr("horen_bench.editors.locate_edit.target_vector._LOSS_BOUND", bound)
    together = train_target_vectors(PerturbedUpperLayers(upper, {}, rows_of(encoder, requests, CONTEXTS)), TRAINING)
    n_steps = []
    for i, request in enumerate(requests):
        alone = train_target_vectors(PerturbedUpperLayers(upper, {}, rows_of(encoder, [request], CONTEXTS)), TRAINING)
        torch.testing.assert_close(together.delta[i], alone.delta[0], rtol=0, atol=1e-3)
        assert len(together.losses[i]) == len(alone.losses[0])
        n_steps.append(len(alone.losses[0]))
    assert len(set(n_steps)) > 1


def test_vector_stays_inside_its_ball(golden_model: Any, rows: list[PromptRow]) -> None:
    upper = UpperLayers(golden_model, "model.layers.2")
    vectors = train_target_vectors(PerturbedUpperLayers(upper, {}, rows), TRAINING)
    assert bool((vectors.delta.norm(dim=1) <= 0.9 * vectors.initial.norm(dim=1) * (1 + 1e-5)).all())


def test_keys_of_a_layer_do_not_depend_on_that_layer_or_on_those_above(
    golden_model: Any, rows: list[PromptRow]
) -> None:
    last, projection = golden_model.get_submodule("model.layers.2"), golden_model.get_submodule(KEYED)
    before, output = keys_and_outputs(golden_model, last, {KEYED: projection}, rows)
    with torch.no_grad():
        for layer in (1, 2, 3):
            golden_model.model.layers[layer].mlp.down_proj.weight.mul_(1.5)
    after, changed = keys_and_outputs(golden_model, last, {KEYED: projection}, rows)
    assert torch.equal(after[KEYED], before[KEYED])
    assert not torch.allclose(changed, output)
