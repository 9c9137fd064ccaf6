"""GRACE and GRACE+Norm: the radius rule on numbers worked out by hand, replacement, engines, switches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.editors.codebook.config import CodebookConfig
from horen_bench.editors.codebook.routing import Decision, RouterDescription
from horen_bench.editors.grace.config import GraceConfig
from horen_bench.editors.grace.editor import GraceEditor
from horen_bench.editors.grace.scan import distances
from horen_bench.editors.horen.config import HopfieldRetrieval, HorenConfig, LoraValue
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.prompts import EncodedEdit, announced_prompt

MODULE = "model.layers.2.mlp.down_proj"
PROMPT, TARGET, OTHER_TARGET = "Who founded Brightwater?", "Lucan Vey", "Petra Dunmore"
UNRELATED = "nq question: where is the museum of clocks"
CASES = [
    EditCase("a", PROMPT, TARGET),
    EditCase("b", "What city was Edda Quillfeather born in?", "Port Maribel"),
    EditCase("c", "The language spoken by the fishermen of Halvard Bay is", "Norrish"),
]
OTHER = EditCase("d", PROMPT, OTHER_TARGET)

Build = Callable[..., GraceEditor]
Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def settings(**changes: Any) -> GraceConfig:
    """Settings of an editor that writes well on the reference model."""
    values: dict[str, Any] = {
        "name": "grace",
        "label": "GRACE",
        "module": MODULE,
        "pooling_ratio": 0.0,
        "normalize": False,
        "eps": 1.0,
        "threshold": None,
        "label_rule": "tokens",
        "same_key": "update",
        "value_init": "cold",
        "replacement": "replace_last",
        "decode_lookup": False,
        "vector": {"learning_rate": 1.0},
        "n_steps": 40,
        "early_stopping": None,
        "engine": "parallel",
        "train_batch": None,
        **changes,
    }
    return GraceConfig(**values)


NORM: dict[str, Any] = {"pooling_ratio": 0.6, "normalize": True}


@pytest.fixture(scope="module")
def pair(golden_folder: Path) -> Pair:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(golden_folder)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(golden_folder)


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Build:
    """Builds editors on one copy of the reference model."""
    return lambda **changes: GraceEditor(golden_model, golden_tokenizer, settings(**changes), seed=42)


def at(*places: float) -> Tensor:
    """Queries `(B, 176)` on one axis, so that distances are differences."""
    return torch.tensor(places)[:, None] * torch.eye(176)[0]


def targets(*labels: int) -> list[EncodedEdit]:
    return [EncodedEdit((5, 6, 7), (label,)) for label in labels]


def radii(editor: GraceEditor) -> list[float]:
    return editor.codebook.radii.tolist()


def outline(decisions: Sequence[Decision]) -> list[tuple[str, int]]:
    return [(decision.action, decision.entry) for decision in decisions]


def decoded(editor: GraceEditor, prompts: Sequence[str], n: int) -> list[str]:
    rows = editor.encoder.prompts(prompts)
    return list(editor.encoder.tokenizer.batch_decode(greedy_decode(editor.model, rows, [n] * len(rows), 0)))


# --- The radius rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "distance", "agree", "expected", "action"),
    [
        (1.0, 1.5, False, [0.74999, 0.75], "conflict"),  # parted in the middle
        (0.2, 1.0, False, [0.49999, 0.5], "conflict"),  # a shrunk ball grows by being split
        (1.0, 1.5, True, [1.5], "fine_tuned"),  # expanded to the query
        (1.0, 0.5, True, [1.0], "fine_tuned"),  # inside: nothing changes
        (1.0, 1.0, True, [1.0], "fine_tuned"),  # at the border: inside
        (1.0, 2.0, True, [2.0], "fine_tuned"),  # a fresh ball would touch the old one: not new
        (1.0, 2.125, True, [1.0, 1.0], "inserted"),  # beyond radius + eps: new, whatever the label
        (1.0, 2.125, False, [1.0, 1.0], "inserted"),
        (1.0, 0.0, False, [-1e-5, 0.0], "failed"),  # on the key: nothing is left of either ball
    ],
)
def test_radii_follow_the_rule(
    *, radius: float, distance: float, agree: bool, expected: list[float], action: str, build: Build
) -> None:
    editor = build(same_key="release")
    editor.decide(targets(1), at(0.0))
    editor.codebook.radii[0] = radius
    (decision,) = editor.decide(targets(1 if agree else 2), at(distance))
    assert decision.action == action
    assert decision.route is not None
    assert (decision.route.score, decision.route.matched) == (distance, distance <= radius)
    assert radii(editor) == pytest.approx(expected, abs=1e-7)  # a gap of 1e-5, and not of 0.9e-5
    assert editor.codebook.keys[0, 0] == 0  # the old key stays where it is


def test_later_edits_of_a_call_see_the_radii_that_earlier_ones_left(build: Build) -> None:
    """2.4 is new beside a ball of radius 1, but within reach of one expanded to 1.5."""
    editor = build(same_key="release")
    decisions = outline(editor.decide(targets(1, 1, 1, 2), at(0.0, 1.5, 2.375, 3.0)))
    # 3.0 is inside reach of the ball that ends at 2.375 and has another target: split at 1.5.
    assert decisions == [("inserted", 0), ("fine_tuned", 0), ("fine_tuned", 0), ("conflict", 1)]
    assert radii(editor) == pytest.approx([1.49999, 1.5])
    editor.detach()
    fresh = build()
    assert outline(fresh.decide(targets(1, 1), at(0.0, 2.375))) == [("inserted", 0), ("inserted", 1)]


def test_of_tied_keys_the_oldest_is_looked_up(build: Build) -> None:
    editor = build()
    for place in (4.0, 0.0, 2.0):
        editor.codebook.append(at(place)[0], (1,), 3)
    editor.codebook.radii[:] = 1
    matches = editor.match(at(1.0, 3.0, 3.5, 5.5))
    assert matches.entries.tolist() == [1, 0, 0, 0]
    assert matches.scores.tolist() == [1.0, 1.0, 0.5, 1.5]
    assert matches.matched.tolist() == [True, True, True, False]


def test_a_ball_expanded_to_a_query_reaches_past_it_by_rounding(build: Build) -> None:
    editor = build(same_key="update")
    editor.decide(targets(1, 1), at(0.0, 1.5))
    assert radii(editor) == pytest.approx([1.5 * (1 + 1e-5)], rel=1e-7)


@dataclass
class Plain:
    """The rule as its authors state it, one edit at a time, for vectors in the plane and labels by value."""

    eps: float
    keys: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    radii: list[Tensor] = field(default_factory=list)

    def write(self, key: Tensor, label: int) -> tuple[str, int]:
        apart = torch.stack([(key - other).double().norm() for other in self.keys]).float() if self.keys else None
        j = int(apart.argmin()) if apart is not None else 0
        if apart is None or apart[j] > torch.tensor(self.eps) + self.radii[j]:
            return "inserted", self.add(key, label, torch.tensor(self.eps))
        if self.labels[j] != label:
            self.radii[j] = apart[j] / 2 - torch.tensor(1e-5)
            new = self.add(key, label, apart[j] / 2)
            return ("failed" if apart[j] == 0 else "conflict"), new
        self.radii[j] = torch.maximum(self.radii[j], apart[j])
        return "fine_tuned", j

    def add(self, key: Tensor, label: int, radius: Tensor) -> int:
        self.keys.append(key)
        self.labels.append(label)
        self.radii.append(radius)
        return len(self.keys) - 1


FEW = hypothesis_settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Corners of a grid of eighths: distances are often equal and often on a border, and squares are exact in float32.
PLANE = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=30)


@FEW
@given(stream=PLANE, block=st.integers(1, 9), cut=st.integers(0, 30))
def test_blocks_and_calls_of_any_size_take_the_decisions_of_one_edit_at_a_time(
    pair: Pair, stream: list[tuple[int, int, int]], block: int, cut: int
) -> None:
    keys = torch.zeros(len(stream), 176)
    keys[:, :2] = torch.tensor([[x / 8, y / 8] for x, y, _ in stream])
    edits = targets(*(label for _, _, label in stream))
    plain = Plain(eps=0.75)
    expected = [plain.write(key, edit.target[0]) for key, edit in zip(keys, edits, strict=True)]
    editor = GraceEditor(*pair, settings(eps=0.75, same_key="release"), seed=42)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(editor, "block_size", lambda: block)
            decisions = editor.decide(edits[:cut], keys[:cut]) + editor.decide(edits[cut:], keys[cut:])
    finally:
        editor.detach()
    assert outline(decisions) == expected
    torch.testing.assert_close(editor.codebook.radii, torch.stack(plain.radii), rtol=0, atol=0)


def test_distances_near_zero_are_exact() -> None:
    """By way of inner products, zero would come out near 0.03 at this length and among so many keys."""
    queries = 100 * torch.randn((40, 300), generator=torch.Generator().manual_seed(0))
    apart = distances(queries, queries)
    assert apart.diagonal().tolist() == [0.0] * 40
    assert torch.equal(distances(queries[3:4], queries[5:8]), apart[3:4, 5:8])
    moved = queries.clone()
    moved[:, 7] += 0.001
    torch.testing.assert_close(distances(queries, moved).diagonal(), torch.full((40,), 0.001), rtol=0.05, atol=0)


# --- Which targets agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "agrees"), [("tokens", True), ("original", False), ("release", False)])
def test_the_same_target_behind_a_longer_prompt_agrees_by_tokens_only(rule: str, agrees: bool, build: Build) -> None:
    editor = build(label_rule=rule)
    editor.decide([EncodedEdit((5, 6, 7), (9, 8))], at(0.0))
    assert editor.consistent(0, EncodedEdit((5, 6, 7, 4), (9, 8))) == agrees
    assert editor.consistent(0, EncodedEdit((5, 6, 7), (9, 8)))


@pytest.mark.parametrize(("rule", "agreeing"), [("tokens", 0), ("original", 0), ("release", 2)])
def test_the_release_reads_the_label_at_the_reversed_index(rule: str, agreeing: int, build: Build) -> None:
    editor = build(label_rule=rule)
    editor.decide(targets(1, 2, 3), at(0.0, 10.0, 20.0))
    (edit,) = targets(1)
    assert [entry for entry in range(3) if editor.consistent(entry, edit)] == [agreeing]


# --- A known prompt with another target -------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, NORM, {**NORM, "threshold": 0.8}], ids=["grace", "norm", "threshold"])
def test_a_known_prompt_answers_its_newest_target(changes: dict[str, Any], build: Build) -> None:
    editor = build(**changes)
    first, second, other = editor.edit([CASES[0], CASES[1], OTHER])
    assert first.action == "inserted"
    assert second.action in ("inserted", "conflict")  # no two unit vectors are further apart than twice a radius of 1
    assert other.action == "fine_tuned"
    assert (other.entry, other.problem, len(editor.codebook)) == (0, None, 2)
    assert editor.codebook.labels[0] == editor.encoder.edit(PROMPT, OTHER_TARGET).target
    assert decoded(editor, [PROMPT], 6)[0].startswith(f" {OTHER_TARGET}")
    assert [record.action for record in editor.edit([OTHER, CASES[0]])] == ["fine_tuned"] * 2


def test_under_the_release_rule_such_an_edit_is_lost_and_said_to_be(build: Build) -> None:
    editor = build(same_key="release")
    (before,) = decoded(editor, [PROMPT], 6)
    editor.edit(CASES[:1])
    (record,) = editor.edit([OTHER])
    assert (record.action, record.entry, record.steps) == ("failed", None, 0)
    assert record.problem == (
        "entry 1 is not reached by its own prompt, which meets entry 0 at distance 0, radius -1e-05; "
        "nothing was trained"
    )
    assert radii(editor) == pytest.approx([-1e-5, 0])
    # Its value is what training would have started from: no garbage is left in the codebook.
    assert 0 <= editor.codebook.values["vector"][1].min() <= editor.codebook.values["vector"][1].max() < 1
    assert decoded(editor, [PROMPT], 6) == [before]


def test_balls_as_small_as_rounding_are_reported_though_trained(build: Build) -> None:
    editor = build(same_key="release")
    _, decision = editor.decide(targets(1, 2), at(4.0, 4.00001))
    assert decision.action == "conflict"
    assert decision.problem is not None
    assert decision.problem.endswith(": they decide who reaches it")


def test_a_ball_smaller_than_its_keys_rounding_is_reported(golden_folder: Path, golden_tokenizer: Any) -> None:
    """A mean of tokens is no bfloat16 number: the key is moved by more than the radius."""
    model = AutoModelForCausalLM.from_pretrained(golden_folder, dtype=torch.bfloat16).requires_grad_(False)
    editor = GraceEditor(model, golden_tokenizer, settings(**NORM, eps=1e-4), seed=42)
    (record,) = editor.edit(CASES[:1])
    assert record.action == "failed"
    assert record.problem is not None
    assert record.problem.startswith("entry 0 is not reached by its own prompt")


# --- Replacement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replacement", "places"),
    [("replace_last", [3]), ("replace_all", [0, 1, 2, 3]), ("replace_prompt", [0, 1, 2])],
)
def test_the_value_takes_the_place_of_the_output(replacement: str, places: list[int], build: Build) -> None:
    editor = build(replacement=replacement, engine="sequential")
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    outputs: list[Tensor] = []
    editor.decide(targets(1), editor.queries([[1, 40, 50, 60]]))
    handle = editor.model.get_submodule(MODULE).register_forward_hook(lambda _m, _i, output: outputs.append(output))
    value = torch.arange(64.0)
    for present in (False, True):
        editor.codebook.set_value(0, {"vector": value})
        editor.codebook.radii[0] = 0.1 if present else -1
        with announced_prompt(torch.ones(1, 4)):
            editor.model(ids)
    handle.remove()
    changed = (outputs[0] != outputs[1]).any(dim=-1)[0].nonzero()[:, 0]
    assert changed.tolist() == places
    assert torch.equal(outputs[1][0, changed], value.expand(len(places), 64))


@pytest.mark.parametrize("replacement", ["replace_all", "replace_prompt"])
def test_earlier_positions_are_trained_on_the_whole_model_and_decoded_alike_with_and_without_cache(
    replacement: str, build: Build
) -> None:
    editor = build(replacement=replacement, n_steps=20)
    editor.edit(CASES[:2])
    assert editor.warnings() == [
        f"values were trained one by one on the whole model: replacement={replacement} changes tokens before the last "
        "of the prompt"
    ]
    rows = torch.tensor(editor.encoder.prompts([PROMPT]))
    generate = getattr(editor.model, "generate")  # noqa: B009 - its type is not declared
    cached, plain = (generate(rows, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
    editor.detach()
    assert not torch.equal(generate(rows, max_new_tokens=5, do_sample=False), cached)


@pytest.mark.parametrize("decode_lookup", [False, True])
def test_a_generated_token_is_looked_up_only_if_asked_for(decode_lookup: bool, build: Build) -> None:
    """A ball around what the second generated token looks like at the module."""
    editor = build(decode_lookup=decode_lookup)
    rows = torch.tensor(editor.encoder.prompts([UNRELATED]))
    generate = getattr(editor.model, "generate")  # noqa: B009 - its type is not declared
    inputs: list[Tensor] = []
    handle = editor.model.get_submodule(MODULE).register_forward_hook(lambda _m, i, _o: inputs.append(i[0]))
    before = generate(rows, max_new_tokens=5, do_sample=False)
    handle.remove()
    editor.decide(targets(1), inputs[2][:, -1])
    editor.codebook.radii[0] = 1e-3
    editor.codebook.set_value(0, {"vector": torch.full((64,), 50.0)})
    after = generate(rows, max_new_tokens=5, do_sample=False)
    n_same = rows.shape[1] + 2
    assert torch.equal(after[:, :n_same], before[:, :n_same])
    assert torch.equal(after, before) != decode_lookup
    assert torch.equal(generate(rows, max_new_tokens=5, do_sample=False, use_cache=False), before)
    assert (editor.routes([UNRELATED]) == [None]) == decode_lookup
    editor.detach()
    assert torch.equal(generate(rows, max_new_tokens=5, do_sample=False), before)


@pytest.mark.parametrize("engine", ["parallel", "sequential"])
def test_a_warm_value_starts_at_the_output_and_changes_nothing_yet(engine: str, build: Build) -> None:
    editor = build(value_init="warm", n_steps=0, engine=engine)
    prompts = [case.prompt for case in CASES]
    before = decoded(editor, prompts, 5)
    editor.edit(CASES)
    assert [route and route.matched for route in editor.routes(prompts)] == [True] * 3
    assert decoded(editor, prompts, 5) == before
    outputs = editor.read_at_prompts([editor.encoder.prompts(prompts[1:2])[0]], lambda _i, out, _m: out[:, -1])
    torch.testing.assert_close(editor.codebook.values["vector"][1], outputs[0], rtol=1e-5, atol=1e-5)


def test_values_stay_float32_in_a_half_precision_model(golden_folder: Path, golden_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_folder, dtype=torch.bfloat16).requires_grad_(False)
    editor = GraceEditor(model, golden_tokenizer, settings(**NORM), seed=42)
    records = editor.edit([*CASES, OTHER])
    assert [record.entry for record in records] == [0, 1, 2, 0]
    assert editor.codebook.values["vector"].dtype == torch.float32
    assert decoded(editor, [PROMPT], 6)[0].startswith(f" {OTHER_TARGET}")


# --- How it is shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eps": 0.75}, RouterDescription("last token", "distance", 0.75, "Euclidean distance")),
        ({**NORM}, RouterDescription("last 60% pooled", "cosine", 0.5, "Euclidean distance")),
    ],
)
def test_the_router_is_described_as_it_is_set(
    changes: dict[str, Any], expected: RouterDescription, build: Build
) -> None:
    assert build(**changes).describe_router() == expected


def test_similarities_are_distances_or_cosines(build: Build) -> None:
    apart = build()
    assert apart.similarity(at(1.0, 3.0), at(4.0, 3.0)).tolist() == [3.0, 0.0]
    apart.detach()
    assert build(**NORM).similarity(at(1.0, 1.0), at(-1.0, 0.5)).tolist() == [-1.0, 0.5]


# --- GRACE+Norm and the ladder to HoReN -------------------------------------------------------------------


def test_on_the_sphere_length_does_not_matter(build: Build) -> None:
    editor = build(**NORM)
    rows = editor.encoder.prompts([case.prompt for case in CASES])
    torch.testing.assert_close(editor.queries(rows).norm(dim=1), torch.ones(3))


def test_a_cosine_threshold_is_strict_and_its_balls_never_change(build: Build) -> None:
    editor = build(**NORM, threshold=0.5)
    east, north = torch.eye(176)[:2]
    at_cosine = torch.stack([c * east + (1 - c * c) ** 0.5 * north for c in (0.5, 0.5001, 0.499, 0.9)])
    decisions = editor.decide(targets(1), east[None])
    assert editor.match(at_cosine).matched.tolist() == [False, True, False, True]
    decisions += editor.decide(targets(1, 2, 1), torch.stack([at_cosine[3], at_cosine[1], -east]))
    assert outline(decisions) == [("inserted", 0), ("fine_tuned", 0), ("conflict", 1), ("inserted", 2)]
    assert radii(editor) == pytest.approx([1.0, 1.0, 1.0])


def test_with_a_threshold_it_routes_as_horen_does_without_its_retrieval_step(pair: Pair) -> None:
    prompts = [f"Who wrote book number {i}?" for i in range(12)] + [case.prompt for case in CASES]
    cases = [EditCase(prompt, prompt, f"{i}") for i, prompt in enumerate(prompts)]
    probes = [f"Who wrote book numbers {i}?" for i in range(12)] + [UNRELATED]
    grace = GraceEditor(*pair, settings(**NORM, threshold=0.97, n_steps=0), seed=42)
    written = [(record.action, record.entry) for record in grace.edit(cases)]
    routes = [route for route in grace.routes(probes) if route]
    grace.detach()
    shared = settings(**NORM, n_steps=0).model_dump(include=set(CodebookConfig.model_fields))
    hopfield = HopfieldRetrieval(beta=20.0, alpha=0.1, steps=0, eps=1e-5)
    lora = LoraValue(learning_rate=1.0, rank=1, scale=1.0)
    config = HorenConfig(threshold=0.97, hopfield=hopfield, adaptor="vector", lora=lora, **shared)
    horen = HorenEditor(*pair, config, seed=42)
    assert [(record.action, record.entry) for record in horen.edit(cases)] == written
    for ours, theirs in zip(routes, horen.routes(probes), strict=True):
        assert theirs is not None
        assert (ours.entry, ours.matched) == (theirs.entry, theirs.matched)
        assert 1 - ours.score**2 / 2 == pytest.approx(theirs.score, abs=1e-5)
    horen.detach()
    assert {route.matched for route in routes} == {True, False}


def test_grace_norm_is_the_same_class_with_other_settings() -> None:
    grace, norm = (run_config([f"method={name}"]).method for name in ("grace", "grace_norm"))
    assert type(grace) is type(norm) is GraceConfig
    assert grace.label != norm.label
    ours, theirs = grace.lasting(), norm.lasting()
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "pooling_ratio", "normalize"}


# --- Engines ----------------------------------------------------------------------------------------------

_PROMPTS = (
    "Which company made the Larkspur 300?",
    "What company made the Larkspur 300?",
    "Which company built the Larkspur 300?",
    "What city was Edda Quillfeather born in?",
    "In what city was Edda Quillfeather born?",
    "Who founded Brightwater?",
    "In which year did the bridge over the Sanderling river open to the public?",
)
_TARGETS = ("Ostrander Motors", "1927", "Port Maribel", "Grenholm by the Sea")
_STREAMS = st.lists(st.tuples(st.sampled_from(_PROMPTS), st.sampled_from(_TARGETS)), min_size=1, max_size=10)
_KINDS: list[dict[str, Any]] = [
    {"eps": 1.5},
    {"eps": 1.0, "value_init": "warm"},
    {**NORM, "eps": 0.3},
    {**NORM, "threshold": 0.8},
]


def _result(editor: GraceEditor, records: Sequence[EditRecord]) -> dict[str, Any]:
    prompts = editor.encoder.prompts(_PROMPTS)
    result = {
        "decisions": [
            (r.action, r.entry, r.steps, r.problem, r.route and (r.route.entry, r.route.matched)) for r in records
        ],
        "tokens": greedy_decode(editor.model, prompts, [4] * len(prompts), 0),
        "state": {name: tensor.clone() for name, tensor in editor.state_dict().items()},
    }
    editor.detach()
    return result


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["decisions"] == theirs["decisions"]
    assert ours["tokens"] == theirs["tokens"]
    for name, tensor in ours["state"].items():
        torch.testing.assert_close(theirs["state"][name], tensor, rtol=5e-3, atol=5e-3, msg=f"{name} differs")


@hypothesis_settings(FEW, max_examples=12)
@given(stream=_STREAMS, kind=st.sampled_from(_KINDS), cut=st.integers(0, 10))
def test_both_engines_and_a_cut_stream_resumed_from_disk_come_out_the_same(
    pair: Pair, tmp_path: Path, stream: list[tuple[str, str]], kind: dict[str, Any], cut: int
) -> None:
    cases = [EditCase(str(i), prompt, target) for i, (prompt, target) in enumerate(stream)]
    constants = settings(**kind, n_steps=5, train_batch=4)
    plain = GraceEditor(*pair, settings(**kind, n_steps=5, train_batch=4, engine="sequential"), seed=42)
    expected = _result(plain, plain.edit(cases))
    whole = GraceEditor(*pair, constants, seed=42)
    _assert_same(_result(whole, whole.edit(cases)), expected)
    first = GraceEditor(*pair, constants, seed=42)
    records = first.edit(cases[:cut])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    first.detach()
    second = GraceEditor(*pair, constants, seed=42)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    _assert_same(_result(second, records + second.edit(cases[cut:])), expected)


def test_early_stopping_is_there_to_be_used(build: Build) -> None:
    stopped = build(early_stopping={"loss_bound": 0.5, "patience": 40})
    assert all(record.steps < 40 and record.loss < 0.5 for record in stopped.edit(CASES[:2]))


# --- State, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["radii", "keys", "value.vector"])
def test_a_state_that_lacks_a_tensor_is_refused(broken: str, build: Build) -> None:
    editor = build(n_steps=0)
    editor.edit(CASES[:2])
    state = editor.state_dict()
    assert state["radii"].tolist() == [1.0, 1.0]
    del state[broken]
    with pytest.raises(ValueError):
        editor.load_state_dict(state)


def test_more_entries_than_first_room_keep_their_radii(build: Build) -> None:
    editor = build()
    editor.decide(targets(*range(200)), at(*(3.0 * i for i in range(200))))
    editor.codebook.radii[:] = torch.arange(200.0)
    for i in range(200):
        editor.codebook.set_value(i, {"vector": torch.zeros(64)})
    editor.codebook.append(at(0.0)[0], (1,), 3)
    assert radii(editor) == [*map(float, range(200)), 0.0]
    assert editor.side_parameters() == 201 * (176 + 64 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["eps=0"], "method.eps must be above 0.0, got 0"),
        (["eps=inf"], "method.eps must be a finite number, got inf"),
        (
            ["threshold=0.8"],
            "method.threshold is a cosine and needs method.normalize=true; without it balls have radii",
        ),
        (["threshold=1.5", "normalize=true"], "method.threshold must be at most 1.0, got 1.5"),
        (
            ["threshold=0.8", "normalize=true", "same_key=release"],
            "method.threshold needs method.same_key=update; of two balls on one key one is never met",
        ),
        (["label_rule=mean"], "method.label_rule must be 'tokens', 'original' or 'release', got 'mean'"),
        (["same_key=split"], "method.same_key must be 'update' or 'release', got 'split'"),
        (["value_init=hot"], "method.value_init must be 'cold' or 'warm', got 'hot'"),
        (
            ["replacement=last"],
            "method.replacement must be 'replace_last', 'replace_all' or 'replace_prompt', got 'last'",
        ),
        (["decode_lookup=3"], "method.decode_lookup must be true or false, got 3"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_sentence(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(["method=grace", *(f"method.{change}" for change in changes)])
    assert str(caught.value) == message


def test_the_release_differs_in_which_targets_agree_and_in_known_prompts() -> None:
    config, usual = run_config(["method=grace", "compat=release"]).method, run_config(["method=grace"]).method
    assert isinstance(config, GraceConfig)
    assert {name for name, value in config if value != usual[name]} == {"label_rule", "same_key"}
    assert (config.label_rule, config.same_key) == ("release", "release")
