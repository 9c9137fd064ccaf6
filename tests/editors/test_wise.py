"""WISE: its parts on numbers worked out by hand, and the fast path beside the plain one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from horen_bench.cases import EditCase, Probe
from horen_bench.config.compose import run_config
from horen_bench.editors.wise.config import WiseConfig
from horen_bench.editors.wise.editor import WiseEditor
from horen_bench.editors.wise.irrelevant import BUILT_IN, DisjointPrompts
from horen_bench.editors.wise.masks import GradientMasks
from horen_bench.editors.wise.merging import ties, trimmed
from horen_bench.editors.wise.routing import Memory, Routed, route, scores
from horen_bench.editors.wise.rows import TrainingRows, filled, generated_templates, training_rows
from horen_bench.editors.wise.training import (
    Labels,
    SideEdit,
    SideTrained,
    edit_loss,
    margin_loss,
    train_sides,
)
from horen_bench.errors import UserError
from horen_bench.prompts import PromptEncoder, pad

DOWN_PROJ = "model.layers.2.mlp.down_proj"
CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm"),
]
Build = Callable[..., WiseEditor]


@pytest.fixture
def build(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase, wise_config: Callable[..., WiseConfig]
) -> Build:
    return lambda **changes: WiseEditor(golden_model, golden_tokenizer, wise_config(**changes), seed=42)


def side_weight(editor: WiseEditor) -> Tensor:
    assert editor.weights.live is not None
    return editor.weights.live.weight


# --- Rows ----------------------------------------------------------------------------------------------


def rows_of(tokenizer: PreTrainedTokenizerBase, irrelevant: str) -> TrainingRows:
    return training_rows(
        PromptEncoder(tokenizer),
        ["{}", "I walked a {}"],
        prompt="Who founded Brightwater?",
        target="Lucan Vey",
        irrelevant=irrelevant,
        device=torch.device("cpu"),
    )


def test_labels_are_the_target_of_each_context(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(golden_tokenizer, "why")
    target = golden_tokenizer(" Lucan Vey", add_special_tokens=False)["input_ids"]
    assert rows.label_ids.tolist() == target * 2
    assert rows.n_labels.tolist() == [len(target)] * 2
    assert rows.owners.tolist() == [0] * len(target) + [1] * len(target)
    assert rows.predicting[:, -1].tolist() == [False, False]
    assert rows.attention_mask[:, -1].tolist() == [1, 1, 1]


def test_longest_irrelevant_prompt_makes_prompt_tokens_labels(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = (rows_of(golden_tokenizer, "why " * n) for n in (1, 30))
    excess = long.labels.shape[1] - short.labels.shape[1]
    longest = int(short.attention_mask.sum(dim=1)[1])
    assert excess > 0
    assert long.n_labels[1] == min(longest, int(short.n_labels[1]) + excess)


def test_braces_of_a_context_are_text() -> None:
    assert filled("set {x} {} is {}", "a {b}") == "set {x} {} is a {b}"


def test_contexts_are_written_by_the_model_alone(build: Build, golden_tokenizer: PreTrainedTokenizerBase) -> None:
    editor = build(templates=None)
    before = generated_templates(editor.model, PromptEncoder(golden_tokenizer))
    assert before[0] == "{}"
    assert len(before) == 11
    assert all(template.endswith(" {}") for template in before[1:])
    editor.edit(CASES[:1])
    editor._templates = None
    assert editor._contexts() == before


# --- Losses --------------------------------------------------------------------------------------------


def test_margin_loss_averages_violators_only() -> None:
    loss = margin_loss(torch.tensor([4.0, 12.0]), torch.tensor(3.0), [5.0, 20.0, 10.0])
    assert loss.item() == 17  # (3 - 4 + 10 and 3 - 12 + 10) / 2 = 5; 3 < 5; (16 + 8) / 2 = 12
    two = margin_loss(torch.tensor([[4.0, 12.0], [40.0, 40.0]]), torch.tensor([3.0, 6.0]), [5.0, 20.0, 10.0])
    assert two.tolist() == [17, 1]  # of the second only 6 - 5 is above 0


def test_edit_loss_divides_by_one_more_than_the_labels(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(golden_tokenizer, "why")
    n = int(rows.n_labels[0])
    loss = edit_loss(torch.zeros(2 * n, 600), Labels.of([rows]))
    assert loss.item() == pytest.approx(math.log(600) * n / (n + 1))


def test_first_step_of_a_shard_has_a_gradient_that_is_a_number(build: Build) -> None:
    editor = build(n_steps=1)
    (record,) = editor.edit(CASES[:1])
    assert record.problem is None
    assert side_weight(editor).isfinite().all()
    assert not torch.equal(side_weight(editor), editor._linear.weight)


def test_masked_elements_move_by_weight_decay_alone(build: Build) -> None:
    editor = build(n_steps=1, mask_ratio=0.2, norm_constraint=None)
    editor.edit(CASES[:1])
    base, mask = editor._linear.weight, editor._masks.of(0).bool()
    decayed = base - 0.3 * (1e-5 * base)
    torch.testing.assert_close(side_weight(editor)[~mask], decayed[~mask], rtol=1e-6, atol=0)
    assert (side_weight(editor)[mask] != decayed[mask]).float().mean() > 0.9


def test_no_element_leaves_the_norm_constraint(build: Build) -> None:
    editor = build(norm_constraint=0.01)
    editor.edit(CASES[:1])
    assert (side_weight(editor) - editor._linear.weight).abs().max() <= 0.01 + 1e-7


# --- Masks and merging ---------------------------------------------------------------------------------


def test_mask_of_a_shard_does_not_depend_on_which_came_before() -> None:
    like = torch.zeros(30, 20)
    straight = GradientMasks(1, 0.2, like)
    first, second, third = (straight.of(shard).clone() for shard in range(3))
    assert torch.equal(GradientMasks(1, 0.2, like).of(2), third)
    assert torch.equal(straight.of(1), second)
    assert not torch.equal(first, second)
    assert 0.1 < first.mean() < 0.3


def test_merging_keeps_lone_changes_averages_agreement_and_takes_the_larger_side() -> None:
    base = torch.ones(4)
    first, second = base + torch.tensor([0.2, -0.1, 0.0, 0.3]), base + torch.tensor([0.4, 0.3, 0.0, 0.0])
    expected = base + torch.tensor([0.3, 0.3, 0.0, 0.3])
    torch.testing.assert_close(ties([first, second], base, [0.5, 0.5], 1.0), expected)


def test_trimming_keeps_the_largest_floor_of_the_share() -> None:
    assert trimmed(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.6).tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_shards_are_stored_and_merged_when_their_turn_comes(build: Build) -> None:
    editor = build(n_steps=1, save_freq=1, merge_freq=2)
    counts = []
    for i in range(5):
        editor.edit([EditCase(str(i), CASES[i % 3].prompt, CASES[i % 3].target)])
        counts.append((len(editor.weights.stored), editor.weights.live is None))
    assert counts == [(1, True), (1, True), (2, True), (2, True), (3, True)]
    assert editor.side_parameters() == 3 * (64 * 176 + 1)


# --- Routing -------------------------------------------------------------------------------------------


def identity(tensor: Tensor) -> Tensor:
    return tensor


def decided(live: float | None, memories: list[tuple[float, float]], act_ratio: float = 1.0) -> int:
    """Choice for an input of 1 with main output 0; weights are the scores, thresholds as given."""
    ones = torch.ones(1, 1, 1)
    routed = route(
        ones,
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        live=None if live is None else Memory(torch.tensor([[live]]), 2.0),
        memories=[Memory(torch.tensor([[score]]), threshold) for score, threshold in memories],
        act_ratio=act_ratio,
        activation=identity,
        bias=None,
    )
    return int(routed.choices)


@pytest.mark.parametrize(
    ("live", "memories", "choice"),
    [
        (None, [], -1),
        (1.0, [], -1),
        (2.0, [], 0),  # below is strict
        (3.0, [(4.0, 1.0)], 1),
        (3.0, [(2.5, 1.0)], 0),
        (1.5, [(1.2, 1.0)], -1),  # a rejected live weight still has to be beaten
        (None, [(1.0, 1.0)], -1),  # above is strict
        (None, [(3.0, 1.0), (2.0, 1.0)], 1),
        (None, [(3.0, 1.0), (4.0, 5.0)], 1),
        (None, [(3.0, 1.0), (4.0, 2.0)], 2),
    ],
)
def test_strongest_memory_above_its_threshold_acts(
    live: float | None, memories: list[tuple[float, float]], choice: int
) -> None:
    assert decided(live, memories) == choice


@pytest.mark.parametrize(
    ("live", "memories", "act_ratio", "choice"),
    [
        (1.0, [], 0.5, 0),  # 2 * 0.5 is reached
        (0.9, [], 0.5, -1),
        (2.5, [], 1.5, -1),  # 2 * 1.5 is not
        (3.0, [], 1.5, 0),
        (None, [(0.6, 1.0)], 0.5, 1),
        (None, [(1.4, 1.0)], 1.5, -1),
    ],
)
def test_thresholds_are_the_ratio_times_the_smallest_activation(
    live: float | None, memories: list[tuple[float, float]], act_ratio: float, choice: int
) -> None:
    assert decided(live, memories, act_ratio) == choice


@pytest.mark.parametrize(("n_tokens", "score"), [(100, 0.5), (101, 50.0)])
def test_the_largest_distance_counts_from_one_more_than_a_hundred_tokens(n_tokens: int, score: float) -> None:
    side = torch.zeros(1, n_tokens, 1)
    side[0, 3] = 50.0
    mask = torch.ones(1, n_tokens, dtype=torch.bool)
    assert scores(side, torch.zeros_like(side), mask, identity).tolist() == pytest.approx([score])


def test_score_is_the_mean_over_real_tokens_and_past_a_hundred_the_largest() -> None:
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0, :20] = False
    side = torch.zeros(2, 120, 1)
    side[:, :20] = 7
    side[:, -1] = 5
    of_rows = scores(side, torch.zeros(2, 120, 1), mask, identity)
    assert of_rows.tolist() == pytest.approx([5 / 100, 7.0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_routed_as_if_alone(build: Build, golden_tokenizer: Any, side: Any) -> None:
    editor = build(n_steps=30)
    editor.edit(CASES)
    prompts = [*(case.prompt for case in CASES), BUILT_IN[0], "Brightwater"]
    decisions: list[Routed] = []

    def respond(inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor:
        decisions.append(editor.routed(inputs, outputs, mask))
        return decisions[-1].outputs

    rows = PromptEncoder(golden_tokenizer).prompts(prompts)
    with editor.hook.responding(respond):
        batch = pad(rows, 0, side)
        editor.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids)
        for row in rows:
            editor.model(torch.tensor([row]))
    together, alone = decisions[0], decisions[1:]
    torch.testing.assert_close(
        together.scores, torch.cat([decision.scores for decision in alone]), rtol=1e-4, atol=1e-5
    )
    assert together.choices.tolist() == [int(decision.choices) for decision in alone]
    assert len(set(together.choices.tolist())) > 2


# --- The fast path -------------------------------------------------------------------------------------


def small(architecture: str, **more: Any) -> PreTrainedModel:
    """A random model of another architecture, its module with a bias where it has one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=600,
        **more,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.requires_grad_(False).eval()
    return model


GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", DOWN_PROJ, {}),
    "last-layer": ("llama", "model.layers.3.mlp.down_proj", {}),
    "llama-o_proj": ("llama", "model.layers.2.self_attn.o_proj", {"attention_bias": True}),
    "qwen2": ("qwen2", DOWN_PROJ, {}),
    "qwen3": ("qwen3", DOWN_PROJ, {"head_dim": 8}),
    "gpt-oss": ("gpt_oss", "model.layers.2.self_attn.o_proj", GPT_OSS),
    "granite": ("granite", DOWN_PROJ, {"logits_scaling": 8.0, "residual_multiplier": 0.3}),
    "cohere": ("cohere", DOWN_PROJ, {"logit_scale": 0.0625}),
    "olmo2": ("olmo2", DOWN_PROJ, {}),
    "gptj": ("gptj", "transformer.h.2.mlp.fc_out", {"rotary_dim": 4}),
    "positions-learned": ("gpt_bigcode", "transformer.h.2.mlp.c_proj", {}),
}


@pytest.mark.parametrize("add_bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_cached_engine_gives_what_the_sequential_one_gives(
    name: str,
    add_bias: bool,
    golden_tokenizer: PreTrainedTokenizerBase,
    wise_config: Callable[..., WiseConfig],
) -> None:
    architecture, module, more = MODELS[name]
    moved: list[Tensor] = []
    for engine in ("cached", "sequential"):
        model = small(architecture, **more)
        changes = {"module": module, "add_bias": add_bias, "engine": engine, "n_steps": 6}
        editor = WiseEditor(model, golden_tokenizer, wise_config(**changes), seed=42)
        editor.edit(CASES[:1])
        assert not any("whole model" in sentence for sentence in editor.warnings())
        moved.append(side_weight(editor) - editor._linear.weight)
    assert moved[1].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-3 * float(moved[1].abs().max()))


