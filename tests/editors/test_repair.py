"""REPAIR: batching, merging and distillation on numbers worked out by hand, and what the feedback does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.wise.config import RepairConfig
from horen_bench.editors.wise.distillation import alignment, divergence, teacher_of
from horen_bench.editors.wise.repair import RepairEditor
from horen_bench.editors.wise.repair_batches import (
    TrainedShard,
    WindowEdit,
    gaussian,
    inconsistent,
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
Build = Callable[..., RepairEditor]


@pytest.fixture
def build(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase, repair_config: Callable[..., RepairConfig]
) -> Build:
    def built(side: dict[str, Any] | None = None, **changes: Any) -> RepairEditor:
        config = repair_config({"n_steps": 3, **(side or {})}, **changes)
        return RepairEditor(golden_model, golden_tokenizer, config, seed=42)

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
    first, second = base + torch.tensor([0.2, -0.1, 0.3, 0.0]), base + torch.tensor([0.4, 0.3, 0.0, 0.0])
    losses = [0.0, torch.tensor(1.5).log().item()]  # shares 0.6 and 0.4
    expected = base + torch.tensor([0.28, 0.3, 0.3, 0.0])
    torch.testing.assert_close(loss_aware_ties([first, second], base, losses, 1.0), expected)
    even = loss_aware_ties([first, second], base, losses, 0.0)
    torch.testing.assert_close(even, base + torch.tensor([0.3, 0.3, 0.3, 0.0]))


def test_distillation_is_the_squared_temperature_times_the_mean_divergence() -> None:
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    softened = torch.softmax(student / 2, dim=-1)[0]
    expected = 4 * sum(0.5 * (0.5 / share).log() for share in softened)
    torch.testing.assert_close(divergence(teacher, student, 2.0), torch.as_tensor(expected))
    assert divergence(student, student, 2.0).item() == pytest.approx(0)


def test_alignment_pulls_to_the_seed_and_to_the_mean() -> None:
    hidden, first, mean = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # The direction is (.6, .8): 1 - .6 from the seed, .36 + .04 from the mean.
    assert alignment(hidden, first, mean, 0.2, 0.5).item() == pytest.approx(0.2 * 0.4 + 0.5 * 0.4)


def test_members_far_from_their_own_seed_are_inconsistent() -> None:
    angles = torch.tensor([0.0, 0.5, 1.2, 0.1])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    # To seed 0: 1 - cos(1.2) = .64, 1 - cos(.5) = .12; to seed 1: 1 - cos(.4) = .08.
    assert inconsistent(features, [[0, 2], [1, 3]], 0.5) == [2]
    assert inconsistent(features, [[0, 1, 2], [3]], 0.1) == [1, 2]
    assert inconsistent(features, [[0], [1], [2], [3]], 1e-6) == []


# --- Windows and feedback ------------------------------------------------------------------------------


def test_each_window_leaves_one_memory_and_a_record_per_case_in_order(build: Build) -> None:
    editor = build()
    more = [EditCase(f"{case.id} again", case.prompt, case.target) for case in CASES[:2]]
    records = editor.edit([*CASES, *more])
    assert [record.case_id for record in records] == [case.id for case in [*CASES, *more]]
    assert (len(editor.weights.stored), editor.weights.live) == (2, None)
    assert (editor.n_shards, editor.n_trainings, editor.weights.n_edits) == (3, 6, 6)
    assert editor.slice_size == 4
    assert "windows of 4 edits in batches of 2" in editor.warnings()[-1]


def test_failures_prune_a_shard_and_are_trained_again(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0)  # everything fails
    records = editor.edit(CASES)
    assert editor.n_trainings == 8
    assert [record.steps for record in records] == [6] * 4
    assert len(editor.weights.stored) == 1
    assert [sample.retries for sample in editor.pool] == [1] * 4


def test_budget_and_retries_bound_what_is_trained_again(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0, max_trainings=7)
    editor.edit(CASES)
    assert editor.n_trainings == 4
    editor.detach()
    editor = build(max_rounds=5, error_threshold=1.0, max_retries=2)
    editor.edit(CASES)
    assert editor.n_trainings == 4 * 3


def test_training_stops_by_the_settings_of_the_side_memory(build: Build) -> None:
    # From 1e9, what counts as the loss before the first, no change is small enough before the third pass.
    loose = {"loss": 1e8, "change": 1e8}
    (record,) = build({"early_stopping": loose, "save_freq": 1, "merge_freq": 1}, max_rounds=0).edit(CASES[:1])
    assert record.steps == 2


def test_what_is_right_is_not_trained_again(build: Build) -> None:
    editor = build({"n_steps": 40}, max_rounds=1)
    editor.edit(CASES[:1])
    assert editor.pool == []
    assert editor.n_trainings == 1


def test_worst_shard_goes_and_its_sound_members_are_trained_again(build: Build, monkeypatch: Any) -> None:
    editor = build(max_rounds=1)
    samples = [WindowEdit(case) for case in CASES]
    weight = editor._linear.weight.detach()
    shards = [TrainedShard(Memory(weight, 1.0), samples[:2]), TrainedShard(Memory(weight, 2.0), samples[2:])]
    monkeypatch.setattr(editor, "_shares_right", lambda cases: [1.0 if case.id == "third" else 0.0 for case in cases])
    assert editor._repair(shards)
    assert [[edit.case.id for edit in shard.members] for shard in shards[:1]] == [["third"]]  # the first shard went
    assert sorted(edit.case.id for shard in shards[1:] for edit in shard.members) == ["first", "fourth", "second"]
    assert samples[2].retries == 0


def test_shards_that_nothing_reaches_leave_no_memory(build: Build) -> None:
    editor = build()
    assert editor._merged_shards([TrainedShard(Memory(editor._linear.weight.detach(), 1e9))]) == []
    (record,) = editor.edit([EditCase("blank", "Who?", " ")])
    assert record.action == "failed"
    assert editor.weights.stored == []


def test_failures_survive_a_restart(build: Build) -> None:
    editor = build(max_rounds=1, error_threshold=1.0)
    editor.edit(CASES)
    state = editor.state_dict()
    editor.edit(CASES[:2])
    expected = editor.state_dict()
    editor.detach()
    resumed = build(max_rounds=1, error_threshold=1.0)
    resumed.load_state_dict(state)
    assert sorted(edit.case.id for edit in resumed.pool) == sorted(case.id for case in CASES)
    resumed.edit(CASES[:2])
    ours = resumed.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_teacher_changes_what_the_others_learn(build: Build, kind: str) -> None:
    weights = []
    for distill in (kind, "none"):
        editor = build(distill=distill)
        editor.edit(CASES[:2])
        weights.append(editor.weights.stored[0].weight)
        editor.detach()
    assert not torch.equal(*weights)


def test_features_of_a_batch_are_the_seeds_and_the_mean_so_far(build: Build) -> None:
    editor = build(distill="feature")
    batch = editor._opened([WindowEdit(case) for case in CASES], 0.0)
    assert teacher_of(batch.references, editor.config) is None
    batch.references = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    teacher = teacher_of(batch.references, editor.config)
    assert teacher is not None
    assert teacher.tolist() == [[1, 0], [0.5, 0.5]]


def near(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same state up to the rounding of float32, over as many steps as the tests take."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "distill"),
    [({"max_rounds": 1, "error_threshold": 1.0}, "feature"), ({}, "logit")],
    ids=["repairs", "windows"],
)
def test_shards_and_windows_side_by_side_are_those_trained_one_by_one(
    build: Build, changes: dict[str, Any], distill: str
) -> None:
    more = [EditCase(f"{case.id} again", case.target, case.prompt) for case in CASES[:3]]
    outcomes = []
    for side in ({"engine": "sequential"}, {}, {"shards_at_once": 4}):
        editor = build(side, distill=distill, **changes)
        records = [(record.case_id, record.action, record.steps) for record in editor.edit([*CASES, *more])]
        outcomes.append((editor.state_dict(), records))
        editor.detach()
    assert editor.slice_size == (4 if changes else 8)
    together, together_records = outcomes.pop()
    for state, records in outcomes:
        assert together_records == records
        near(together, state)


def test_put_off_edits_wait_once_through_a_restart_and_are_written_by_a_flush(build: Build) -> None:
    editor = build(consistency=1e-6)  # nobody but the seeds is like a seed
    records = editor.edit(CASES)
    put_off = [record.case_id for record in records if record.problem]
    assert len(put_off) == 2
    assert [sample.case.id for sample in editor.waiting] == put_off
    assert (editor.n_trainings, editor.weights.n_edits) == (2, 4)
    state = editor.state_dict()
    editor.detach()
    resumed = build(consistency=1e-6)
    resumed.load_state_dict(state)
    records = resumed.edit([EditCase(f"{case.id} again", case.prompt, case.target) for case in CASES[:2]])
    assert not set(put_off) & {sample.case.id for sample in resumed.waiting}
    n_waiting = sum(record.problem is not None for record in records)
    assert (len(resumed.waiting), resumed.n_trainings) == (n_waiting, 2 + 4 - n_waiting)
    resumed.flush()
    assert (resumed.waiting, resumed.n_trainings, resumed.weights.n_edits) == ([], 6, 6)
    before = resumed.state_dict()
    resumed.flush()
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.state_dict().items())


def test_noise_on_repeated_trainings_has_its_deviation_and_comes_back(build: Build) -> None:
    editor = build()
    base = editor._linear.weight.detach()
    assert editor._opened([WindowEdit(CASES[0])], 0.0).weight is None
    first, second = (editor._opened([WindowEdit(CASES[0])], 0.5).weight for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first - base).std().item() == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first - base, 0.5 * gaussian(base, [42, 1]))


def test_only_repeated_trainings_start_from_noise(build: Build, monkeypatch: Any) -> None:
    editor = build(max_rounds=1, error_threshold=1.0, prune_noise=0.25)
    noises: list[float] = []
    opened = editor._opened

    def noting(samples: list[WindowEdit], noise: float) -> Any:
        noises.append(noise)
        return opened(samples, noise)

    monkeypatch.setattr(editor, "_opened", noting)
    editor.edit(CASES)
    assert noises == [0, 0, 0.25, 0.25]


def test_released_mode_works_edit_by_edit_as_wise(build: Build) -> None:
    editor = build(mode="released", distill="none")
    editor.edit(CASES[:3])
    assert (len(editor.weights.stored), editor.weights.live is None, editor.slice_size) == (1, False, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("mode=other", "method.mode must be 'paper' or 'released', got 'other'"),
        ("distill=features", "method.distill must be 'logit', 'feature' or 'none', got 'features'"),
        ("mode=released distill=feature", "method.mode=released has neither distill=feature nor consistency"),
        ("mode=released distill=none consistency=0.5", "method.mode=released has neither distill=feature nor"),
        ("consistency=0.0", "method.consistency must be above 0"),
        ("prune_noise=-1.0", "method.prune_noise must be at least 0"),
        ("temperature=0.0", "method.temperature must be above 0"),
        ("error_threshold=2.0", "method.error_threshold must be at most 1"),
        ("prune_threshold=-1.0", "method.prune_threshold must be at least 0"),
        ("mode=released", "method.mode=released distills all positions; set method.side.engine=sequential"),
        ("side.retrieve=false", "method.side.retrieve must be true; REPAIR routes among memories"),
        ("side.merge_freq=3", "method.side.merge_freq must be a multiple of save_freq, got 3 and 2"),
        ("side.templates=[none]", "method.side.templates must hold '{}', where the prompt goes, got 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=repair", *(f"method.{setting}" for setting in settings.split())])
    assert str(caught.value).startswith(sentence)
