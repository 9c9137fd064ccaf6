import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.ultraedit.config import UltraEditConfig
from horen_bench.editors.ultraedit.editor import (
    Features,
    LabelledSentence,
    RowStatistics,
    Shift,
    UltraEditEditor,
    closed_form,
)
from horen_bench.errors import UserError

MODULES = ["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.up_proj"]
CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm"),
    EditCase("fourth", "In which year did the bridge open?", "1927"),
]

Build = Callable[..., UltraEditEditor]


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    def on(model: PreTrainedModel = golden_model, tokenizer: Any = golden_tokenizer, **changes: Any) -> UltraEditEditor:
        settings = {
            **run_config(["method=ultraedit"]).method.model_dump(),
            "modules": MODULES,
            "learning_rate": 1e-3,
            **changes,
        }
        return UltraEditEditor(model, tokenizer, UltraEditConfig(**settings))

    return on


def weights(editor: UltraEditEditor) -> dict[str, Tensor]:
    return {path: weight.clone() for path, weight in editor.pristine.weights.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- Normaliser and closed form, by hand -------------------------------------------------------------------

KEYS = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.0, 1.0]])
GRADIENTS_A = torch.tensor([[0.5], [-0.25], [0.0]])
GRADIENTS_B = torch.tensor([[0.1], [0.2], [0.0]])


def after(*gradients: Tensor) -> RowStatistics:
    statistics = RowStatistics.empty(3, torch.device("cpu"))
    for rows in gradients:
        statistics = statistics.updated(torch.cat([KEYS, rows], dim=1))
    return statistics