def test_where_padding_sees_how_much_of_it_there_is_columns_of_it_are_not_left_out(
    golden_tokenizer: PreTrainedTokenizerBase, wise_config: Callable[..., WiseConfig]
) -> None:
    """Attention that is not torch's own gives a row without a key their mean, and labels may be predicted from it."""
    model = small("gemma2", head_dim=8, hidden_act="gelu")
    editor = WiseEditor(model, golden_tokenizer, wise_config(engine="cached", n_steps=1), seed=42)
    editor.edit(CASES[:1])
    assert any("Gemma2Model padding sees" in sentence for sentence in editor.warnings())


def test_engines_give_the_same_stream(build: Build) -> None:
    states = []
    for engine in ("cached", "sequential"):
        editor = build(engine=engine)
        records = editor.edit(CASES)
        states.append((editor.state_dict(), [record.steps for record in records]))
        editor.detach()
    (cached, steps), (plain, plain_steps) = states
    assert steps == plain_steps
    for key, tensor in plain.items():
        torch.testing.assert_close(cached[key], tensor, rtol=1e-4, atol=1e-4, msg=key)


# --- Shards side by side -------------------------------------------------------------------------------

STREAM = [
    *CASES,
    EditCase("blank", "Who?", " "),
    EditCase("short", "Where is Larkspur?", "Port Maribel"),
    EditCase("long", "In which of the many cities by the wide northern sea was Edda Quillfeather born?", "Grenholm"),
    EditCase("again", CASES[0].prompt, "Edda Quillfeather"),
]


