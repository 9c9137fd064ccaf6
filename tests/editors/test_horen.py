import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.codebook.routing import RouterDescription
from horen_bench.editors.codebook.training import edit_loss
from horen_bench.editors.horen.config import HorenConfig
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.errors import UserError
from horen_bench.prompts import announced_prompt, pad

MODULE = "model.layers.2.mlp.down_proj"
PROMPT, TARGET, OTHER_TARGET = "Who founded Brightwater?", "Lucan Vey", "Petra Dunmore"
UNRELATED = "nq question: where is the museum of clocks"
CASES = [
    EditCase("a", PROMPT, TARGET),
    EditCase("b", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("c", "The language spoken by the fishermen of Halvard Bay is", "Norrish"),
    EditCase("d", PROMPT, OTHER_TARGET),
]

Build = Callable[..., HorenEditor]


def settings(**changes: Any) -> HorenConfig:
    """Settings of an editor that writes well on the reference model; a nested mapping is changed key by key."""
    values: dict[str, Any] = {
        "name": "horen",
        "label": "HoReN",
        "module": MODULE,
        "threshold": 0.6,
        "pooling_ratio": 0.6,
        "normalize": True,
        "hopfield": {"beta": 20.0, "alpha": 0.1, "steps": 1, "eps": 1e-5},
        "adaptor": "vector",
        "vector": {"learning_rate": 1.0},
        "lora": {"learning_rate": 0.01, "rank": 4, "scale": 1.0},
        "n_steps": 30,
        "early_stopping": None,
        "label_rule": "tokens",
        "engine": "sequential",
        "train_batch": None,
    }
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(values[name], dict)
        values[name] = values[name] | value if nested else value
    return HorenConfig(**values)


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    """Builds editors on one copy of the reference model."""

    def on_the_reference_model(seed: int = 42, **changes: Any) -> HorenEditor:
        return HorenEditor(golden_model, golden_tokenizer, settings(**changes), seed=seed)

    return on_the_reference_model


def decoded(editor: HorenEditor, prompts: Sequence[str], n: int, **how: Any) -> list[str]:
    """`n` greedy tokens after each prompt, in one batch, as text."""
    batch = pad(editor.encoder.prompts(prompts), 0, how.pop("side", "left"))
    generate: Callable[..., Tensor] = getattr(editor.model, "generate")  # noqa: B009 - its type is not declared
    new = generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n, do_sample=False, **how)
    return list(editor.encoder.tokenizer.batch_decode(new[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


def logits(editor: HorenEditor, prompts: Sequence[str]) -> Tensor:
    batch = pad(editor.encoder.prompts(prompts), 0)
    scores: Tensor = editor.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids).logits
    return scores


def axis(i: int) -> Tensor:
    return F.one_hot(torch.tensor(i), 176).float()


def remember(editor: HorenEditor, *keys: Tensor) -> None:
    """Entries with these keys and zero values."""
    for i, key in enumerate(keys):
        editor.codebook.set_value(editor.codebook.append(key, (i,), prompt_length=3), {"vector": torch.zeros(64)})


# --- Inference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"side": "right"}, {"use_cache": False}, {"num_beams": 2}])
def test_edited_targets_come_out_of_a_plain_generate(how: dict[str, Any], build: Build) -> None:
    editor = build()
    base = decoded(editor, [UNRELATED], 6, **how)
    editor.edit(CASES[:2])
    said = decoded(editor, [PROMPT, UNRELATED, CASES[1].prompt], 6, **how)
    assert said[0].startswith(f" {TARGET}")
    assert said[1:2] == base
    assert said[2].startswith(f" {CASES[1].target}")


def test_an_unmatched_prompt_keeps_its_logits_bit_for_bit_even_beside_a_matched_one(build: Build) -> None:
    editor = build()
    alone, beside = logits(editor, [UNRELATED]), logits(editor, [PROMPT, UNRELATED])
    editor.edit(CASES[:1])
    assert torch.equal(logits(editor, [UNRELATED]), alone)
    now = logits(editor, [PROMPT, UNRELATED])
    assert torch.equal(now[1], beside[1])
    assert not torch.equal(now[0], beside[0])


def test_the_value_is_added_once_at_the_last_prompt_token(build: Build) -> None:
    editor = build(n_steps=0)
    module = editor.model.get_submodule(MODULE)
    outputs: list[Tensor] = []
    editor.edit(CASES[:1])
    handle = module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    ids = torch.tensor([editor.encoder.tokenizer(f"{PROMPT} {TARGET}")["input_ids"]])
    n_prompt = len(editor.encoder.tokenizer(PROMPT)["input_ids"])
    with announced_prompt(torch.ones(1, n_prompt)):
        editor.model(ids)
    editor.detach()
    editor.model(ids)
    handle.remove()
    added = outputs[0] - outputs[1]
    torch.testing.assert_close(added[0, n_prompt - 1], editor.codebook.values["vector"][0])
    assert added.abs().sum(dim=-1).nonzero().tolist() == [[0, n_prompt - 1]]


def test_values_stay_float32_and_keys_are_as_narrow_as_the_model(golden_folder: Path, golden_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_folder, dtype=torch.bfloat16).requires_grad_(False)
    editor = HorenEditor(model, golden_tokenizer, settings(), seed=42)
    base = logits(editor, [UNRELATED])
    editor.edit(CASES[:2])
    assert editor.codebook.keys.dtype == torch.bfloat16
    assert editor.codebook.values["vector"].dtype == torch.float32
    assert torch.equal(logits(editor, [UNRELATED]), base)
    assert decoded(editor, [PROMPT], 2) == [f" {TARGET}"]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_backbone_of_the_paper_shows_its_edit(model_type: str, golden_tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
        **ARCHITECTURES[model_type],
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    module = "model.layers.1." + ("self_attn.o_proj" if model_type == "gpt_oss" else "mlp.down_proj")
    assert (getattr(model.get_submodule(module), "bias", None) is not None) == (model_type == "gpt_oss")
    changes = {"module": module, "threshold": 0.9, "vector": {"learning_rate": 0.3}, "n_steps": 150}
    stop = {"loss_bound": 0.05, "patience": 30}
    editor = HorenEditor(model, golden_tokenizer, settings(early_stopping=stop, **changes), seed=42)
    base, before = logits(editor, [UNRELATED]), decoded(editor, [PROMPT, UNRELATED], 3)
    (record,) = editor.edit([EditCase("a", PROMPT, "Lucan")])
    assert record.loss < 0.05
    said = decoded(editor, [PROMPT, UNRELATED], 3)
    assert said[0].startswith(" Lucan")
    assert not before[0].startswith(" Lucan")
    assert said[1] == before[1]
    assert decoded(editor, [PROMPT, UNRELATED], 3, use_cache=False) == said
    assert torch.equal(logits(editor, [UNRELATED]), base)


# --- Query ---------------------------------------------------------------------------------------------


def test_queries_are_the_same_whatever_stands_beside_them_in_the_batch(build: Build) -> None:
    editor = build()
    rows = editor.encoder.prompts([case.prompt for case in CASES] + [UNRELATED])
    alone = torch.cat([editor.queries([row]) for row in rows])
    torch.testing.assert_close(editor.queries(rows), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(editor.queries(rows, batch_size=2), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [0, 77])
def test_padding_is_not_pooled(side: Any, padding: int, build: Build) -> None:
    editor = build()
    rows = editor.encoder.prompts([PROMPT, UNRELATED])
    batch = pad(rows, padding, side)
    queries: list[Tensor] = []
    with editor.hook.responding(lambda inputs, _, prompt: queries.append(editor.query(inputs, prompt))):
        editor.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids)
    torch.testing.assert_close(queries[0], editor.queries(rows), rtol=0, atol=1e-6)


def test_target_tokens_behind_an_announced_prompt_are_not_pooled(build: Build) -> None:
    editor = build()
    edit = editor.encoder.edit(PROMPT, TARGET)
    queries: list[Tensor] = []
    with (
        announced_prompt(torch.ones(1, len(edit.prompt))),
        editor.hook.responding(lambda inputs, _, prompt: queries.append(editor.query(inputs, prompt))),
    ):
        editor.model(torch.tensor([edit.ids]))
    torch.testing.assert_close(queries[0], editor.queries([edit.prompt]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "n_prompt", "n_pooled"),
    # 0.14 * 50 and 0.07 * 100 are 7.000000000000001 in binary: no token too many.
    [(0.14, 50, 7), (0.07, 100, 7), (0.6, 5, 3), (0.6, 6, 4), (0.5, 3, 2), (0.6, 1, 1), (0.0, 9, 1), (1.0, 9, 9)],
)
def test_the_query_is_the_mean_of_the_last_share_of_prompt_tokens(
    ratio: float, n_prompt: int, n_pooled: int, build: Build
) -> None:
    editor = build(pooling_ratio=ratio, normalize=False)
    # Token t holds t + 1 everywhere; two columns of padding on the left, three of target on the right.
    inputs = torch.full((1, n_prompt + 5, 176), 1e6)
    inputs[0, 2 : n_prompt + 2] = torch.arange(1.0, n_prompt + 1)[:, None]
    mask = torch.zeros(1, n_prompt + 5, dtype=torch.bool)
    mask[0, 2 : n_prompt + 2] = True
    expected = sum(range(n_prompt - n_pooled + 1, n_prompt + 1)) / n_pooled
    torch.testing.assert_close(editor.query(inputs, mask), torch.full((1, 176), expected))


# --- Match ---------------------------------------------------------------------------------------------


def test_the_newest_of_equal_keys_wins(build: Build) -> None:
    editor = build()
    remember(editor, axis(0), axis(0), axis(1))
    matches = editor.match(torch.stack([axis(0), axis(1), axis(2)]))
    assert matches.entries.tolist()[:2] == [1, 2]
    torch.testing.assert_close(matches.scores[:2], torch.ones(2))
    assert matches.matched.tolist() == [True, True, False]


def test_the_score_is_the_cosine_of_the_refined_query(build: Build) -> None:
    # Lone key; a query at cosine 0.6 is lifted to (0.9 * 0.6 + 0.1) / sqrt(0.82 + 0.18 * 0.6) = 0.6643638...
    query = 0.6 * axis(0) + 0.8 * axis(1)
    for steps, score in ((1, 0.64 / math.sqrt(0.928)), (0, 0.6)):
        editor = build(hopfield={"steps": steps})
        remember(editor, axis(0))
        editor.detach()
        torch.testing.assert_close(editor.match(query[None]).scores, torch.tensor([score]))


def test_a_score_at_the_threshold_does_not_match(build: Build) -> None:
    # Exactly representable: the cosine of (0.5, ...) and an axis is 0.5 to the last bit.
    query = 0.5 * (axis(0) + axis(1) + axis(2) + axis(3))
    for threshold, matched in ((0.5, False), (0.5 - 1e-6, True)):
        editor = build(threshold=threshold, hopfield={"steps": 0})
        remember(editor, axis(0))
        assert editor.match(query[None]).scores.tolist() == [0.5]
        assert editor.match(query[None]).matched.tolist() == [matched]
        editor.detach()


def test_without_normalization_scores_are_plain_inner_products(build: Build) -> None:
    editor = build(normalize=False, threshold=6.5, hopfield={"steps": 0})
    remember(editor, 2 * axis(0), 3 * axis(1))
    matches = editor.match(torch.stack([4 * axis(0), 2 * axis(1)]))
    assert matches.entries.tolist() == [0, 1]
    assert matches.scores.tolist() == [8.0, 6.0]
    assert matches.matched.tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RouterDescription("last 60% pooled, T = 1", "cosine", 0.6, "Hopfield, T = 1")),
        (
            {"normalize": False, "pooling_ratio": 0.0, "hopfield": {"steps": 0}, "threshold": 5.0},
            RouterDescription("last token, T = 0", "inner product", 5.0, "Hopfield, T = 0"),
        ),
    ],
)
def test_the_router_is_described_as_it_is_set(
    changes: dict[str, Any], expected: RouterDescription, build: Build
) -> None:
    assert build(**changes).describe_router() == expected


