"""WISE against the published implementation, ha11ucin8/HoReN @38bbf34d4f37a2bb1b24dbef6b8bc1fb5554fbae.

`baselines/wise` holds what that code computed on the reference model (float32, CPU, one thread, SDPA attention).
Nothing is injected but the contexts, which it had sampled: the gradient masks come out of the same seed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from horen_bench.cases import EditCase, EditRecord, Probe
from horen_bench.config.compose import run_config
from horen_bench.editors.wise import editor as wise_editor
from horen_bench.editors.wise.config import WiseConfig
from horen_bench.editors.wise.editor import WiseEditor
from horen_bench.editors.wise.merging import ties
from horen_bench.editors.wise.routing import Memory, Routed
from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.editors.wise.training import SideEdit, SideTrained, train_sides

BASELINES = Path(__file__).parents[2] / "baselines"
VARIANTS = [("retrieve", "cached"), ("retrieve", "sequential"), ("merge", "cached")]


@dataclass(frozen=True)
class Run:
    """A fixture and our run of the same stream; `after[i]` are the stored weights behind edit `i`."""

    recorded: dict[str, Tensor]
    editor: WiseEditor
    rows: list[TrainingRows]
    masks: list[Tensor]
    trained: list[SideTrained]
    lowest: list[float]
    after: list[list[Memory]]
    records: list[EditRecord]

    def per_edit(self, name: str) -> list[Tensor]:
        return [self.recorded[f"edit{i:02d}/{name}"] for i in range(len(self.records))]


def requests() -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads((BASELINES / "wise" / "requests.json").read_text())
    return items


def fixture_of(variant: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = BASELINES / "wise" / variant
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())


def published_editor(meta: dict[str, Any], engine: Any) -> WiseEditor:
    """The editor with the settings that a fixture was recorded under."""
    values = meta["hyperparameters"]
    recorded = {
        "module": "model.layers.2.mlp.down_proj",
        "retrieve": values["retrieve"],
        "templates": meta["data"]["context_templates"],
        "learning_rate": values["edit_lr"],
        "n_steps": values["n_iter"],
        "act_margin": [values["alpha"], values["beta"], values["gamma"]],
        "act_ratio": values["act_ratio"],
        "mask_ratio": values["mask_ratio"],
        "norm_constraint": values["norm_constraint"],
        "save_freq": values["save_freq"],
        "merge_freq": values["merge_freq"],
        "density": values["densities"],
        "shards_at_once": 1,
        "engine": engine,
    }
    released = run_config(["method=wise", "compat=release"]).method.model_dump()
    return WiseEditor(
        AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(BASELINES / "model"),
        WiseConfig.model_validate({**released, **recorded}),
        seed=42,
    )


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Each variant's whole stream, edited once for all tests."""
    variant, engine = request.param
    recorded, meta = fixture_of(variant)
    editor = published_editor(meta, engine)
    noted = Run(recorded, editor, [], [], [], [], [], [])

    def noting(edits: Sequence[SideEdit], **kwargs: Any) -> list[SideTrained]:
        trained = train_sides(edits, **kwargs)
        noted.rows.extend(edit.rows for edit in edits)
        noted.masks.extend(edit.mask for edit in edits)
        noted.trained.extend(trained)
        noted.lowest.extend(min(editor.weights.lowest, result.activation) for result in trained)
        return trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wise_editor, "train_sides", noting)
        for i, item in enumerate(requests()):
            locality = (Probe(item["locality_prompt"], item["locality_answer"]),)
            noted.records.extend(editor.edit([EditCase(str(i), item["prompt"], item["target_new"], locality=locality)]))
            merged = editor.weights.merged
            noted.after.append([*editor.weights.stored, *([merged] if merged else [])])
    yield noted
    editor.detach()


