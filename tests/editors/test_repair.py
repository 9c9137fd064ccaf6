"""REPAIR: batching, merging and distillation on numbers worked out by hand, and what the feedback does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.repair import (
    RepairEditor,
    Sample,
    Shard,
    distillation,
    loss_aware_ties,
    similarity_batches,
)
from horen_bench.editors.wise.routing import Memory
from horen_bench.errors import UserError

CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm"),
    EditCase("fourth", "Where is Larkspur?", "Port Maribel"),
]
SIDE: dict[str, Any] = {
    "retrieve": True,
    "templates": ["{}", "I walked a {}"],
    "learning_rate": 0.3,
    "weight_decay": 1e-5,
    "n_steps": 3,
    "early_stopping": {"loss": 0.02, "change": 1e-4},
    "act_margin": [1.0, 6.0, 4.0],
    "act_ratio": 0.8,
    "mask_ratio": 0.8,
    "norm_constraint": 1.0,
    "save_freq": 2,
    "merge_freq": 4,
    "density": 0.53,
    "loc_source": "disjoint",
    "irrelevant_prompts": None,
    "add_bias": True,
    "engine": "cached",
}
SETTINGS: dict[str, Any] = {
    "seed": 42,
    "module": "model.layers.2.mlp.down_proj",
    "mode": "paper",
    "act_weight": 1.0,
    "distill": "logit",
    "distill_lambda": 0.2,
    "temperature": 2.0,
    "error_threshold": 0.85,
    "prune_threshold": 0.5,
    "pool_limit": None,
    "max_rounds": 0,
    "max_retries": 3,
    "max_trainings": 100,
    "loss_sensitivity": 1.0,
}
Build = Callable[..., RepairEditor]


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    def built(side: dict[str, Any] | None = None, **changes: Any) -> RepairEditor:
        return RepairEditor(golden_model, golden_tokenizer, side={**SIDE, **(side or {})}, **{**SETTINGS, **changes})

    return built


# --- Batching, merging, distillation -------------------------------------------------------------------


def test_batches_hold_like_samples_seed_first() -> None:
    angles = torch.tensor([0.0, 1.5, 0.1, 1.6, 0.2])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Mean cosines favour 4, between the two groups but nearer to the larger; its neighbours by angle are 2 and 0.
    assert similarity_batches(features, 3) == [[4, 2, 0], [1, 3]]


def test_earlier_sample_comes_first_where_all_are_alike() -> None:
    assert similarity_batches(F.normalize(torch.ones(3, 2), dim=1), 2) == [[0, 1], [2]]


def test_merging_weighs_agreement_by_loss_and_leaves_conflicts_to_the_stronger() -> None:
    base = torch.ones(4)
    one, two = base + torch.tensor([0.2, -0.1, 0.3, 0.0]), base + torch.tensor([0.4, 0.3, 0.0, 0.0])
    losses = [0.0, torch.tensor(1.5).log().item()]  # shares 0.6 and 0.4
    expected = base + torch.tensor([0.28, 0.3, 0.3, 0.0])
    torch.testing.assert_close(loss_aware_ties([one, two], base, losses, 1.0), expected)
    even = loss_aware_ties([one, two], base, losses, 0.0)
    torch.testing.assert_close(even, base + torch.tensor([0.3, 0.3, 0.3, 0.0]))


def test_distillation_is_the_squared_temperature_times_the_mean_divergence() -> None:
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    softened = torch.softmax(student / 2, dim=-1)[0]
    expected = 4 * sum(0.5 * (0.5 / share).log() for share in softened)
    torch.testing.assert_close(distillation(teacher, student, 2.0), torch.as_tensor(expected))
    assert distillation(student, student, 2.0).item() == pytest.approx(0)


# --- Windows and feedback ------------------------------------------------------------------------------


def test_each_window_leaves_one_memory_and_a_record_per_case_in_order(build: Build) -> None:
    editor = build()
    more = [EditCase(f"{case.id} again", case.prompt, case.target) for case in CASES[:2]]
    records = editor.edit([*CASES, *more])
    assert [record.case_id for record in records] == [case.id for case in [*CASES, *more]]
    assert (len(editor.memories), editor.live) == (2, None)
    assert (editor.n_shards, editor.n_trainings, editor.n_edits) == (3, 6, 6)
    assert editor.slice_size == 4
    assert "windows of 4 edits in batches of 2" in editor.warnings()[-1]


def test_failures_prune_a_shard_and_are_trained_again(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0)  # everything fails
    records = editor.edit(CASES)
    assert editor.n_trainings == 8
    assert [record.steps for record in records] == [6] * 4
    assert len(editor.memories) == 1
    assert [sample.retries for sample in editor.pool] == [1] * 4


def test_budget_and_retries_bound_what_is_trained_again(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0, max_trainings=7)
    editor.edit(CASES)
    assert editor.n_trainings == 4
    editor.detach()
    editor = build(max_rounds=5, error_threshold=1.0, max_retries=2)
    editor.edit(CASES)
    assert editor.n_trainings == 4 * 3


def test_what_is_right_is_not_trained_again(build: Build) -> None:
    editor = build({"n_steps": 40}, max_rounds=1)
    editor.edit(CASES[:1])
    assert editor.pool == []
    assert editor.n_trainings == 1


def test_worst_shard_goes_and_its_sound_members_are_trained_again(build: Build, monkeypatch: Any) -> None:
    editor = build(max_rounds=1)
    samples = [Sample(case) for case in CASES]
    weight = editor._linear.weight.detach()
    shards = [Shard(Memory(weight, 1.0), samples[:2]), Shard(Memory(weight, 2.0), samples[2:])]
    monkeypatch.setattr(editor, "_shares_right", lambda cases: [1.0 if case.id == "third" else 0.0 for case in cases])
    assert editor._repair(shards)
    assert [[one.case.id for one in shard.members] for shard in shards[:1]] == [["third"]]  # the first shard went
    assert sorted(one.case.id for shard in shards[1:] for one in shard.members) == ["first", "fourth", "second"]
    assert samples[2].retries == 0


def test_shards_that_nothing_reaches_leave_no_memory(build: Build) -> None:
    editor = build()
    assert editor._merged_shards([Shard(Memory(editor._linear.weight.detach(), 1e9))]) == []
    (record,) = editor.edit([EditCase("blank", "Who?", " ")])
    assert record.action == "failed"
    assert editor.memories == []


def test_failures_survive_a_restart(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0)
    editor.edit(CASES)
    state = editor.state_dict()
    editor.edit(CASES[:2])
    expected = editor.state_dict()
    editor.detach()
    resumed = build(max_rounds=1, error_threshold=1.0)
    resumed.load_state_dict(state)
    assert sorted(one.case.id for one in resumed.pool) == sorted(case.id for case in CASES)
    resumed.edit(CASES[:2])
    found = resumed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_teacher_changes_what_the_others_learn(build: Build) -> None:
    weights = []
    for distill in ("logit", "none"):
        editor = build(distill=distill)
        editor.edit(CASES[:2])
        weights.append(editor.memories[0].weight)
        editor.detach()
    assert not torch.equal(*weights)


def test_released_mode_works_edit_by_edit_as_wise(build: Build) -> None:
    editor = build(mode="released", distill="none")
    editor.edit(CASES[:3])
    assert (len(editor.memories), editor.live is None, editor.slice_size) == (1, False, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "other"}, "method.mode"),
        ({"distill": "feature"}, "method.distill"),
        ({"temperature": 0.0}, "method.temperature"),
        ({"error_threshold": 2.0}, "method.error_threshold"),
        ({"prune_threshold": -1.0}, "method.prune_threshold"),
        ({"mode": "released"}, "engine=sequential"),
        ({"side": {"retrieve": False}}, "retrieve must be true"),
    ],
)
def test_settings_out_of_range_are_refused(build: Build, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(**changes)