def test_normaliser_of_one_and_of_two_modules() -> None:
    # Column 1 of A: values 1, 3, 0 with mean 4/3 and unbiased variance 7/3, counted three times: spread 7, and
    # deviation sqrt(7 / 2).
    one, two = after(GRADIENTS_A), after(GRADIENTS_A, GRADIENTS_B)
    assert (one.n, two.n) == (3, 6)
    torch.testing.assert_close(one.mean, torch.tensor([4 / 3, 3.0, 1 / 12]))
    torch.testing.assert_close(one.spread, torch.tensor([7.0, 21.0, 0.4375]))
    torch.testing.assert_close(one.deviation, torch.tensor([1.870829, 3.240370, 0.467707]), rtol=1e-5, atol=0)
    torch.testing.assert_close(two.mean, torch.tensor([4 / 3, 3.0, 11 / 120]))
    torch.testing.assert_close(two.spread, torch.tensor([14.0, 42.0, 0.4679167]))
    torch.testing.assert_close(two.deviation, torch.tensor([1.673320, 2.898275, 0.305914]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("gradients", "change"),
    [(GRADIENTS_A, [0.00108796, 0.00275267]), (GRADIENTS_B, [-0.00178257, -0.00011786])],
)
def test_shift_of_a_matrix(gradients: Tensor, change: list[float]) -> None:
    shift = closed_form(Features(KEYS, gradients), after(GRADIENTS_A, GRADIENTS_B), learning_rate=1e-2)
    torch.testing.assert_close((shift.left.T @ shift.right)[:, 0], torch.tensor(change), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("n_rows", [5, 30])
def test_both_forms_of_the_solution_are_the_plain_one(n_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(n_rows, size, generator=generator) for size in (12, 7))
    features = Features(inputs, gradients)
    statistics = RowStatistics.empty(19, inputs.device).updated(features.joined)
    shift = closed_form(features, statistics, 0.1)
    keys, normal = statistics.normalized(features.joined).tensor_split([12], dim=1)
    changes = -0.1 * keys.square().sum(dim=1, keepdim=True) * normal
    plain = torch.linalg.solve(inputs.T @ inputs + torch.eye(12), inputs.T @ changes)
    torch.testing.assert_close(shift.left.T @ shift.right, plain, rtol=1e-4, atol=1e-6)
    assert shift.left.T.matmul(shift.right).abs().max() <= shift.bound()


def test_one_row_has_no_variance_and_poisons_nothing() -> None:
    statistics = RowStatistics.empty(2, torch.device("cpu")).updated(torch.tensor([[3.0, 4.0]]))
    assert statistics.normalized(torch.tensor([[3.0, 4.0]])).tolist() == [[0.0, 0.0]]
    assert statistics.updated(torch.tensor([[5.0, 4.0]])).spread.tolist() == [2.0, 0.0]


def test_bound_of_a_shift_is_not_finite_where_an_entry_is_not() -> None:
    ones = torch.ones(2, 3)
    assert Shift(ones, ones).bound() == pytest.approx(2.0)
    assert not Shift(ones, torch.tensor([[1.0, math.nan], [1.0, 1.0]])).bound() < math.inf
    assert not Shift(ones * 1e30, ones * 1e30).bound() < math.inf


# --- Rows and labels of the two regimes --------------------------------------------------------------------


def test_release_makes_a_bos_a_label_where_the_tokenizer_adds_one(
    build: Build, golden_tokenizer: Any, bosless_tokenizer: Any
) -> None:
    answer = golden_tokenizer(" Lucan Vey", add_special_tokens=False)["input_ids"]
    with_bos, without = (
        build(tokenizer=tokenizer)._sentence(CASES[0]) for tokenizer in (golden_tokenizer, bosless_tokenizer)
    )
    assert with_bos is not None and without is not None
    assert with_bos.labels == (golden_tokenizer.bos_token_id, *answer)
    assert without.labels == tuple(answer)
    original = build(regime="original")._sentence(CASES[0])
    assert original == LabelledSentence(with_bos.ids, tuple(answer))


def test_labels_never_outnumber_what_can_be_predicted(build: Build) -> None:
    sentence = build()._sentence(EditCase("bare", "", "Lucan"))
    assert sentence is not None  # the BOS is the prompt; a second one before it cannot be predicted
    assert len(sentence.labels) == len(sentence.ids) - 1


def test_rows_are_those_that_predict_the_answer_or_all(build: Build) -> None:
    sentences = [sentence for sentence in map(build(regime="original")._sentence, CASES[:2]) if sentence]
    n_labels, n_ids = (
        sum(len(sentence.labels) for sentence in sentences),
        sum(len(sentence.ids) for sentence in sentences),
    )
    _, answer = build(regime="original").batch_features(sentences)
    _, sentence = build().batch_features(sentences)
    for path in MODULES:
        assert answer[path].inputs.shape == (n_labels, 64)
        assert sentence[path].gradients.shape == (n_ids, 176)


def test_padded_sentences_have_the_rows_they_have_alone_scaled_by_the_mean_over_labels(build: Build) -> None:
    editor = build(regime="original")
    sentences = [sentence for sentence in map(editor._sentence, CASES[:2]) if sentence]
    _, together = editor.batch_features(sentences)
    total = sum(len(sentence.labels) for sentence in sentences)
    start = 0
    for sentence in sentences:
        _, alone = editor.batch_features([sentence])
        n = len(sentence.labels)
        for path in MODULES:
            rows = slice(start, start + n)
            torch.testing.assert_close(together[path].inputs[rows], alone[path].inputs, rtol=1e-4, atol=1e-5)
            expected = alone[path].gradients * n / total
            torch.testing.assert_close(together[path].gradients[rows], expected, rtol=1e-3, atol=1e-6)
        start += n


def test_features_are_inputs_and_loss_gradients_of_the_module(build: Build, golden_model: PreTrainedModel) -> None:
    editor = build(regime="original")
    sentence = editor._sentence(CASES[0])
    assert sentence is not None
    loss, features = editor.batch_features([sentence])
    module = golden_model.get_submodule(MODULES[0])
    ids, n = torch.tensor([sentence.ids]), len(sentence.labels)
    golden_model.requires_grad_(True)
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    labels = torch.full_like(ids, -100)
    labels[0, -n:] = torch.tensor(sentence.labels)
    plain = golden_model(input_ids=ids, labels=labels).loss
    (gradient,) = torch.autograd.grad(plain, outputs)
    handle.remove()
    golden_model.requires_grad_(False)
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(features[MODULES[0]].gradients, gradient[0, -n - 1 : -1], rtol=1e-4, atol=1e-7)


def test_editing_gives_no_weight_a_gradient_and_leaves_no_hook(build: Build, golden_model: PreTrainedModel) -> None:
    build().edit(CASES)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in golden_model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in golden_model.modules())


# --- Turns and statistics ----------------------------------------------------------------------------------


def test_calls_split_on_turn_borders_equal_one_call(build: Build) -> None:
    how = {"edits_per_turn": 2, "micro_batch": 2, "regime": "original"}
    straight = build(**how)
    straight.edit(CASES[:3])  # a turn of two and an open one, which is finished
    expected = straight.state_dict()
    straight.detach()
    split = build(**how)
    split.edit(CASES[:2])
    split.edit(CASES[2:3])
    assert_same(split.state_dict(), expected)


def test_turn_size_changes_what_is_written(build: Build) -> None:
    apart = build()
    apart.edit(CASES[:2])
    written_apart = weights(apart)
    apart.detach()
    joint = build(edits_per_turn=2)
    joint.edit(CASES[:2])
    assert not torch.equal(weights(joint)[MODULES[0]], written_apart[MODULES[0]])
    assert joint.warnings() == ["edits were written in turns of 2"]
    assert joint.slice_size == 2


def test_per_turn_statistics_forget_and_lifelong_ones_do_not(build: Build) -> None:
    for regime, same in (("release", True), ("original", False)):
        editor = build(regime=regime)
        changes = []
        for _ in range(2):
            editor.edit(CASES[:1])
            changes.append(editor.pristine.weights[MODULES[0]] - editor.pristine.originals()[MODULES[0]])
            editor.pristine.restore()
        assert torch.equal(*changes) is same
        (statistics,) = editor.statistics.values()
        assert (statistics.n == 0) is same
        editor.detach()


def test_lifelong_statistics_go_on_after_a_restart(build: Build) -> None:
    straight = build(regime="original")
    straight.edit(CASES[:2])
    state = straight.state_dict()
    straight.edit(CASES[2:])
    expected = straight.state_dict()
    assert straight.side_parameters() == 2 * 64 * 176 + 2 * 240 + 1
    straight.detach()
    assert straight.statistics[64, 176].n == 0
    resumed = build(regime="original")
    resumed.load_state_dict(state)
    resumed.edit(CASES[2:])
    assert_same(resumed.state_dict(), expected)


def test_release_state_does_not_do_for_the_original(build: Build) -> None:
    state = build().state_dict()
    with pytest.raises(ValueError, match=r"the state lacks 'normalizer\.64x176'"):
        build(regime="original").load_state_dict(state)


# --- Cases that cannot be written --------------------------------------------------------------------------


def test_blank_target_fails_alone_and_the_turn_goes_on(build: Build) -> None:
    cases = [CASES[0], EditCase("blank", "Who founded Oldmere?", "  "), CASES[1]]
    editor = build(edits_per_turn=3)
    first, blank, last = editor.edit(cases)
    assert (first.action, blank.action, last.action) == ("inserted", "failed", "inserted")
    assert blank.problem == "prompt or target has no token"
    written = weights(editor)
    editor.detach()
    build(edits_per_turn=2).edit([CASES[0], CASES[1]])
    assert_same(weights(editor), written)


@pytest.mark.parametrize("regime", ["release", "original"])
def test_update_that_is_not_finite_changes_nothing_and_the_stream_goes_on(build: Build, regime: str) -> None:
    editor = build(regime=regime)
    editor.edit(CASES[:1])
    before = editor.state_dict()
    config = editor.config
    editor.config = config.model_copy(update={"learning_rate": 1e38})
    (record,) = editor.edit(CASES[1:2])
    assert record.action == "failed"
    assert record.problem == f"the update of {MODULES[0]} was not finite; the turn's cases were not written"
    assert_same(editor.state_dict(), before)
    editor.config = config
    assert editor.edit(CASES[2:3])[0].action == "inserted"


# --- Half precision ----------------------------------------------------------------------------------------


def test_half_precision_is_rounded_once_at_the_sum(build: Build, golden_model: PreTrainedModel) -> None:
    editor = build(golden_model.to(torch.bfloat16))  # type: ignore[arg-type]
    sentence = editor._sentence(CASES[0])
    assert sentence is not None
    features, statistics = editor._features([sentence])
    path = MODULES[0]
    assert features[path].inputs.dtype == torch.bfloat16
    shift = closed_form(features[path], statistics[64, 176], editor.config.learning_rate)
    expected = editor.pristine.weights[path] + (shift.right.T @ shift.left).bfloat16()
    editor.edit(CASES[:1])
    assert torch.equal(editor.pristine.weights[path], expected)
    assert editor.warnings() == [
        "weights are bfloat16; the published numbers were obtained in float16, as model.dtype=float16 does"
    ]
    assert build(editor.model, regime="original").warnings() == []


def test_masters_keep_what_rounding_drops_and_are_saved(build: Build, golden_model: PreTrainedModel) -> None:
    editor = build(golden_model.to(torch.bfloat16), master_weights=True)  # type: ignore[arg-type]
    received = weights(editor)
    editor.edit(CASES[:2])
    state = editor.state_dict()
    master = state[f"{MODULES[0]}.master"]
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    assert torch.equal(master.bfloat16(), editor.pristine.weights[MODULES[0]])
    assert editor.side_parameters() == 2 * 2 * 64 * 176
    editor.edit(CASES[2:])
    expected = editor.state_dict()
    editor.detach()
    assert_same(weights(editor), received)
    editor.load_state_dict(state)
    editor.edit(CASES[2:])
    assert_same(editor.state_dict(), expected)


# --- What can be edited ------------------------------------------------------------------------------------


def test_a_matrix_that_is_stored_the_other_way_round_is_shifted_alike(build: Build, golden_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    model.requires_grad_(False)
    path = "transformer.h.1.mlp.c_fc"
    editor = build(model, modules=[path])
    sentence = editor._sentence(CASES[0])
    assert sentence is not None
    features, statistics = editor._features([sentence])
    shift = closed_form(features[path], statistics[32, 128], editor.config.learning_rate)
    expected = editor.pristine.weights[path] + shift.left.T @ shift.right
    editor.edit(CASES[:1])
    torch.testing.assert_close(editor.pristine.weights[path].data, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("regime=paper", "method.regime must be one of release, original, got 'paper'"),
        ("learning_rate=0.0", "method.learning_rate must be above 0.0, got 0.0"),
        ("edits_per_turn=0", "method.edits_per_turn must be at least 1, got 0"),
        ("micro_batch=1.5", "method.micro_batch must be a whole number, got 1.5"),
        ("regimes.release.rows=mask", "method.regimes.release.rows must be 'sentence' or 'answer', got 'mask'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=ultraedit", f"method.{wrong}"])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("lm_head", "method.modules=lm_head is in no decoder layer; name one such as model.layers.5"),
        ("model.layers.1.mlp", "method.modules=model.layers.1.mlp is a LlamaMLP; a linear module is needed"),
    ],
)
def test_modules_that_cannot_be_edited_are_refused(build: Build, module: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(modules=[module])
    assert str(caught.value).startswith(message)


def test_modules_may_be_any_linear_ones(build: Build) -> None:
    editor = build(modules=["model.layers.0.self_attn.o_proj", "model.layers.3.mlp.down_proj"])
    assert set(editor.statistics) == {(64, 64), (176, 64)}
    assert isinstance(editor.model.get_submodule("model.layers.3.mlp.down_proj"), nn.Linear)
    assert [record.action for record in editor.edit(CASES)] == ["inserted"] * 4