def relative(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


# --- One function at a time, fed with what was recorded ------------------------------------------------


@pytest.mark.parametrize(("edit", "parts", "merged"), [(3, (0, 1), 0), (7, (1, 2), 1)])
def test_merges_of_recorded_shards_are_the_recorded_ones(edit: int, parts: tuple[int, ...], merged: int) -> None:
    recorded, _ = fixture_of("retrieve")
    base = AutoModelForCausalLM.from_pretrained(BASELINES / "model").model.layers[2].mlp.down_proj.weight.detach()
    shards = [recorded[f"edit{edit:02d}/merge_input{part}"] for part in parts]
    assert torch.equal(ties(shards, base, [0.5, 0.5], 0.53), recorded[f"edit{edit:02d}/memory{merged}"])


def test_merges_into_one_weight_are_the_recorded_ones() -> None:
    recorded, _ = fixture_of("merge")
    base = AutoModelForCausalLM.from_pretrained(BASELINES / "model").model.layers[2].mlp.down_proj.weight.detach()
    first, second = ([recorded[f"edit{edit}/merge_input{i}"] for i in (0, 1)] for edit in ("03", "07"))
    older = recorded["edit03/layer_weight"]
    assert torch.equal(ties(first, base, [0.5, 0.5], 0.53), older)
    assert torch.equal(ties([*second, older], base, [0.2, 0.2, 0.6], 0.53), recorded["edit07/layer_weight"])


# --- The whole stream ----------------------------------------------------------------------------------


def test_training_rows_are_the_recorded_ones(run: Run) -> None:
    if "edit00/labels" not in run.recorded:
        return  # the same in both variants, stored once
    for rows, ids, labels in zip(run.rows, run.per_edit("input_ids"), run.per_edit("labels"), strict=True):
        assert torch.equal(rows.input_ids.int(), ids)
        assert torch.equal(rows.labels.int(), labels[:-1])


def test_gradient_masks_are_the_recorded_ones(run: Run) -> None:
    recorded, _ = fixture_of("retrieve")
    for i, mask in enumerate(run.masks):
        assert torch.equal(mask.flatten().byte(), recorded[f"edit{i - i % 2:02d}/gradient_mask"])


def test_losses_and_steps_agree(run: Run) -> None:
    for i, (trained, losses, steps) in enumerate(
        zip(run.trained, run.per_edit("losses"), run.per_edit("n_steps"), strict=True)
    ):
        ours = torch.tensor(trained.losses)
        assert trained.steps == steps.item() == run.records[i].steps
        torch.testing.assert_close(ours[:10], losses[:10], rtol=1e-4, atol=1e-5)
        assert relative(ours, losses) < 1e-4, i


def test_side_weights_after_each_edit_agree(run: Run) -> None:
    for i, trained in enumerate(run.trained):
        key = f"edit{i:02d}/side_weight_trained"
        if key in run.recorded:
            assert relative(trained.weight, run.recorded[key]) < 1e-4, i


def test_smallest_activations_agree(run: Run) -> None:
    expected = torch.cat(run.per_edit("editing_min_act"))
    torch.testing.assert_close(torch.tensor(run.lowest), expected, rtol=1e-5, atol=0)
    for i, memories in enumerate(run.after):
        key = f"edit{i:02d}/memory_min_act"
        if key in run.recorded:
            lowest = torch.tensor([memory.activation for memory in memories])
            torch.testing.assert_close(lowest, run.recorded[key], rtol=1e-5, atol=0)


def test_merged_weights_agree_but_for_single_elements(run: Run) -> None:
    pairs = {"edit03/memory0": (3, 0), "edit07/memory1": (7, 1), "edit03/layer_weight": (3, 0)}
    for key, (edit, index) in pairs.items():
        if key in run.recorded:
            expected = run.recorded[key]
            far = (run.after[edit][index].weight - expected).abs() > 1e-3 * expected.abs().max()
            assert far.float().mean() < 0.01, key


def probes(kinds: tuple[str, ...]) -> list[str]:
    return [item[kind] for item in requests() for kind in kinds]


def forced_ids(run: Run) -> list[tuple[int, ...]]:
    pairs = [(item[kind], item["target_new"]) for item in requests() for kind in ("prompt", "rephrase")]
    return [run.editor.encoder.edit(*pair).ids for pair in pairs]


def routed(run: Run, ids: list[list[int]] | list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Choices and scores, one sequence a call."""
    decisions: list[Routed] = []

    def respond(inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor:
        decisions.append(run.editor.routed(inputs, outputs, mask))
        return decisions[-1].outputs

    with run.editor.hook.responding(respond):
        for row in ids:
            run.editor.model(torch.tensor([row]))
    choices = torch.cat([decision.choices for decision in decisions])
    return choices, torch.cat([decision.scores for decision in decisions])


@pytest.mark.parametrize("kind", ["probe", "teacher_forced"])
def test_sequences_are_routed_as_recorded(run: Run, kind: str) -> None:
    bare = run.editor.encoder.prompts(probes(("prompt", "rephrase", "locality_prompt")))
    choices, scores = routed(run, bare if kind == "probe" else forced_ids(run))
    expected = run.recorded[f"{kind}/activation"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    thresholds = run.recorded["probe/threshold"][0]
    gaps = (expected - thresholds[None]).abs()
    assert gaps.min() > 5e-4  # no choice hangs on rounding
    assert torch.equal(choices, run.recorded[f"{kind}/choice"])


def test_teacher_forced_predictions_are_the_recorded_ones(run: Run) -> None:
    for row, expected in zip(forced_ids(run), run.recorded["post/teacher_forced_argmax"], strict=True):
        predicted = run.editor.model(torch.tensor([row])).logits[0].argmax(dim=-1)
        assert predicted.tolist() == expected[: len(row)].tolist()


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "nocache"])
def test_generations_are_the_recorded_tokens(run: Run, cache: bool) -> None:
    generate = getattr(run.editor.model, "generate")  # noqa: B009 - its type is not declared
    rows = run.editor.encoder.prompts(probes(("prompt", "rephrase", "locality_prompt")))
    recorded = run.recorded[f"post/generations_{'cache' if cache else 'nocache'}"]
    for i, (row, expected) in enumerate(zip(rows, recorded.tolist(), strict=True)):
        output = generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, use_cache=cache)
        assert output[0, len(row) :].tolist() == [token for token in expected if token != -1], i