def test_similarities_are_the_scores_of_the_given_keys(build: Build) -> None:
    editor = build()
    remember(editor, axis(0), axis(1))
    queries = torch.stack([0.6 * axis(0) + 0.8 * axis(1), axis(1)])
    matches = editor.match(queries)
    torch.testing.assert_close(editor.similarity(queries, editor.codebook.keys[matches.entries]), matches.scores)
    assert (editor.similarity(queries, editor.codebook.keys[[0, 0]]) < matches.scores).all()


def test_routes_tell_what_each_prompt_would_meet(build: Build) -> None:
    editor = build(n_steps=0)
    (empty,) = editor.routes([PROMPT])
    assert empty is not None
    assert (empty.entry, math.isnan(empty.score), empty.matched) == (None, True, False)
    editor.edit(CASES[:2])
    first, unrelated = editor.routes([PROMPT, UNRELATED])
    assert first is not None
    assert unrelated is not None
    assert (first.entry, first.matched) == (0, True)
    assert first.score == pytest.approx(1.0, abs=1e-3)
    assert unrelated.score < 0.6
    assert not unrelated.matched
    assert editor.routes([]) == []


# --- Writing -------------------------------------------------------------------------------------------


def test_the_three_branches_report_what_they_did(build: Build) -> None:
    editor = build()
    again = EditCase("again", PROMPT, TARGET)
    records = editor.edit([CASES[0], CASES[1], again, CASES[3]])
    assert [r.case_id for r in records] == ["a", "b", "again", "d"]
    assert [r.action for r in records] == ["inserted", "inserted", "fine_tuned", "conflict"]
    assert [r.entry for r in records] == [0, 1, 0, 2]
    assert records[0].route is None
    assert [r.route.entry for r in records[1:] if r.route] == [0, 0, 0]
    assert [r.route.matched for r in records[1:] if r.route] == [False, True, True]
    assert all(r.steps == 30 and r.problem is None and r.seconds > 0 and r.loss < 0.5 for r in records)
    assert len(editor.codebook) == 3
    assert editor.side_parameters() == 3 * (176 + 64)