def near(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same state up to the rounding of float32, over as many steps as the tests take."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("shards_at_once", "loss", "change", "retrieve"),
    [(2, 0.02, 1e-4, True), (4, 9.0, 2.0, True), (4, 0.02, 1e-4, False)],
    ids=["two", "some done early", "one merged weight"],
)
def test_shards_side_by_side_are_those_trained_one_by_one(
    build: Build, shards_at_once: int, loss: float, change: float, retrieve: bool
) -> None:
    outcomes, stopping = [], {"loss": loss, "change": change}
    for at_once, engine in ((1, "sequential"), (1, "cached"), (shards_at_once, "cached")):
        editor = build(shards_at_once=at_once, engine=engine, early_stopping=stopping, retrieve=retrieve)
        records = editor.edit(STREAM)
        outcomes.append((editor.state_dict(), [(record.case_id, record.action, record.steps) for record in records]))
        editor.detach()
    plain, one_by_one, together = outcomes
    assert together[1] == one_by_one[1] == plain[1]
    assert [case_id for case_id, *_ in together[1]] == [case.id for case in STREAM]
    near(together[0], one_by_one[0])
    near(together[0], plain[0])


def test_stream_may_be_cut_anywhere_between_shards_side_by_side(build: Build) -> None:
    editor = build(shards_at_once=3)
    assert editor.slice_size == 6
    editor.edit(STREAM)
    expected = editor.state_dict()
    editor.detach()
    cut = build(shards_at_once=3)
    cut.edit(STREAM[:1])
    state = cut.state_dict()
    cut.detach()
    resumed = build(shards_at_once=3)
    resumed.load_state_dict(state)
    resumed.edit(STREAM[1:])
    near(resumed.state_dict(), expected)


