"""UltraEdit against the published implementation, ha11ucin8/HoReN @38bbf34d4f37a2bb1b24dbef6b8bc1fb5554fbae.

`baselines/ultraedit` holds what that code computed on the reference model (float32, CPU, one thread): ten edits one by
one, and eight in two turns of four. Three modules of two shapes are edited, so that there are two normalisers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.editors.ultraedit.config import UltraEditConfig
from horen_bench.editors.ultraedit.editor import Features, RowStatistics, Shape, UltraEditEditor, closed_form
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.prompts import pad

BASELINES = Path(__file__).parents[2] / "baselines"
WITH_FEATURES = {"sequential": 0, "batched": 1}  # the turn whose rows were kept in the fixture


@dataclass
class Turn:
    """What our run computed in one turn; `changes` are the weights' differences, `(d_in, d_out)`."""

    ids: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    features: list[dict[str, Features]] = field(default_factory=list)
    statistics: dict[Shape, RowStatistics] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A fixture and our run of the same stream."""

    variant: str
    recorded: dict[str, Tensor]
    editor: UltraEditEditor
    records: list[EditRecord]
    turns: list[Turn]
    probes: list[str]


@pytest.fixture(scope="module", params=["sequential", "batched"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Each variant's whole stream, edited once for all tests."""
    folder = BASELINES / "ultraedit" / request.param
    recorded, meta = load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())
    requests = json.loads((BASELINES / "horen" / "requests.json").read_text())
    editor = published_editor(meta["hyperparameters"])
    records: list[EditRecord] = []
    turns: list[Turn] = []
    with pytest.MonkeyPatch.context() as patch:
        watch(editor, turns, patch)
        for ids in meta["data"]["request_ids_per_edit_call"]:
            turns.append(Turn())
            before = {path: weight.clone() for path, weight in editor.pristine.weights.items()}
            records += editor.edit([EditCase(str(i), requests[i]["prompt"], requests[i]["target_new"]) for i in ids])
            turns[-1].changes = {path: (editor.pristine.weights[path] - old).T for path, old in before.items()}
    probes = [item[kind] for item in requests for kind in ("prompt", "rephrase", "locality_prompt")]
    yield Run(request.param, recorded, editor, records, turns, probes)
    editor.detach()


def published_editor(published: dict[str, Any]) -> UltraEditEditor:
    """The editor with the settings that a fixture was recorded under."""
    settings = {
        **run_config(["method=ultraedit", "compat=release"]).method.model_dump(),
        "modules": published["inner_params"],
        "learning_rate": published["lr"],
        "edits_per_turn": published["batch_size"],
        "micro_batch": published["batch_size_once"],
    }
    model = AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval()
    return UltraEditEditor(model, AutoTokenizer.from_pretrained(BASELINES / "model"), UltraEditConfig(**settings))


def watch(editor: UltraEditEditor, turns: list[Turn], patch: pytest.MonkeyPatch) -> None:
    """Note what passes between the editor's steps."""
    batch_features, features = editor.batch_features, editor._features

    def noting_batches(sentences: Any) -> Any:
        loss, rows = batch_features(sentences)
        turns[-1].ids.append(pad([sentence.ids for sentence in sentences], 0).input_ids)
        turns[-1].labels.append(editor._labels(sentences))
        turns[-1].losses.append(loss)
        turns[-1].features.append(rows)
        return loss, rows

    def noting_statistics(sentences: Any) -> Any:
        rows, statistics = features(sentences)
        turns[-1].statistics = statistics
        return rows, statistics

    patch.setattr(editor, "batch_features", noting_batches)
    patch.setattr(editor, "_features", noting_statistics)