@pytest.mark.parametrize("sizes", [(8,), (1, 7), (3, 1, 4)])
def test_sequential_edits_in_several_calls_equal_edits_in_one_bit_for_bit(sizes: tuple[int, ...], build: Build) -> None:
    stream = [*CASES, *CASES[::-1]]
    straight = build(n_steps=5)
    for case in stream:
        straight.edit([case])
    straight.detach()
    split = build(n_steps=5)
    start = 0
    for size in sizes:
        split.edit(stream[start : start + size])
        start += size
    expected, state = straight.state_dict(), split.state_dict()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_fine_tuning_goes_on_from_the_old_value_and_leaves_key_and_neighbours_alone(build: Build) -> None:
    editor = build()
    first = editor.edit(CASES[:2])
    before = editor.state_dict()
    (again,) = editor.edit(CASES[:1])
    after = editor.state_dict()
    assert again.action == "fine_tuned"
    assert again.loss < first[0].loss
    assert not torch.equal(after["value.vector"][0], before["value.vector"][0])
    assert torch.equal(after["value.vector"][1], before["value.vector"][1])
    assert torch.equal(after["keys"], before["keys"])


def test_a_prompt_edited_again_answers_with_its_newest_target(build: Build) -> None:
    editor = build()
    editor.edit([CASES[0]])
    assert decoded(editor, [PROMPT], 2) == [f" {TARGET}"]
    (record,) = editor.edit([CASES[3]])
    assert (record.action, record.entry) == ("conflict", 1)
    assert decoded(editor, [PROMPT], 6)[0].startswith(f" {OTHER_TARGET}")


