"""The target vector: the layers above on cached states give what the whole model gives, alone and side by side."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.config import TargetVectorTraining
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.editors.locate_edit.requests import PromptRow, request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import (
    PerturbedModel,
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


# --- The loop on losses worked out by hand ---------------------------------------------------------------


class Scripted(PerturbedModel):
    """A model of which only the losses `(B,)` and v0 `(B, d)` are known; nothing drifts."""

    def __init__(self, initial: Tensor, nll: Callable[[Tensor], Tensor]) -> None:
        self.initial = initial
        self._nll = nll

    def nll_and_essence(self, delta: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        return self._nll(delta), torch.zeros(len(delta), 1)


def plain(**changes: Any) -> TargetVectorTraining:
    values = {"n_steps": 3, "learning_rate": 1e-6, "weight_decay": 0.0, "clamp": 1.0, "kl": 0.0}
    return TargetVectorTraining(**{**values, **changes})


def test_a_request_is_done_once_its_loss_is_below_five_hundredths() -> None:
    losses = torch.tensor([0.049, 0.051, 0.045])
    model = Scripted(torch.ones(3, 2), lambda delta: losses + 0 * delta.sum(dim=1))
    assert [len(seen) for seen in train_target_vectors(model, plain()).losses] == [1, 3, 1]


@pytest.mark.parametrize(("clamp", "length"), [(0.1, 0.5), (0.2, 1.0), (1.0, 2**0.5)])
def test_a_step_out_of_the_ball_is_shortened_to_its_border(clamp: float, length: float) -> None:
    # |v0| = 5; Adam's first step is the learning rate along each axis: (-1, -1), of length sqrt(2).
    model = Scripted(torch.tensor([[3.0, 4.0]]), lambda delta: 10 + delta.sum(dim=1))
    vectors = train_target_vectors(model, plain(n_steps=2, learning_rate=1.0, clamp=clamp))
    torch.testing.assert_close(vectors.delta, torch.full((1, 2), -length / 2**0.5))


def test_a_step_beyond_all_numbers_is_no_vector() -> None:
    model = Scripted(torch.ones(1, 2), lambda delta: 10 + delta.sum(dim=1))
    assert not train_target_vectors(model, plain(learning_rate=1e38)).finite(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_vector_and_spares_the_others(bad: float) -> None:
    losses = torch.tensor([bad, 1.0])
    vectors = train_target_vectors(Scripted(torch.ones(2, 2), lambda delta: losses + delta.sum(dim=1)), plain())
    assert [vectors.finite(i) for i in (0, 1)] == [False, True]
