import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.codebook.config import EarlyStopping
from horen_bench.editors.codebook.training import Schedule, Value, edit_loss, train_value, waves
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import PromptEncoder

# Adam on a loss of slope 1 moves by its learning rate at each step: 10, 9, 8, ... at learning rate 1.
START = {"x": torch.tensor([10.0])}


def slope_one(value: Value) -> Tensor:
    return value["x"].sum()


def scripted(*losses: float) -> Callable[[Value], Tensor]:
    """A loss of slope 1 whose values are given in advance."""
    script: Iterator[float] = iter(losses)

    def loss_of(value: Value) -> Tensor:
        x = value["x"].sum()
        return x - x.detach() + next(script)

    return loss_of


def test_without_early_stopping_all_steps_are_taken_and_the_last_value_is_kept() -> None:
    trained = train_value(START, slope_one, Schedule(1.0, 3, None))
    assert trained.value["x"].item() == pytest.approx(7.0, abs=1e-6)
    assert trained.losses == pytest.approx([10.0, 9.0, 8.0], abs=1e-6)
    assert trained.loss == pytest.approx(8.0, abs=1e-6)
    assert (trained.steps, trained.finite) == (3, True)


def test_without_early_stopping_a_worse_last_value_is_kept_all_the_same() -> None:
    trained = train_value(START, scripted(1, 2, 3), Schedule(1.0, 3, None))
    assert trained.value["x"].item() == pytest.approx(7.0, abs=1e-6)
    assert trained.loss == 3


def test_training_stops_once_the_loss_is_below_the_bound() -> None:
    stop = EarlyStopping(loss_bound=7.5, patience=3)
    trained = train_value(START, slope_one, Schedule(1.0, 50, stop))
    assert trained.value["x"].item() == pytest.approx(7.0, abs=1e-6)
    assert trained.losses == pytest.approx([10.0, 9.0, 8.0, 7.0], abs=1e-6)
    assert trained.loss == pytest.approx(7.0, abs=1e-6)
    assert trained.steps == 3


def test_a_value_that_is_already_good_is_not_moved() -> None:
    stop = EarlyStopping(loss_bound=10.5, patience=3)
    trained = train_value(START, slope_one, Schedule(1.0, 50, stop))
    assert torch.equal(trained.value["x"], START["x"])
    assert (trained.losses, trained.loss, trained.steps) == ([10.0], 10.0, 0)


def test_training_stops_after_three_steps_without_a_new_lowest_loss_and_keeps_the_best_value() -> None:
    # Lowest loss 1 at x = 9, seen before the second step; 2, 4 and 1 (no lower) exhaust the patience.
    stop = EarlyStopping(loss_bound=0.01, patience=3)
    trained = train_value(START, scripted(3, 1, 2, 4, 1, 0), Schedule(1.0, 50, stop))
    assert trained.value["x"].item() == pytest.approx(9.0, abs=1e-6)
    assert trained.losses == [3, 1, 2, 4, 1]
    assert (trained.loss, trained.steps, trained.finite) == (1.0, 4, True)


def test_a_new_lowest_loss_renews_the_patience() -> None:
    stop = EarlyStopping(loss_bound=0.01, patience=2)
    trained = train_value(START, scripted(5, 6, 4, 6, 3, 6, 6), Schedule(1.0, 50, stop))
    assert trained.losses == [5, 6, 4, 6, 3, 6, 6]
    assert trained.value["x"].item() == pytest.approx(6.0, abs=1e-6)


def test_with_early_stopping_the_best_value_is_kept_when_the_steps_run_out() -> None:
    stop = EarlyStopping(loss_bound=0.01, patience=10)
    trained = train_value(START, scripted(3, 1, 2), Schedule(1.0, 3, stop))
    assert trained.value["x"].item() == pytest.approx(9.0, abs=1e-6)
    assert trained.loss == 1


@pytest.mark.parametrize("stop", [None, EarlyStopping(loss_bound=0.01, patience=3)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_gives_back_the_last_finite_value(stop: EarlyStopping | None, bad: float) -> None:
    trained = train_value(START, scripted(3, 1, bad), Schedule(1.0, 50, stop))
    assert trained.value["x"].item() == pytest.approx(9.0, abs=1e-6)
    assert (trained.loss, trained.steps, trained.finite) == (1.0, 2, False)


def test_a_loss_that_is_never_finite_gives_back_the_start() -> None:
    trained = train_value(START, scripted(math.nan), Schedule(1.0, 5, None))
    assert torch.equal(trained.value["x"], START["x"])
    assert not trained.finite


def test_a_last_step_into_infinity_is_taken_back() -> None:
    # The square root of 0 is finite, its slope is not.
    trained = train_value({"x": torch.zeros(1)}, lambda v: v["x"].sqrt().sum(), Schedule(1.0, 1, None))
    assert torch.equal(trained.value["x"], torch.zeros(1))
    assert not trained.finite


def test_no_steps_leave_the_value_alone_and_know_no_loss() -> None:
    trained = train_value(START, slope_one, Schedule(1.0, 0, None))
    assert torch.equal(trained.value["x"], START["x"])
    assert math.isnan(trained.loss)
    assert (trained.losses, trained.steps, trained.finite) == ([], 0, True)


def test_every_training_starts_with_a_fresh_optimizer_and_leaves_its_start_alone() -> None:
    first, second = (train_value(START, slope_one, Schedule(0.3, 4, None)) for _ in range(2))
    assert torch.equal(first.value["x"], second.value["x"])
    assert START["x"].item() == 10.0
    assert not first.value["x"].requires_grad


def test_the_edit_loss_is_the_mean_surprise_of_the_target_tokens(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    edit = PromptEncoder(golden_tokenizer).edit("Who founded Brightwater?", "Lucan Vey")
    surprise = golden_model(torch.tensor([edit.ids])).logits[0].log_softmax(dim=-1).neg()
    start = len(edit.prompt)
    by_hand = sum(surprise[start + i - 1, token] for i, token in enumerate(edit.target)) / len(edit.target)
    module = golden_model.get_submodule("model.layers.2.mlp.down_proj")
    hook = PromptHook(golden_model, module, lambda *_: None)
    prompts: list[list[list[bool]]] = []

    def respond(inputs: Tensor, outputs: Tensor, prompt: Tensor) -> None:
        prompts.append(prompt.tolist())

    torch.testing.assert_close(edit_loss(golden_model, hook, edit, respond), by_hand)
    assert prompts == [[[True] * start + [False] * len(edit.target)]]


def test_edits_of_one_entry_follow_each_other_and_all_others_go_side_by_side() -> None:
    assert list(waves({0: 5, 1: 6, 3: 5, 4: 5, 7: 6})) == [{0: 5, 1: 6}, {3: 5, 7: 6}, {4: 5}]
    assert list(waves({})) == []