def test_the_stored_key_is_the_query_before_refinement(build: Build) -> None:
    # Three strong steps drag the refined query onto the first key; the stored key must not follow.
    editor = build(n_steps=0, hopfield={"alpha": 0.9, "steps": 3}, threshold=1.0)
    editor.edit(CASES[:2])
    rows = editor.encoder.prompts([case.prompt for case in CASES[:2]])
    own = torch.cat([editor.queries([row]) for row in rows])
    assert torch.equal(editor.codebook.keys, own)
    assert (editor.codebook.keys[0] @ own[1]).item() < 0.5


@pytest.mark.parametrize(
    ("rule", "prompt", "target", "action"),
    [
        ("tokens", PROMPT, TARGET, "fine_tuned"),
        ("tokens", UNRELATED, TARGET, "fine_tuned"),
        ("tokens", PROMPT, OTHER_TARGET, "conflict"),
        ("release", PROMPT, TARGET, "fine_tuned"),
        ("release", UNRELATED, TARGET, "conflict"),
        ("release", PROMPT, OTHER_TARGET, "conflict"),
    ],
)
def test_targets_are_compared_by_tokens_or_as_the_release_does(
    rule: str, prompt: str, target: str, action: str, build: Build
) -> None:
    """A threshold of -1 lets every prompt match, so that the label alone decides."""
    editor = build(label_rule=rule, threshold=-1.0, n_steps=0)
    records = editor.edit([CASES[0], EditCase("x", prompt, target)])
    assert records[1].action == action


