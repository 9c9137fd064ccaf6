"""UnKE: two stages, the texts it preserves, and what the release does otherwise."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.unke.block import BlockTarget, optimizer, read_block
from horen_bench.editors.unke.compat import release_broadcast, release_cumsum
from horen_bench.editors.unke.config import BlockOutputTraining, BlockTraining, Preservation, UnkeConfig
from horen_bench.editors.unke.editor import UnkeEditor
from horen_bench.editors.unke.preservation import PreservedTexts, preserved_text
from horen_bench.editors.unke.values import TrainedOutputs, by_upper_layers, by_whole_model, train
from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.models.architecture import skeleton
from horen_bench.models.partial import UpperLayers
from horen_bench.paths import resource
from horen_bench.prompts import EncodedEdit, PromptEncoder, pad
from horen_bench.world import World
from horen_bench.world.corpora import other_world_texts

BLOCK = "model.layers.1"
CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey and the guild of the ferry"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm"),
]
NOTHING = EditCase("nothing", "Who founded Brightwater?", " ")
TEXTS = [
    "Lucan Vey described the royal orchestra after the harvest fair.",
    "Tobin Ashe visited the bridge.",
    "The old tower was seen in Greywater in late September.",
    "Mira Tolland painted Halvard Bay before the war.",
    "Anselm Kray left.",
    "The Starling 12 was seen in Oldmere in late September.",
]
SETTINGS: dict[str, Any] = {
    "name": "unke",
    "label": "UnKE",
    "module": BLOCK,
    "value": {"n_steps": 25, "learning_rate": 0.2, "weight_decay": 1e-3, "clamp": 4.0},
    "block": {"n_steps": 12, "learning_rate": 2e-3, "weight_decay": 0.01},
    "preserve": "correct",
    "pos_ids": "arange",
    "batch_size": 1,
    "master_weights": False,
    "engine": "cached",
}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS))
    return str(path)


@pytest.fixture
def build(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase, corpus: str
) -> Callable[..., UnkeEditor]:
    def of(model: PreTrainedModel = golden_model, tokenizer: Any = golden_tokenizer, **changes: Any) -> UnkeEditor:
        preservation = {"corpus": corpus, "template": "{} ", "n_texts": 4, "max_tokens": None}
        config = UnkeConfig.model_validate({**SETTINGS, "preservation": preservation, **changes})
        return UnkeEditor(model, tokenizer, config, seed=42)

    return of


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- Small models of the architectures in use -----------------------------------------------------------------

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def small(architecture: str) -> PreTrainedModel:
    """Randomly initialised; sizes are as small as they get."""
    torch.manual_seed(0)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8)),
        "gpt_oss": lambda: GptOssForCausalLM(
            GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
        ),
    }
    model = models[architecture]()
    model.requires_grad_(False)
    return model


architectures = pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_oss"])
sides = pytest.mark.parametrize("side", ["right", "left"])
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16], [17, 18, 19, 20, 21, 22]]


# --- Stage 1 --------------------------------------------------------------------------------------------------


def test_twenty_five_forward_passes_are_twenty_four_steps() -> None:
    """Under a constant gradient each step of Adam moves every number by the learning rate."""
    seen: list[Tensor] = []

    def losses(delta: Tensor) -> Tensor:
        seen.append(delta.detach().clone())
        return delta.sum(dim=1)

    initial = torch.full((2, 4), 3.0)
    targets = train(losses, initial, BlockOutputTraining(n_steps=25, learning_rate=0.05, weight_decay=0.0, clamp=4.0))
    assert len(seen) == len(targets.losses) == 25
    torch.testing.assert_close(seen[1], torch.full((2, 4), -0.05))
    torch.testing.assert_close(targets.vectors, torch.full((2, 4), 3.0 - 24 * 0.05))


def test_target_stays_within_the_clamp() -> None:
    initial = torch.tensor([[3.0, 4.0], [0.3, 0.4]])  # norms 5 and 0.5
    how = BlockOutputTraining(n_steps=25, learning_rate=1.0, weight_decay=0.0, clamp=2.0)
    moved = train(lambda delta: delta.sum(dim=1), initial, how).vectors - initial
    torch.testing.assert_close(moved.norm(dim=1), torch.tensor([10.0, 1.0]))


def test_decay_is_on_the_norm_and_not_its_square() -> None:
    """Two steps by hand."""
    initial = torch.tensor([[2.0, 0.0]])
    how = BlockOutputTraining(n_steps=3, learning_rate=0.1, weight_decay=8.0, clamp=4.0)
    targets = train(lambda delta: delta.sum(dim=1), initial, how)
    # The norm has no gradient at 0, so the first is (1, 1), and delta becomes -0.1 (1, 1). The second adds
    # 8 / ||h0||^2 = 2 times delta / ||delta|| = -(1, 1) / sqrt(2): it is g = 1 - sqrt(2). Adam's moments are then
    # (0.09 + 0.1 g) / 0.19 and (0.000999 + 0.001 g^2) / 0.001999.
    g = 1 - 2**0.5
    step = 0.1 * ((0.09 + 0.1 * g) / 0.19) / ((0.000999 + 0.001 * g**2) / 0.001999) ** 0.5
    torch.testing.assert_close(targets.vectors - initial, torch.full((1, 2), -0.1 - step))


@pytest.mark.parametrize("tokenizer_name", ["golden_tokenizer", "bosless_tokenizer"])
@pytest.mark.parametrize("engine", ["cached", "sequential"])
def test_value_is_written_at_the_last_token_of_the_prompt(
    tokenizer_name: str, engine: str, build: Any, golden_model: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(tokenizer_name)
    editor = build(tokenizer=tokenizer, engine=engine, value={**SETTINGS["value"], "n_steps": 1})
    edit = PromptEncoder(tokenizer).edit(CASES[0].prompt, CASES[0].target)
    targets = editor._target_vectors([edit])
    hidden = golden_model(torch.tensor([edit.prompt]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(targets.vectors[0], hidden[-1], rtol=1e-5, atol=1e-5)
    logits = golden_model(torch.tensor([edit.ids[:-1]])).logits[0, len(edit.prompt) - 1 :]
    loss = nn.functional.cross_entropy(logits, torch.tensor(edit.target))
    torch.testing.assert_close(targets.losses[0, 0], loss, rtol=1e-5, atol=1e-5)
    _, prompt = editor.block_targets([edit], torch.full((1, 64), 7.0), TEXTS)
    torch.testing.assert_close(prompt.outputs[0, :-1], hidden[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompt.outputs[0, -1], torch.full((64,), 7.0))
    assert prompt.outputs.shape[1] == len(edit.prompt) == len(tokenizer(CASES[0].prompt)["input_ids"])


@architectures
def test_target_vectors_are_the_same_from_the_upper_layers_alone_and_side_by_side(architecture: str) -> None:
    model = small(architecture)
    block = model.get_submodule(BLOCK)
    edits = [EncodedEdit((1, 2, 3, 4, 5, 6, 7), (8, 9, 10)), EncodedEdit((12, 13), (15, 16, 17, 18, 19))]
    how = BlockOutputTraining(n_steps=6, learning_rate=0.05, weight_decay=1e-3, clamp=4.0)
    plain = by_whole_model(model, block, edits, how)
    fast = by_upper_layers(UpperLayers(model, BLOCK), edits, how)
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.vectors, plain.vectors, rtol=1e-3, atol=1e-3)
    assert (plain.losses[-1] < plain.losses[0]).all()


# --- Stage 2 --------------------------------------------------------------------------------------------------


@architectures
@sides
@pytest.mark.parametrize("whole", [False, True])
def test_nothing_is_to_be_preserved_before_the_first_step(architecture: str, side: Any, whole: bool) -> None:
    model = small(architecture)
    block = model.get_submodule(BLOCK)
    target = read_block(model, block, pad(ROWS, 0, side), whole=whole)
    assert target.error(block) == 0
    outputs = model(*batch_of(side), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(target.outputs, outputs)


def batch_of(side: Any) -> tuple[Tensor, Tensor]:
    batch = pad(ROWS, 0, side)
    return batch.input_ids, batch.attention_mask


@sides
def test_last_prompt_token_is_found_on_either_side_of_padding(side: Any) -> None:
    model = small("llama")
    target = read_block(model, model.get_submodule(BLOCK), pad(ROWS, 0, side), whole=False)
    vectors = torch.arange(3.0)[:, None].expand(3, 32) + 1
    new = target.with_last(vectors).outputs
    for i, row in enumerate(ROWS):
        at = 8 if side == "left" else len(row) - 1
        torch.testing.assert_close(new[i, at], vectors[i])
        assert torch.equal(new[i, :at], target.outputs[i, :at])
        assert torch.equal(new[i, at + 1 :], target.outputs[i, at + 1 :])


@architectures
def test_release_positions_change_padding_on_the_right_and_nothing_else(architecture: str) -> None:
    model = small(architecture)
    block, decoder = model.get_submodule(BLOCK), model.get_decoder()
    target = read_block(model, block, pad(ROWS, 0, "right"), whole=False)
    other = release_cumsum(target, decoder.rotary_emb)
    outputs = block(*other.args, **other.kwargs)
    assert torch.equal(outputs[target.mask], target.outputs[target.mask])
    assert (outputs - target.outputs)[~target.mask].abs().max() > 1e-4
    assert other.error(block) > 0


def test_release_positions_leave_text_behind_padding_as_it_is() -> None:
    model = small("llama")
    block = model.get_submodule(BLOCK)
    target = read_block(model, block, pad(ROWS, 0, "left"), whole=False)
    other = release_cumsum(target, model.model.rotary_emb)
    outputs = block(*other.args, **other.kwargs)
    torch.testing.assert_close(outputs[target.mask], target.outputs[target.mask], rtol=1e-5, atol=1e-5)


def test_release_comparison_holds_every_text_to_the_first() -> None:
    """By hand: outputs (1, 2, 3) against themselves are off by (0, 1, 2), squares 0, 1 and 4."""
    outputs = torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 2, 4)

    class Given(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor]:
            return (hidden,)

    model = small("llama")
    target = read_block(model, model.get_submodule(BLOCK), pad(ROWS, 0), whole=False)
    given = BlockTarget((outputs,), {}, target.mask, outputs)
    assert given.error(Given()) == 0
    assert given.error(Given(), release_broadcast) == pytest.approx(5 / 3)


def test_release_comparison_is_off_from_the_first_step(build: Any) -> None:
    errors = {}
    for preserve in ("correct", "release_broadcast"):
        editor = build(preserve=preserve)
        errors[preserve] = errors_of(editor, CASES[0])
        editor.detach()
    assert errors["correct"][0, 0] == 0
    assert errors["release_broadcast"][0, 0] > 0.1
    # A batch of one prompt is its own first row.
    assert errors["release_broadcast"][0, 1] == errors["correct"][0, 1] > 0


def errors_of(editor: UnkeEditor, case: EditCase) -> Tensor:
    """The two errors of the block before each step of one edit."""
    edit = editor.encoder.edit(case.prompt, case.target)
    targets = editor.block_targets([edit], editor._target_vectors([edit]).vectors, editor.texts.draw())
    editor.pristine.keep()
    return editor._train(editor._trainees(), targets)


def test_error_at_the_prompt_falls(build: Any) -> None:
    errors = errors_of(build(), CASES[0])
    assert errors.shape == (12, 2)
    assert errors[-1, 1] < errors[0, 1] / 5


def test_layer_norms_are_not_decayed_and_biases_are() -> None:
    block = small("qwen2").get_submodule(BLOCK)
    adamw = optimizer(dict(block.named_parameters()), BlockTraining(n_steps=1, learning_rate=1e-3, weight_decay=0.01))
    spared = {id(tensor) for group in adamw.param_groups if group["weight_decay"] == 0 for tensor in group["params"]}
    names = {name for name, tensor in block.named_parameters() if id(tensor) in spared}
    assert names == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(block.parameters())) == 12


# --- The edit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["cached", "sequential"])
def test_only_the_block_changes_and_every_parameter_of_it(engine: str, build: Any, golden_model: Any) -> None:
    before = parameters(golden_model)
    editor = build(engine=engine)
    (record,) = editor.edit(CASES[1:2])
    inside = {name for name in before if name.startswith(f"{BLOCK}.")}
    assert changed(before, golden_model) == inside and len(inside) == 9
    assert (record.action, record.steps, record.problem) == ("inserted", 24 + 12, None)
    assert 0 < record.loss < 1
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in golden_model.parameters())
    assert editor.side_parameters() == sum(before[name].numel() for name in inside)
    editor.detach()
    assert not changed(before, golden_model)


@pytest.mark.parametrize("engine", ["cached", "sequential"])
def test_edits_come_out_greedily_and_the_second_keeps_the_first(
    engine: str, build: Any, golden_model: Any, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    build(engine=engine).edit(CASES[1:])
    for case in CASES[1:]:
        edit = PromptEncoder(golden_tokenizer).edit(case.prompt, case.target)
        (predicted,) = greedy_decode(golden_model, [list(edit.prompt)], [len(edit.target)], pad_id=0)
        assert tuple(predicted) == edit.target


def test_both_engines_write_the_same(
    build: Any, golden_model: Any, other_golden_model: Any, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    fast, plain = build(engine="cached"), build(other_golden_model, engine="sequential")
    for ours, theirs in zip(fast.edit(CASES), plain.edit(CASES), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
    for name, weight in plain.pristine.weights.items():
        change = weight - plain.pristine.originals()[name]
        ours = fast.pristine.weights[name] - plain.pristine.originals()[name]
        torch.testing.assert_close(ours, change, rtol=0, atol=1e-2 * float(change.abs().max()))
    rows = PromptEncoder(golden_tokenizer).prompts([case.prompt for case in CASES] + TEXTS[:2])
    predicted = [greedy_decode(model, rows, [8] * 5, pad_id=0) for model in (golden_model, other_golden_model)]
    assert predicted[0] == predicted[1]


@architectures
def test_both_engines_train_the_block_alike_on_other_architectures(
    architecture: str, build: Any, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    edit, texts = EncodedEdit((1, 2, 3, 4, 5, 6, 7), (8, 9)), TEXTS[:3]
    histories = []
    for engine in ("cached", "sequential"):
        editor = build(_folding(small(architecture)), golden_tokenizer, engine=engine)
        targets = editor._target_vectors([edit])
        errors = editor._train(editor._trainees(), editor.block_targets([edit], targets.vectors, texts))
        histories.append(errors)
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-3, atol=1e-6)
    assert histories[0][0, 0] == 0 and histories[0][-1, 1] < histories[0][0, 1]


def _folding(model: PreTrainedModel) -> PreTrainedModel:
    """Token ids beyond the small vocabulary are folded into it."""
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, args: (args[0] % 61,))
    return model


def test_a_model_without_the_usual_layers_takes_the_plain_path_and_says_so(
    build: Any, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=600,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config)
    editor = build(model.requires_grad_(False).eval(), module="model.decoder.layers.1")
    (record,) = editor.edit(CASES[1:2])
    assert record.action == "inserted"
    assert "target vectors were trained on the whole model" in editor.warnings()[0]


# --- Turns, failures, state -----------------------------------------------------------------------------------


def test_blank_answer_is_refused_and_the_stream_goes_on(build: Any) -> None:
    editor = build()
    refused, written = editor.edit([NOTHING, CASES[1]])
    assert (refused.action, refused.problem) == ("failed", "prompt or target has no token")
    assert refused.loss != refused.loss and refused.steps == 0
    assert written.action == "inserted"


def test_refused_case_takes_its_texts_so_that_later_ones_keep_theirs(build: Any, other_golden_model: Any) -> None:
    straight, other = build(), build(other_golden_model)
    straight.edit([NOTHING, CASES[1]])
    other.texts.draw()
    other.edit([CASES[1]])
    assert equal(straight.state_dict(), other.state_dict())


def test_training_that_is_not_finite_puts_the_block_back(build: Any, golden_model: Any) -> None:
    before = parameters(golden_model)
    editor = build(block={**SETTINGS["block"], "learning_rate": 1e30})
    (record,) = editor.edit(CASES[:1])
    assert record.action == "failed" and record.problem is not None
    assert record.problem.startswith("the training of the block was not finite")
    assert not changed(before, golden_model)


def test_target_that_is_not_finite_is_refused_alone(
    build: Any, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = build(batch_size=2)
    plain = editor._target_vectors

    def spoilt(edits: Any) -> TrainedOutputs:
        targets: TrainedOutputs = plain(edits)
        targets.vectors[0, 3] = float("nan")
        return targets

    monkeypatch.setattr(editor, "_target_vectors", spoilt)
    refused, written = editor.edit(CASES[:2])
    assert refused.problem == "the target vector was not finite; the case was not written"
    assert written.action == "inserted"
    assert all(parameter.isfinite().all() for parameter in golden_model.parameters())


@pytest.mark.parametrize("master_weights", [False, True])
def test_interrupted_edit_puts_the_block_back(
    master_weights: bool, build: Any, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden_model.to(torch.bfloat16)
    before, editor = parameters(golden_model), build(master_weights=master_weights)
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW, *_: Any) -> None:
        step(self)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(CASES[:1])
    assert not changed(before, golden_model)
    assert not any(parameter.requires_grad for parameter in golden_model.parameters())


def test_turns_of_two_add_up_on_their_borders(build: Any, other_golden_model: Any) -> None:
    stream = [*CASES, EditCase("fourth", "Who painted boats in Halvard Bay?", "Edda Quillfeather")]
    straight, split = build(batch_size=2), build(other_golden_model, batch_size=2)
    records = straight.edit(stream)
    split.edit(stream[:2])
    split.edit(stream[2:])
    assert equal(straight.state_dict(), split.state_dict())
    assert straight.slice_size == 2 and len({record.seconds for record in records}) == 2
    assert straight.warnings() == ["the block was trained once for 2 cases; a turn ends at each checkpoint"]


def test_state_is_refused_without_its_draws(build: Any) -> None:
    editor = build()
    state = editor.state_dict()
    assert set(state) == {"draws", *editor.pristine.weights}
    del state["draws"]
    with pytest.raises(ValueError, match="the state lacks 'draws'"):
        editor.load_state_dict(state)


def test_after_detach_the_stream_starts_anew(build: Any) -> None:
    editor = build()
    editor.edit(CASES[:2])
    first = editor.state_dict()
    editor.detach()
    editor.edit(CASES[:2])
    assert equal(editor.state_dict(), first)


# --- Dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master_weights", [False, True])
def test_masters_add_up_what_half_precision_rounds_away(master_weights: bool, build: Any) -> None:
    block = {**SETTINGS["block"], "learning_rate": 1e-5}
    editor = build(small_golden(torch.bfloat16), master_weights=master_weights, block=block)
    editor.edit(CASES[1:2])
    weights, originals = editor.pristine.weights, editor.pristine.originals()
    name = f"{BLOCK}.input_layernorm.weight"  # near 1, where bfloat16 has steps of 2^-7
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights[name], originals[name])
    assert editor.side_parameters() == (2 if master_weights else 1) * editor.pristine.numel()
    masters = {key: tensor for key, tensor in editor.state_dict().items() if key.endswith(".master")}
    assert len(masters) == (9 if master_weights else 0)
    if master_weights:
        moved = masters[f"{name}.master"] - originals[name].float()
        assert 6e-5 < moved.abs().max() <= 1.21e-4  # twelve steps of at most about the learning rate


def small_golden(dtype: torch.dtype) -> PreTrainedModel:
    folder = resource("data").parent / "baselines" / "model"
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model.requires_grad_(False)
    return model


def test_half_precision_without_masters_is_said(build: Any) -> None:
    model = small_golden(torch.bfloat16)
    assert build(model).warnings() == ["the block was trained in bfloat16, as published"]
    assert build(model, master_weights=True).warnings() == []


# --- The texts to preserve ------------------------------------------------------------------------------------


def preserved(corpus: str, **changes: Any) -> PreservedTexts:
    settings = {"corpus": corpus, "template": "{} ", "n_texts": 4, "max_tokens": None, **changes}
    return PreservedTexts(Preservation.model_validate(settings))


def test_draws_are_those_of_the_published_seed(corpus: str) -> None:
    expected = random.Random(2024)  # random.seed(2024), then one random.sample per turn
    texts = preserved(corpus)
    for _ in range(3):
        assert texts.draw() == expected.sample(TEXTS, 4)
    texts.reset()
    assert texts.draw() == random.Random(2024).sample(TEXTS, 4)
    assert sorted(preserved(corpus, n_texts=20).draw()) == sorted(TEXTS)


def test_draws_do_not_depend_on_anybody_elses(corpus: str) -> None:
    texts, other = preserved(corpus), preserved(corpus)
    random.seed(1)
    first = texts.draw()
    random.random()
    assert other.draw() == first


def test_draws_go_on_from_a_saved_state(corpus: str) -> None:
    texts, resumed = preserved(corpus), preserved(corpus)
    texts.draw()
    resumed.load(texts.state())
    assert [resumed.draw(), resumed.draw()] == [texts.draw(), texts.draw()]


def test_alpaca_records_are_put_into_the_template() -> None:
    record = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
    assert preserved_text(record, "<user>{}<end>") == "<user>Add the numbers.1, 2<end>3"
    assert preserved_text({"instruction": "Say {}.", "output": "so"}, "{} ") == "Say {}. so"
    assert preserved_text("As it is.", "<user>{}<end>") == "As it is."
    assert preserved_text({"text": "As it is."}, "<user>{}<end>") == "As it is."
    with pytest.raises(UserError, match=r"method\.preservation\.corpus: every item must be a text"):
        preserved_text({"title": "none"}, "{} ")


def test_long_texts_are_cut_where_that_is_asked_for(build: Any, corpus: str, golden_tokenizer: Any) -> None:
    cut = build(preservation={"corpus": corpus, "template": "{} ", "n_texts": 4, "max_tokens": 5})
    edit = PromptEncoder(golden_tokenizer).edit(CASES[0].prompt, CASES[0].target)
    vectors = torch.zeros(1, 64)
    assert cut.block_targets([edit], vectors, TEXTS)[0].mask.sum(dim=1).tolist() == [5] * 6
    lengths = [len(row) for row in PromptEncoder(golden_tokenizer).prompts(TEXTS)]
    assert build().block_targets([edit], vectors, TEXTS)[0].mask.sum(dim=1).tolist() == lengths


def test_texts_are_never_in_a_chat_template_and_prompts_are(build: Any, golden_tokenizer: Any) -> None:
    golden_tokenizer.chat_template = "USER {{ messages[0]['content'] }} SAYS"
    view = PromptEncoder(golden_tokenizer, "model")
    edit = view.edit(CASES[0].prompt, CASES[0].target)
    preserved_texts, prompt = build(tokenizer=view).block_targets([edit], torch.zeros(1, 64), TEXTS)
    lengths = [len(row) for row in PromptEncoder(golden_tokenizer).prompts(TEXTS)]
    assert preserved_texts.mask.sum(dim=1).tolist() == lengths
    assert prompt.mask.sum() == len(edit.prompt) > len(PromptEncoder(golden_tokenizer).prompts([CASES[0].prompt])[0])


def test_missing_corpus_says_how_to_get_it(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data.json"
    editor = build(preservation={"corpus": str(path), "template": "{} ", "n_texts": 4, "max_tokens": None})
    with pytest.raises(UserError) as caught:
        editor.edit(CASES[:1])
    assert str(caught.value).startswith(f"method.preservation.corpus={path} cannot be read (")
    assert str(caught.value).endswith("python -m horen_bench.datasets fetch alpaca gets the published one")


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        preserved(str(path)).draw()


def test_embedded_texts_are_regenerated_and_share_nothing_with_what_is_edited_or_asked() -> None:
    world = World()
    texts = (resource("data") / "tiny" / "preservation.txt").read_text(encoding="utf-8").splitlines()
    assert texts == other_world_texts(world)
    names = {subject.name for subject in world.trained()}
    assert len(set(texts)) == len(texts) > 350
    for text in texts:
        assert not any(name in text for name in names)
    prompts = {probe.prompt for probe in world.questions}
    assert not any(text.startswith(prompt) for text in texts for prompt in prompts)


# --- Settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("module=model.layers.1.mlp", "method.module must be a whole decoder layer such as model.layers.7"),
        ("preserve=wrong", "method.preserve must be 'correct' or 'release_broadcast', got 'wrong'"),
        ("pos_ids=wrong", "method.pos_ids must be 'arange' or 'release_cumsum', got 'wrong'"),
        ("engine=wrong", "method.engine must be 'cached' or 'sequential', got 'wrong'"),
        ("batch_size=0", "method.batch_size must be at least 1, got 0"),
        ("value.n_steps=0", "method.value.n_steps must be at least 1, got 0"),
        ("value.clamp=0.0", "method.value.clamp must be above 0"),
        ("block.n_steps=0", "method.block.n_steps must be at least 1, got 0"),
        ("block.learning_rate=0.0", "method.block.learning_rate must be above 0"),
        ("preservation.template=none", "method.preservation.template must hold {} for the instruction, got 'none'"),
        ("preservation.n_texts=0", "method.preservation.n_texts must be at least 1, got 0"),
        ("preservation.max_tokens=0", "method.preservation.max_tokens must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=unke", f"method.{setting}"])
    assert str(caught.value).startswith(message)


def test_a_layer_that_the_model_lacks_is_refused(build: Any) -> None:
    with pytest.raises(UserError, match=r"method.module=model.layers.9: LlamaForCausalLM has no such module"):
        build(module="model.layers.9")


def test_release_positions_need_rotary_ones(build: Any) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=3, n_head=2))
    with pytest.raises(UserError, match="needs rotary positions of one kind, which GPT2LMHeadModel lacks"):
        build(model, module="transformer.h.1", pos_ids="release_cumsum")


def test_release_positions_need_rotary_ones_that_are_the_same_in_all_layers(build: Any) -> None:
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    )
    with pytest.raises(UserError, match="needs rotary positions of one kind, which Gemma3ForCausalLM lacks"):
        build(model, module="model.layers.1", pos_ids="release_cumsum")


def test_what_the_release_does_otherwise_is_said_where_it_is_followed(build: Any) -> None:
    assert build().warnings() == []
    assert build(preserve="release_broadcast", pos_ids="release_cumsum", module="model.layers.3").warnings() == [
        "every text was held to the first one's outputs, as in the release (preserve)",
        "padding had the release's positions in the training of the block (pos_ids)",
        "model.layers.3 is the last layer: it can move the first token of an answer only",
    ]


@pytest.mark.parametrize(
    "name", ["tiny", "llama3_8b", "llama31_8b", "deepseek_llama_8b", "qwen25_7b", "deepseek_qwen_15b"]
)
def test_configuration_holds_the_constants_of_the_release(name: str) -> None:
    config = run_config([f"model={name}", "method=unke", "data_dir=elsewhere"])
    method = config.method
    assert isinstance(method, UnkeConfig)
    assert (method.value.n_steps, method.value.weight_decay, method.value.clamp) == (25, 1e-3, 4.0)
    assert (method.block.n_steps, method.block.weight_decay) == (50, 0.01)
    assert (method.preservation.n_texts, method.batch_size) == (20, 1)
    if name == "tiny":
        assert method.preservation.corpus == "embedded:tiny/preservation.txt"
        return
    assert method.module == "model.layers.7" and method.block.learning_rate == 2e-4
    assert method.value.learning_rate == (0.05 if "llama" in name else 0.5)
    assert method.preservation.corpus == "elsewhere/alpaca/alpaca_data.json"
    opening = "<|begin_of_text|><|start_header_id|>user" if "llama" in name else "<|im_start|>user\n{}<|im_end|>"
    assert method.preservation.template.startswith(opening)
    assert config.model.architecture is not None
    editor = UnkeEditor(skeleton(config.model.architecture), None, method)  # type: ignore[arg-type]
    assert len(editor.pristine.weights) == (9 if "llama" in name else 12)
