"""The hidden vector: the layers above on cached states say what the whole model says, alone and side by side."""

from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.editors.locate_edit.requests import Row, request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import (
    Objective,
    UpperModel,
    WholeModel,
    keys_and_hidden,
    optimise,
)
from horen_bench.errors import UserError
from horen_bench.models.partial import UpperLayers

CASES = [
    EditCase("a", "Who founded Brightwater?", "Lucan Vey", "Brightwater"),
    EditCase("b", "The language spoken by the fishermen of Halvard Bay is", "Norrish", "Halvard Bay"),
    EditCase("c", "Edda Quillfeather was born where?", "Grenholm by the Sea", "Edda Quillfeather"),
]
CONTEXTS = Contexts.given([[""], ["I walked along. ", "The old tower. ", "I walked along. "]])
OBJECTIVE = Objective(n_steps=8, learning_rate=0.3, weight_decay=0.5, clamp=0.9, kl=0.0625)
KEYED = "model.layers.1.mlp.down_proj"


@pytest.fixture
def rows(golden_tokenizer: Any) -> list[Row]:
    return rows_of(golden_tokenizer, [request_of(golden_tokenizer, case) for case in CASES], CONTEXTS)


@pytest.mark.parametrize("path", [KEYED, "model.layers.2"])
def test_upper_layers_give_what_the_whole_model_gives(golden_model: Any, rows: list[Row], path: str) -> None:
    module, projections = golden_model.get_submodule(path), {KEYED: golden_model.get_submodule(KEYED)}
    layer = int(path.split(".")[2])
    plain = WholeModel(golden_model, module, projections, rows)
    fast = UpperModel(UpperLayers(golden_model, module, layer), projections, rows)
    torch.testing.assert_close(fast.keys[KEYED], plain.keys[KEYED], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.prompt_keys[KEYED], plain.prompt_keys[KEYED], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.initial, plain.initial, rtol=1e-5, atol=1e-5)
    delta, everyone = 0.3 * torch.randn(3, 64), torch.ones(3, dtype=torch.bool)
    for ours, theirs in zip(fast.read(delta, everyone), plain.read(delta, everyone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found, expected = optimise(fast, OBJECTIVE), optimise(plain, OBJECTIVE)
    torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-3, atol=1e-4)


def test_requests_side_by_side_are_requests_apart_even_if_one_is_done_early(
    golden_model: Any, golden_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = golden_model.get_submodule("model.layers.2")
    upper = UpperLayers(golden_model, module, 2)
    requests = [request_of(golden_tokenizer, case) for case in CASES]
    free = optimise(UpperModel(upper, {}, rows_of(golden_tokenizer, requests, CONTEXTS)), OBJECTIVE)
    bound = sorted(losses[3][0] for losses in free.losses)[0] + 1e-3  # the easiest request is done by then
    monkeypatch.setattr("horen_bench.editors.locate_edit.target_vector._LOSS_BOUND", bound)
    together = optimise(UpperModel(upper, {}, rows_of(golden_tokenizer, requests, CONTEXTS)), OBJECTIVE)
    n_steps = []
    for i, request in enumerate(requests):
        alone = optimise(UpperModel(upper, {}, rows_of(golden_tokenizer, [request], CONTEXTS)), OBJECTIVE)
        torch.testing.assert_close(together.delta[i], alone.delta[0], rtol=0, atol=1e-3)
        assert len(together.losses[i]) == len(alone.losses[0])
        n_steps.append(len(alone.losses[0]))
    assert len(set(n_steps)) > 1


def test_vector_stays_inside_its_ball(golden_model: Any, rows: list[Row]) -> None:
    module = golden_model.get_submodule("model.layers.2")
    hidden = optimise(UpperModel(UpperLayers(golden_model, module, 2), {}, rows), OBJECTIVE)
    assert bool((hidden.delta.norm(dim=1) <= 0.9 * hidden.initial.norm(dim=1) * (1 + 1e-5)).all())


def test_keys_of_a_layer_do_not_depend_on_that_layer_or_on_those_above(golden_model: Any, rows: list[Row]) -> None:
    last, projection = golden_model.get_submodule("model.layers.2"), golden_model.get_submodule(KEYED)
    before, hidden = keys_and_hidden(golden_model, last, {KEYED: projection}, rows)
    with torch.no_grad():
        for layer in (1, 2, 3):
            golden_model.model.layers[layer].mlp.down_proj.weight.mul_(1.5)
    after, changed = keys_and_hidden(golden_model, last, {KEYED: projection}, rows)
    assert torch.equal(after[KEYED], before[KEYED])
    assert not torch.allclose(changed, hidden)


@pytest.mark.parametrize("wrong", [{"n_steps": 0}, {"learning_rate": 0}, {"clamp": -1}])
def test_constants_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    right = {"n_steps": 5, "learning_rate": 0.1, "weight_decay": 0.0, "clamp": 1, "kl": 0.0}
    with pytest.raises(UserError, match=f"method.hidden.{next(iter(wrong))} must be"):
        Objective(**{**right, **wrong})