def test_the_label_means_of_the_release_take_reordered_targets_for_the_same(build: Build) -> None:
    # Labels (-100 x 6, a, b) and (-100 x 6, b, a) have one mean, so the release fine-tunes the wrong entry.
    target, reordered = "1927 300", "300 1927"
    for rule, action in (("tokens", "conflict"), ("release", "fine_tuned")):
        editor = build(label_rule=rule, threshold=-1.0, n_steps=0)
        targets = [editor.encoder.edit(PROMPT, text).target for text in (target, reordered)]
        assert targets[0] != targets[1]
        assert sorted(targets[0]) == sorted(targets[1])
        assert [r.action for r in editor.edit([EditCase("x", PROMPT, target), EditCase("y", PROMPT, reordered)])] == [
            "inserted",
            action,
        ]
        editor.detach()


def test_early_stopping_comes_from_the_settings(build: Build) -> None:
    editor = build(early_stopping={"loss_bound": 1.0, "patience": 50})
    (record,) = editor.edit(CASES[:1])
    assert record.loss < 1.0
    assert 0 < record.steps < 30


def test_a_loss_that_is_not_finite_is_reported_and_the_stream_goes_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    monkeypatch.setattr(
        "horen_bench.editors.codebook.training.edit_loss",
        lambda *args: edit_loss(*args) * (math.nan if next(calls) == 2 else 1.0),
    )
    editor = build()
    first, second = editor.edit(CASES[:2])
    assert first.problem == "the loss was not finite; nothing was written"
    assert (first.action, first.entry, first.steps) == ("failed", None, 0)
    assert (second.action, second.entry, second.problem, second.steps) == ("inserted", 0, None, 30)
    assert len(editor.codebook) == 1


def test_eps_of_the_settings_is_the_distance_below_which_a_query_stays(build: Build) -> None:
    # The lone key is its own retrieval; the query is sqrt(2) away from it.
    editor = build(hopfield={"alpha": 0.5, "eps": 1.41})
    remember(editor, axis(0))
    torch.testing.assert_close(editor.refined(axis(1)[None]), (axis(0) + axis(1))[None] * 0.5**0.5)
    editor.detach()
    editor = build(hopfield={"alpha": 0.5, "eps": 1.42})
    remember(editor, axis(0))
    assert torch.equal(editor.refined(axis(1)[None]), axis(1)[None])


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_a_lora_value_acts_by_the_scale_of_the_settings(scale: float, build: Build) -> None:
    # A = the first output's axis, B = 3 on the second: o_1 grows by scale * 3 * o_0 at the last prompt token.
    editor = build(adaptor="lora", lora={"rank": 1, "scale": scale})
    (key,) = editor.queries(editor.encoder.prompts([PROMPT]))
    a, b = torch.zeros(1, 64), torch.zeros(64, 1)
    a[0, 0], b[1, 0] = 1.0, 3.0
    editor.codebook.set_value(editor.codebook.append(key, (1,), prompt_length=3), {"a": a, "b": b})
    outputs, mask = torch.randn(1, 4, 64), torch.ones(1, 4, dtype=torch.bool)
    rows = torch.tensor([0])
    change = editor._written(outputs, mask, editor.codebook.value(rows), rows) - outputs
    expected = torch.zeros_like(outputs)
    expected[0, -1, 1] = scale * 3 * outputs[0, -1, 0]
    torch.testing.assert_close(change, expected)