def assert_close(ours: Tensor, expected: Tensor, relative: float) -> None:
    """Within a share of the largest element."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=relative * float(expected.abs().max()))


def test_every_case_is_written(run: Run) -> None:
    assert [record.action for record in run.records] == ["inserted"] * len(run.records)
    assert len(run.turns) == {"sequential": 10, "batched": 2}[run.variant]


def test_token_ids_and_labels_of_each_micro_batch_are_equal_in_the_same_order(run: Run) -> None:
    for i, turn in enumerate(run.turns):
        assert len(turn.ids) == {"sequential": 1, "batched": 2}[run.variant]
        for k, (ids, labels) in enumerate(zip(turn.ids, turn.labels, strict=True)):
            assert torch.equal(ids, run.recorded[f"edit{i:02d}/micro{k}/input_ids"])
            assert torch.equal(labels, run.recorded[f"edit{i:02d}/micro{k}/labels"])


def test_losses_agree(run: Run) -> None:
    for i, turn in enumerate(run.turns):
        assert turn.losses == pytest.approx(run.recorded[f"edit{i:02d}/losses"].tolist(), rel=1e-4)


def test_inputs_and_gradients_at_all_attended_tokens_agree(run: Run) -> None:
    i = WITH_FEATURES[run.variant]
    recorded = [
        (kind, run.turns[i].features[int(micro[-1])][path], tensor)
        for name, tensor in run.recorded.items()
        if name.endswith(("/keys", "/values_grad"))
        for _, path, micro, kind in [name.split("/")]
    ]
    assert len(recorded) == {"sequential": 6, "batched": 8}[run.variant]
    for kind, features, expected in recorded:
        assert_close(features.inputs if kind == "keys" else features.gradients, expected, 1e-4)


def test_last_token_has_no_gradient(run: Run) -> None:
    for features in run.turns[0].features[0].values():
        assert features.gradients[-1].abs().max() == 0 < features.gradients[-2].abs().max()


def test_normaliser_agrees_after_every_turn(run: Run) -> None:
    for i, turn in enumerate(run.turns):
        assert len(turn.statistics) == 2
        for shape, statistics in turn.statistics.items():
            recorded = {part: run.recorded[f"edit{i:02d}/normalizer/{shape}/{part}"] for part in ("mean", "var", "std")}
            assert statistics.n == run.recorded[f"edit{i:02d}/normalizer/{shape}/n"].item()
            assert_close(statistics.mean, recorded["mean"], 1e-4)
            assert_close(statistics.spread, recorded["var"], 1e-4)
            assert_close(statistics.deviation, recorded["std"], 1e-4)


def test_closed_form_from_recorded_rows_gives_the_recorded_shift(run: Run) -> None:
    prefix = f"edit{WITH_FEATURES[run.variant]:02d}"
    paths = {name.split("/")[1] for name in run.recorded if name.startswith(prefix) and name.endswith("/keys")}
    assert len(paths) == {"sequential": 3, "batched": 2}[run.variant]
    for path in paths:
        micro = range(len(run.turns[0].ids))
        keys, gradients = (
            torch.cat([run.recorded[f"{prefix}/{path}/micro{k}/{kind}"] for k in micro])
            for kind in ("keys", "values_grad")
        )
        name = f"{prefix}/normalizer/({keys.shape[1]}, {gradients.shape[1]})"
        n, mean, spread = (run.recorded[f"{name}/{part}"] for part in ("n", "mean", "var"))
        shift = closed_form(
            Features(keys, gradients), RowStatistics(int(n), mean, spread), run.editor.config.learning_rate
        )
        assert_close(shift.left.T @ shift.right, run.recorded[f"{prefix}/{path}/param_shift"], 1e-4)


def test_change_of_the_weights_agrees_in_every_turn(run: Run) -> None:
    recorded = {name: tensor for name, tensor in run.recorded.items() if name.endswith("/param_shift")}
    assert len(recorded) == {"sequential": 12, "batched": 2}[run.variant]
    for name, expected in recorded.items():
        edit, path, _ = name.split("/")
        assert_close(run.turns[int(edit[4:])].changes[path], expected, 5e-4)


def test_weights_agree_after_the_last_turn(run: Run) -> None:
    recorded = {name.split("/")[1]: tensor for name, tensor in run.recorded.items() if name.endswith("/weight_after")}
    assert recorded.keys() == run.editor.pristine.weights.keys()
    for path, expected in recorded.items():
        assert_close(run.editor.pristine.weights[path], expected, 5e-4)


def test_edited_model_has_the_recorded_logits_and_generates_the_recorded_tokens(run: Run) -> None:
    rows = run.editor.encoder.prompts(run.probes)
    batch = pad(rows, 0)
    logits = run.editor.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids).logits[:, -1]
    assert_close(logits, run.recorded["post/last_logits"], 1e-3)
    decoded = greedy_decode(run.editor.model, rows, [8] * len(rows), pad_id=0)
    for ours, padded in zip(decoded, run.recorded["post/generations"].tolist(), strict=True):
        expected = [token for token in padded if token >= 0]
        assert ours[: len(expected)] == expected
