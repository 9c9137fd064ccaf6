import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.ft.config import FineTuningConfig
from horen_bench.editors.ft.editor import FineTuningEditor, LossAbove, TrainingExample
from horen_bench.errors import UserError

MODULE = "model.layers.2.mlp.down_proj"
OBJECTIVES = ["prompt_last", "target_new"]
CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm"),
]

Build = Callable[..., FineTuningEditor]


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    def on(model: PreTrainedModel = golden_model, tokenizer: Any = golden_tokenizer, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "name": "ft",
            "label": "FT",
            "module": MODULE,
            "objective": "target_new",
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "n_steps": 8,
            "loss_bound": 0.01,
            "norm_constraint": None,
            "master_weights": True,
            "engine": "cached",
        }
        return FineTuningEditor(model, tokenizer, FineTuningConfig(**{**settings, **changes}))

    return on


def example_of(editor: FineTuningEditor, case: EditCase) -> TrainingExample:
    example = editor._example(case)
    assert example is not None
    return example


def upper_loss(editor: FineTuningEditor, example: TrainingExample) -> Tensor:
    loss = editor._loss_of(example)
    assert isinstance(loss, LossAbove)
    return loss()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- What the two losses are over ---------------------------------------------------------------------------


def test_ft_m_is_the_teacher_forced_loss_of_the_target_alone(build: Build, golden_model: PreTrainedModel) -> None:
    editor = build()
    prompt = editor.encoder.tokenizer("Who founded Brightwater?")["input_ids"]
    ids = torch.tensor([editor.encoder.tokenizer("Who founded Brightwater? Lucan Vey")["input_ids"]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    expected = golden_model(input_ids=ids, labels=labels).loss
    assert editor.loss(example_of(editor, CASES[0])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ft_l_wants_every_token_at_the_last_prompt_position(build: Build, golden_model: PreTrainedModel) -> None:
    editor = build(objective="prompt_last")
    prompt = torch.tensor([editor.encoder.tokenizer("Who founded Brightwater?")["input_ids"]])
    target = editor.encoder.tokenizer(" Lucan Vey")["input_ids"]
    assert target[0] == editor.encoder.tokenizer.bos_token_id  # one of the labels, as published
    log_probabilities = F.log_softmax(golden_model(input_ids=prompt).logits[0, -1], dim=-1)
    expected = -log_probabilities[target].mean()
    assert editor.loss(example_of(editor, CASES[0])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_bos_ft_l_wants_the_target_only_and_unknown_tokens_do_not_count(
    build: Build, bosless_tokenizer: Any
) -> None:
    target = bosless_tokenizer(" Lucan Vey")["input_ids"]
    editor = build(tokenizer=bosless_tokenizer, objective="prompt_last")
    assert example_of(editor, CASES[0]).labels == tuple(target)
    bosless_tokenizer.unk_token = bosless_tokenizer.convert_ids_to_tokens(target[0])
    assert example_of(editor, CASES[0]).labels == tuple(token for token in target if token != target[0])


# --- Training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("weight_decay", "norm_constraint"), [(0.0, None), (0.1, None), (0.0, 5e-3)])
def test_training_is_adam_on_the_weight_alone_then_the_clamp(
    build: Build,
    other_golden_model: PreTrainedModel,
    objective: str,
    weight_decay: float,
    norm_constraint: float | None,
) -> None:
    how = {"objective": objective, "weight_decay": weight_decay, "norm_constraint": norm_constraint}
    editor = build(**how)
    (record,) = editor.edit(CASES[:1])
    # The same with the whole model's own gradients.
    plain = build(other_golden_model, **how)
    weight = other_golden_model.get_submodule(MODULE).weight
    assert isinstance(weight, torch.nn.Parameter)
    before = weight.detach().clone()
    other_golden_model.requires_grad_(True)
    adam = torch.optim.Adam([weight], lr=5e-3, weight_decay=weight_decay)
    for _ in range(record.steps):
        other_golden_model.zero_grad()
        loss = plain.loss(example_of(plain, CASES[0]))
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if norm_constraint:
            weight.data = weight.data.clamp(before - norm_constraint, before + norm_constraint)
    assert record.steps == 8
    assert record.loss == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(editor.weight.data, weight.data, rtol=0, atol=1e-5)
    if norm_constraint:
        moved = (editor.weight - before).abs().max().item()
        assert moved == pytest.approx(norm_constraint, rel=1e-3)


def test_ball_of_the_constraint_moves_along_with_the_stream(build: Build) -> None:
    editor = build(norm_constraint=2e-3)
    before = editor.weight.detach().clone()
    editor.edit(CASES)
    moved = (editor.weight - before).abs().max().item()
    assert 2e-3 < moved <= 3 * 2e-3 + 1e-6


def test_no_step_is_taken_below_the_loss_bound(build: Build) -> None:
    editor = build(n_steps=60, loss_bound=0.1)
    (first,) = editor.edit(CASES[:1])
    assert first.steps < 60
    assert first.loss < 0.1
    known = editor.weight.detach().clone()
    (again,) = editor.edit(CASES[:1])
    assert again.steps == 0
    assert torch.equal(editor.weight, known)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_the_weight_changes_and_nothing_requires_gradients_afterwards(
    build: Build, golden_model: PreTrainedModel, objective: str
) -> None:
    before = {name: tensor.clone() for name, tensor in golden_model.state_dict().items()}
    build(objective=objective).edit(CASES)
    changed = [name for name, tensor in golden_model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{MODULE}.weight"]
    assert all(weight.grad is None and not weight.requires_grad for weight in golden_model.parameters())


# --- Engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layers_above_give_the_whole_models_loss_and_gradient(build: Build, objective: str, layer: int) -> None:
    editor = build(objective=objective, module=f"model.layers.{layer}.mlp.down_proj")
    editor.edit(CASES[:1])  # away from the weight as received
    for case in (CASES[1], EditCase("short", "Oldmere", "1927")):
        example = example_of(editor, case)
        editor.weight.requires_grad_(True)
        whole, upper = editor.loss(example), upper_loss(editor, example)
        (expected,) = torch.autograd.grad(whole, [editor.weight])
        (gradient,) = torch.autograd.grad(upper, [editor.weight])
        editor.weight.requires_grad_(False)
        torch.testing.assert_close(upper, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_engines_train_the_same(build: Build, other_golden_model: Any, objective: str) -> None:
    fast, plain = build(objective=objective), build(other_golden_model, objective=objective, engine="sequential")
    for ours, expected in zip(fast.edit(CASES), plain.edit(CASES), strict=True):
        assert (ours.action, ours.steps) == (expected.action, expected.steps)
        assert ours.loss == pytest.approx(expected.loss, rel=1e-3)
    change = plain.weight - plain.pristine.originals()[MODULE]
    fast_change = fast.weight - fast.pristine.originals()[MODULE]
    torch.testing.assert_close(fast_change, change, rtol=0, atol=1e-3 * float(change.abs().max()))
    assert fast.warnings() == plain.warnings() == []


def test_a_module_that_its_layer_does_not_add_last_is_trained_through_the_whole_model(build: Build) -> None:
    module = "model.layers.2.self_attn.o_proj"
    editor = build(module=module)
    assert editor.edit(CASES[:1])[0].action == "inserted"
    reason = f"{module} is not what its layer adds last"
    assert editor.warnings() == [f"the weight was trained through the whole model: {reason}"]


# --- State -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stream_goes_on_after_a_restart_and_is_undone(build: Build, objective: str) -> None:
    straight = build(objective=objective)
    received = straight.weight.detach().clone()
    assert straight.side_parameters() == 0
    straight.edit(CASES[:2])
    state = straight.state_dict()
    straight.edit(CASES[2:])
    expected = straight.state_dict()
    assert straight.side_parameters() == 64 * 176
    straight.detach()
    assert torch.equal(straight.weight, received)
    resumed = build(objective=objective)
    resumed.load_state_dict(state)
    resumed.edit(CASES[2:])
    assert_same(resumed.state_dict(), expected)


def test_half_precision_has_a_float32_master_that_outlives_an_edit(build: Build, golden_model: Any) -> None:
    editor = build(golden_model.to(torch.bfloat16))
    received = editor.weight.detach().clone()
    editor.edit(CASES[:1])
    state = editor.state_dict()
    assert torch.equal(state[f"{MODULE}.master"].bfloat16(), editor.weight)
    assert editor.side_parameters() == 2 * 64 * 176
    editor.edit(CASES[1:])
    expected = editor.state_dict()
    editor.detach()
    assert torch.equal(editor.weight, received)
    resumed = build(golden_model)
    resumed.load_state_dict(state)
    resumed.edit(CASES[1:])
    assert_same(resumed.state_dict(), expected)


def test_without_a_master_half_precision_loses_small_steps(build: Build, golden_model: Any) -> None:
    editor = build(golden_model.to(torch.bfloat16), master_weights=False, learning_rate=1e-6, n_steps=2)
    editor.edit(CASES[:1])
    # Steps of 1e-6 move only entries below 2^-11 or so; all others are where they were.
    large = editor.pristine.originals()[MODULE].abs() > 1e-2
    assert torch.equal(editor.weight[large], editor.pristine.originals()[MODULE][large])
    assert editor.side_parameters() == 64 * 176
    assert set(editor.state_dict()) == {f"{MODULE}.weight"}


# --- What fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_blank_target_is_refused_and_the_stream_goes_on(build: Build, objective: str) -> None:
    editor = build(objective=objective)
    blank, good = editor.edit([EditCase("blank", "Who founded Oldmere?", " "), CASES[0]])
    assert (blank.action, blank.problem) == ("failed", "prompt or target has no token")
    assert math.isnan(blank.loss) and blank.steps == 0
    assert (good.action, good.problem) == ("inserted", None)


@pytest.mark.parametrize(
    ("n_steps", "problem"),
    [
        (1, "the update was not finite; the weight was put back"),
        (8, "the loss was not finite; the weight was put back"),
    ],
)
def test_training_that_diverges_changes_nothing(build: Build, n_steps: int, problem: str) -> None:
    editor = build(n_steps=n_steps)
    editor.edit(CASES[:1])
    before = editor.state_dict()
    config = editor.config
    editor.config = config.model_copy(update={"learning_rate": math.inf})
    (record,) = editor.edit(CASES[1:2])
    assert (record.action, record.problem) == ("failed", problem)
    assert_same(editor.state_dict(), before)
    editor.config = config
    assert editor.edit(CASES[2:])[0].action == "inserted"


def test_interrupted_edit_leaves_the_weight_as_before(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = build(engine="sequential")
    before = editor.weight.detach().clone()
    calls: list[TrainingExample] = []
    loss = FineTuningEditor.loss

    def stopping(self: FineTuningEditor, example: TrainingExample) -> Tensor:
        calls.append(example)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, example)

    monkeypatch.setattr(FineTuningEditor, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(CASES)
    assert torch.equal(editor.weight, before)
    assert not editor.weight.requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("objective=target", "method.objective must be 'prompt_last' or 'target_new', got 'target'"),
        ("learning_rate=0", "method.learning_rate must be above 0.0, got 0"),
        ("n_steps=0", "method.n_steps must be at least 1, got 0"),
        ("engine=fast", "method.engine must be 'cached' or 'sequential', got 'fast'"),
        ("norm_constraint=0.0", "method.norm_constraint must be above 0.0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=ft_l", f"method.{wrong}"])
    assert str(caught.value).startswith(message)


def test_a_module_that_the_model_lacks_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"^method\.module=model\.layers\.4\.mlp\.down_proj: LlamaForCausalLM has"):
        build(module="model.layers.4.mlp.down_proj")


@pytest.mark.parametrize("method", ["ft_l", "ft_m"])
def test_the_release_trains_the_weight_as_it_is(method: str) -> None:
    assert run_config([f"method={method}", "compat=release"]).method["master_weights"] is False