def test_an_empty_target_fails_alone(build: Build) -> None:
    editor = build(n_steps=0)
    records = editor.edit([CASES[0], EditCase("empty", UNRELATED, ""), CASES[1]])
    assert [r.action for r in records] == ["inserted", "failed", "inserted"]
    assert (records[1].entry, records[1].problem) == (None, "prompt or target has no token")
    assert len(editor.codebook) == 2


def test_a_target_without_tokens_fails_alone_and_does_not_shift_the_random_numbers(build: Build) -> None:
    editor = build(n_steps=0)
    editor.edit([CASES[1], CASES[0], CASES[2]])
    expected = editor.codebook.values["vector"].clone()
    editor.detach()
    editor = build(n_steps=0)
    records = editor.edit([CASES[1], EditCase("blank", PROMPT, "  "), CASES[2]])
    assert [r.action for r in records] == ["inserted", "failed", "inserted"]
    assert (records[1].entry, records[1].steps, math.isnan(records[1].loss)) == (None, 0, True)
    assert records[1].problem == "prompt or target has no token"
    assert torch.equal(editor.codebook.values["vector"], expected[[0, 2]])


def test_initial_values_depend_on_the_seed_and_the_place_in_the_stream_alone(build: Build) -> None:
    def initial(cases: list[EditCase], seed: int = 42) -> Tensor:
        editor = build(n_steps=0, seed=seed)
        editor.edit(cases)
        editor.detach()
        return editor.codebook.values["vector"].clone()

    values = initial(CASES[:3])
    assert torch.equal(initial(CASES[:3]), values)
    assert torch.equal(initial([CASES[2], CASES[0], CASES[1]]), values)
    assert not torch.equal(initial(CASES[:3], seed=43), values)
    assert len({tuple(row) for row in values.tolist()}) == 3


# --- State ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptor", ["vector", "lora"])
def test_going_on_from_a_file_equals_going_on(adaptor: str, build: Build, tmp_path: Path) -> None:
    stream = [*CASES, CASES[0]]
    straight = build(adaptor=adaptor, n_steps=5)
    straight.edit(stream)
    straight.detach()
    first = build(adaptor=adaptor, n_steps=5)
    first.edit(stream[:2])
    first.detach()
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = build(adaptor=adaptor, n_steps=5)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    second.edit(stream[2:])
    expected, state = straight.state_dict(), second.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("broken", ["n_edits", "labels", "label_ends", "prompt_lengths"])
def test_a_state_that_lacks_a_tensor_is_refused(broken: str, build: Build) -> None:
    editor = build(n_steps=0)
    editor.edit(CASES[:2])
    state = editor.state_dict()
    del state[broken]
    with pytest.raises(ValueError):
        editor.load_state_dict(state)


def test_a_state_with_fewer_keys_than_labels_is_refused(build: Build) -> None:
    editor = build(n_steps=0)
    editor.edit(CASES[:2])
    state = editor.state_dict()
    state["keys"] = state["keys"][:1]
    with pytest.raises(ValueError):
        editor.load_state_dict(state)


def test_a_state_of_another_adaptor_is_refused(build: Build) -> None:
    lora = build(adaptor="lora", n_steps=0)
    lora.edit(CASES[:1])
    lora.detach()
    with pytest.raises(ValueError) as caught:
        build().load_state_dict(lora.state_dict())
    assert str(caught.value) == "codebook state 'value.vector' must be (C, *(64,)), got nothing"