def test_edit_without_a_finite_loss_leaves_its_neighbour_alone(
    build: Build, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    editor = build()
    upper, base = editor._fast.layers(), editor.weights.base
    assert upper is not None
    ones = torch.ones_like(base)
    edits = [SideEdit(rows_of(golden_tokenizer, text), ones, base, 0) for text in ("why", "how is it")]
    settings: dict[str, Any] = {"base": base, "side": editor.side, "act_weight": 1.0}

    def trained(some: list[SideEdit], extra: Tensor) -> list[SideTrained]:
        forward = upper.side_pass([edit.rows for edit in some], None, editor._activation)
        return train_sides(some, forward=forward, extra=lambda _done: extra, **settings)

    broken, sound = trained(edits, torch.tensor([math.nan, 0.0]))
    (alone,) = trained(edits[1:], torch.zeros(1))
    assert (broken.finite, broken.steps) == (False, 0)
    assert torch.equal(broken.weight, base)
    assert sound.steps == alone.steps
    torch.testing.assert_close(sound.weight, alone.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("totals", "steps"),
    [
        # Settled where the last loss and the one before differ by at most 0.1, and the last is at most 0.5.
        ([2.0, 0.5, 0.4375, 9.0, 9.0, 9.0], 3),  # before the fourth pass 0.5 and 0.4375 are known
        ([2.0, 0.625, 0.5625, 0.5, 9.0, 9.0], 4),  # near each other at once, low enough two passes later
        ([2.0, 0.5, 0.375, 0.25, 0.125, 0.0], 6),  # low, and never near each other
        ([0.5, 0.5, 9.0, 9.0, 9.0, 9.0], 2),
    ],
)
def test_training_stops_once_the_loss_has_settled(
    totals: list[float], steps: int, build: Build, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    editor = build(n_steps=6, early_stopping={"loss": 0.5, "change": 0.1})
    upper, base = editor._fast.layers(), editor.weights.base
    assert upper is not None
    edit = SideEdit(rows_of(golden_tokenizer, "why"), torch.ones_like(base), base, 0)
    forward, script = upper.side_pass([edit.rows], None, editor._activation), iter(totals)
    labels = Labels.of([edit.rows])

    def rest(done: Any) -> Tensor:
        """What the edit loss lacks to the total of the script."""
        return next(script) - edit_loss(done.logits, labels)

    settings: dict[str, Any] = {"base": base, "side": editor.side, "act_weight": 0.0}
    (trained,) = train_sides([edit], forward=forward, extra=rest, **settings)
    assert trained.steps == steps


# --- Where irrelevant prompts are from -----------------------------------------------------------------


def test_no_case_may_be_tested_on_a_disjoint_prompt(build: Build, tmp_path: Path) -> None:
    editor = build(n_steps=1)
    tested = EditCase("x", "a", "b", locality=(Probe(BUILT_IN[5].title() + "?", "c"),))
    with pytest.raises(UserError, match=r"method.irrelevant_prompts: case x .* give a file with other prompts"):
        editor.expect([CASES[0], tested])
    with pytest.raises(UserError, match="is in the list"):
        editor.edit([CASES[0], tested])
    assert editor.weights.n_edits == 0
    assert "disjoint" in editor.warnings()[0]
    editor.detach()
    (tmp_path / "prompts.txt").write_text("the leak\n")
    own = build(irrelevant_prompts=str(tmp_path / "prompts.txt"), n_steps=1)
    own.expect([tested])
    with pytest.raises(UserError, match="case y tests locality on 'The leak'"):
        own.expect([EditCase("y", "a", "b", locality=(Probe("The leak", "c"),))])


def test_disjoint_prompts_come_in_turn_whatever_is_tested(build: Build) -> None:
    editor = build()
    assert [editor.irrelevant.of(CASES[0], turn) for turn in (0, 1, 32)] == [BUILT_IN[i] for i in (0, 1, 0)]


def test_release_trains_on_the_prompts_of_the_test_and_says_so(build: Build) -> None:
    editor = build(loc_source="release", n_steps=1)
    tested = EditCase("x", "a", "b", locality=(Probe("the leak", "c"),))
    editor.expect([tested])
    assert editor.irrelevant.of(tested, 0) == "the leak"
    assert len(editor.warnings()) == 1
    assert "optimistic" in editor.warnings()[0]
    editor.edit(CASES[:1])
    assert "1 cases have no locality prompt" in editor.warnings()[1]


def test_prompts_come_from_a_file(tmp_path: Path, wise_config: Callable[..., WiseConfig]) -> None:
    def listed(name: str) -> list[str]:
        return list(DisjointPrompts(wise_config(irrelevant_prompts=str(tmp_path / name))).prompts)

    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert listed("prompts.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        listed("empty.txt")
    with pytest.raises(UserError, match="cannot be read"):
        listed("missing.txt")


# --- Failures, state, WISE-Merge -----------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 5])
def test_an_edit_without_a_finite_loss_has_failed_and_leaves_nothing(build: Build, n_steps: int) -> None:
    editor = build(learning_rate=1e30, norm_constraint=None, n_steps=n_steps)
    (record,) = editor.edit(CASES[:1])
    assert (record.action, record.steps) == ("failed", 0)
    assert record.problem == "the loss was not finite; the side weight was put back"
    assert editor.weights.live is None
    assert editor.weights.lowest == 1e9


def test_blank_target_fails_and_keeps_its_place_in_the_shard(build: Build) -> None:
    editor = build(n_steps=1)
    records = editor.edit([EditCase("blank", "Who?", " "), CASES[0]])
    assert [record.action for record in records] == ["failed", "inserted"]
    assert (editor.weights.n_edits, len(editor.weights.stored)) == (2, 1)


def test_merge_mode_answers_with_one_weight_and_goes_on_after_a_restart(build: Build) -> None:
    stream = [*CASES, *(EditCase(f"again {case.id}", case.prompt, case.target) for case in CASES)]
    editor = build(retrieve=False, n_steps=3)
    editor.edit(stream[:5])
    state = editor.state_dict()
    assert {"live", "merged"} <= state.keys()
    shown = editor.weights.one_weight()
    editor.edit(stream[5:])
    expected = editor.state_dict()
    editor.detach()
    resumed = build(retrieve=False, n_steps=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.weights.one_weight().weight, shown.weight)
    assert resumed.weights.one_weight().activation == shown.activation
    resumed.edit(stream[5:])
    ours = resumed.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_state_of_another_module_is_refused(build: Build) -> None:
    editor = build(n_steps=1)
    editor.edit(CASES[:1])
    state = editor.state_dict()
    editor.detach()
    other = build(module="model.layers.2.mlp.gate_proj")
    with pytest.raises(ValueError, match="of shape"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("model.layers.9.mlp.down_proj", "has no such module"),
        ("model.layers.2.mlp", "a linear module is needed"),
    ],
)
def test_module_that_cannot_have_side_weights_is_refused(build: Build, module: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(module=module)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("shards_at_once=0", "method.shards_at_once must be at least 1, got 0"),
        ("merge_freq=3", "method.merge_freq must be a multiple of save_freq, got 3 and 2; whole shards are merged"),
        ("save_freq=0", "method.save_freq must be at least 1, got 0"),
        ("loc_source=other", "method.loc_source must be 'disjoint' or 'release', got 'other'"),
        ("engine=fast", "method.engine must be 'cached' or 'sequential', got 'fast'"),
        ("act_margin=[1.0,2.0]", "method.act_margin must be a list of at least 3"),
        ("mask_ratio=0.0", "method.mask_ratio must be above 0"),
        ("density=1.5", "method.density must be at most 1"),
        ("act_ratio=0.0", "method.act_ratio must be above 0"),
        ("templates=[no place]", "method.templates must hold '{}', where the prompt goes, got 'no place'"),
        ("n_steps=0", "method.n_steps must be at least 1, got 0"),
        ("learning_rate=0.0", "method.learning_rate must be above 0"),
        ("norm_constraint=0.0", "method.norm_constraint must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=wise", f"method.{setting}"])
    assert str(caught.value).startswith(sentence)


def test_release_overlay_sets_what_the_release_does() -> None:
    method = run_config(["method=wise", "compat=release"]).method
    assert (method["loc_source"], method["add_bias"]) == ("release", False)