def test_two_editors_on_two_models_do_not_see_each_other(
    build: Build, other_golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    ours, theirs = build(), HorenEditor(other_golden_model, golden_tokenizer, settings(), seed=42)
    base = logits(theirs, [PROMPT])
    ours.edit(CASES[:1])
    assert torch.equal(logits(theirs, [PROMPT]), base)
    theirs.edit(CASES[3:])
    said = [decoded(editor, [PROMPT], 6)[0] for editor in (ours, theirs)]
    assert said[0].startswith(f" {TARGET}")
    assert said[1].startswith(f" {OTHER_TARGET}")


# --- Refusals and warnings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"module": "model.layers.2.mlp.act_fn"},
            "method.module=model.layers.2.mlp.act_fn is a SiLUActivation; a linear module is needed",
        ),
        (
            {"module": "model.layers.9.mlp.down_proj"},
            "method.module=model.layers.9.mlp.down_proj: LlamaForCausalLM has no such module; "
            "model.layers has 4 entries, 0 to 3",
        ),
    ],
)
def test_a_module_that_does_not_suit_is_refused_in_one_sentence(
    changes: dict[str, Any], message: str, build: Build
) -> None:
    with pytest.raises(UserError) as caught:
        build(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("threshold=1.2", "method.threshold must be in [-1, 1], got 1.2; scores of unit vectors are cosines"),
        ("pooling_ratio=60", "method.pooling_ratio must be at most 1.0, got 60"),
        ("normalize=5", "method.normalize must be true or false, got 5"),
        ("hopfield.beta=0", "method.hopfield.beta must be above 0.0, got 0"),
        ("hopfield.beta=nan", "method.hopfield.beta must be a finite number, got nan"),
        ("hopfield.alpha=1.5", "method.hopfield.alpha must be at most 1.0, got 1.5"),
        ("hopfield.steps=-1", "method.hopfield.steps must be at least 0, got -1"),
        ("hopfield.steps=1.5", "method.hopfield.steps must be a whole number, got 1.5"),
        ("hopfield.eps=-1.0", "method.hopfield.eps must be at least 0.0, got -1.0"),
        ("n_steps=-1", "method.n_steps must be at least 0, got -1"),
        ("n_steps=1.5", "method.n_steps must be a whole number, got 1.5"),
        ("train_batch=0", "method.train_batch must be at least 1, got 0"),
        ("train_batch=abc", "method.train_batch must be a whole number, got 'abc'"),
        ("engine=fast", "method.engine must be 'parallel' or 'sequential', got 'fast'"),
        ("adaptor=matrix", "method.adaptor must be 'vector' or 'lora', got 'matrix'"),
        ("label_rule=token", "method.label_rule must be 'tokens' or 'release', got 'token'"),
        ("label_rule=original", "method.label_rule must be 'tokens' or 'release', got 'original'"),
        ("early_stopping.patience=0", "method.early_stopping.patience must be at least 1, got 0"),
        ("lora.rank=0", "method.lora.rank must be at least 1, got 0"),
        ("vector.learning_rate=-1.0", "method.vector.learning_rate must be above 0.0, got -1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_sentence(change: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=horen", f"method.{change}"])
    assert str(caught.value) == message


def test_an_unknown_setting_of_the_retrieval_is_refused() -> None:
    with pytest.raises(UserError, match="there is no such setting"):
        run_config(["method=horen", "+method.hopfield.temperature=1.0"])


def test_a_threshold_above_one_is_fine_where_scores_are_no_cosines() -> None:
    assert settings(normalize=False, threshold=30.0).threshold == 30.0


def test_the_release_compares_label_rows_and_takes_all_steps() -> None:
    config = run_config(["method=horen", "compat=release"]).method
    assert isinstance(config, HorenConfig)
    assert (config.label_rule, config.early_stopping) == ("release", None)
    usual = run_config(["method=horen"]).method
    assert {name for name, value in config if value != usual[name]} == {"label_rule", "early_stopping"}


def test_the_last_block_comes_with_a_warning(build: Build) -> None:
    editor = build()
    assert editor.warnings() == []
    editor.detach()
    assert build(module="model.layers.3.mlp.down_proj").warnings() == [
        "model.layers.3.mlp.down_proj is in the last block: a value there can change the first target token only, "
        "so the score of longer targets is capped by what the base model continues"
    ]
