"""UnKE against the published implementation, ha11ucin8/HoReN @38bbf34d4f37a2bb1b24dbef6b8bc1fb5554fbae.

`baselines/unke` holds what that code computed on the reference model (float32, CPU, one thread) with four questions and
answers of a sentence: one by one, with decoder layers that return a tuple (what the code was written for) and as
released, and two at a time.
"""

import json
from collections.abc import Iterator, Sequence
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
from horen_bench.editors.unke.block import BlockTarget
from horen_bench.editors.unke.config import UnkeConfig
from horen_bench.editors.unke.editor import UnkeEditor
from horen_bench.editors.unke.values import TrainedOutputs
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.prompts import EncodedEdit, PromptEncoder

BASELINES = Path(__file__).parents[2] / "baselines"

FIRST, SEQUENCE = 1e-4, 5e-3  # of the largest element, in the first turn and after those before


@dataclass
class Turn:
    """What our run computed in one turn."""

    edits: Sequence[EncodedEdit] = ()
    trained: TrainedOutputs | None = None
    targets: tuple[BlockTarget, ...] = ()
    errors: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A fixture and our run of the same stream."""

    variant: str
    meta: dict[str, Any]
    recorded: dict[str, Tensor]
    editor: UnkeEditor
    records: list[EditRecord]
    turns: list[Turn]


@pytest.fixture(
    scope="module",
    params=[
        ("tuple_layers", "cached"),
        ("tuple_layers", "sequential"),
        ("as_released", "cached"),
        ("tuple_layers_batched", "cached"),
    ],
    ids="-".join,
)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Each variant's whole stream, edited once for all tests."""
    variant, engine = request.param
    folder = BASELINES / "unke" / variant
    recorded, meta = load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())
    editor = published_editor(meta, engine)
    records: list[EditRecord] = []
    turns: list[Turn] = []
    with pytest.MonkeyPatch.context() as patch:
        watch(editor, turns, patch)
        samples, texts = iter(meta["data"]["ex_data_per_edit_call"]), meta["data"]["samples"]
        patch.setattr(editor.texts, "draw", lambda: next(samples))
        patch.setattr(editor.encoder, "edit", lambda *texts: joined_as_released(editor.encoder, *texts))
        for ids in meta["data"]["samples_per_edit_call"]:
            turns.append(Turn())
            records += editor.edit([EditCase(str(i), texts[i]["question"], texts[i]["answer"]) for i in ids])
            turns[-1].weights = {name: parameter.clone() for name, parameter in editor.pristine.weights.items()}
    yield Run(variant, meta, recorded, editor, records, turns)
    editor.detach()


def published_editor(meta: dict[str, Any], engine: str) -> UnkeEditor:
    """The editor with the settings that a fixture was recorded under."""
    published = meta["hyperparameters"]
    released = run_config(["method=unke", "compat=release"]).method.model_dump()
    recorded = {
        "module": f"model.layers.{published['layers'][0]}",
        "value": {
            "n_steps": published["v_num_grad_steps"],
            "learning_rate": published["v_lr"],
            "weight_decay": published["v_weight_decay"],
            "clamp": published["clamp_norm_factor"],
        },
        "block": {**released["block"], "n_steps": published["optim_num_step"], "learning_rate": published["lr"]},
        "preservation": {**released["preservation"], "n_texts": published["ex_data_num"]},
        "batch_size": len(meta["data"]["samples_per_edit_call"][0]),
        "engine": engine,
    }
    if meta["variant"] != "as_released":
        recorded["preserve"] = "correct"
    return UnkeEditor(
        AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(BASELINES / "model"),
        UnkeConfig.model_validate({**released, **recorded}),
    )


def joined_as_released(encoder: PromptEncoder, prompt: str, target: str) -> EncodedEdit:
    """The target tokenised alone, without its BOS, straight behind the prompt."""
    prompt_ids, target_ids = encoder.prompts([prompt, target])
    return EncodedEdit(tuple(prompt_ids), tuple(target_ids[target_ids[0] == encoder.tokenizer.bos_token_id :]))


def watch(editor: UnkeEditor, turns: list[Turn], patch: pytest.MonkeyPatch) -> None:
    """Note what passes between the editor's steps."""
    target_vectors, train = editor._target_vectors, editor._train

    def noting_targets(edits: Sequence[EncodedEdit]) -> TrainedOutputs:
        turns[-1].edits, turns[-1].trained = edits, target_vectors(edits)
        return turns[-1].trained

    def noting_errors(trainees: Any, targets: Any) -> Tensor:
        turns[-1].targets, turns[-1].errors = targets, train(trainees, targets)
        return turns[-1].errors

    patch.setattr(editor, "_target_vectors", noting_targets)
    patch.setattr(editor, "_train", noting_errors)


def assert_close(ours: Tensor, expected: Tensor, relative: float) -> None:
    """Within a share of the largest element."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=relative * float(expected.abs().max()))


def per_edit(run: Run) -> list[tuple[Turn, int, str]]:
    """Each edit's turn, its row there, and where its numbers are in the fixture."""
    return [(turn, row, f"edit{i:02d}/z{row}") for i, turn in enumerate(run.turns) for row in range(len(turn.edits))]


def test_every_case_is_written(run: Run) -> None:
    assert [record.action for record in run.records] == ["inserted"] * 4
    assert len(run.turns) == (2 if run.variant == "tuple_layers_batched" else 4)


def test_token_ids_are_equal(run: Run) -> None:
    assert len(per_edit(run)) == 4
    for turn, row, name in per_edit(run):
        assert list(turn.edits[row].ids[:-1]) == run.recorded[f"{name}/input_ids"][0].tolist()
    for i, (turn, texts) in enumerate(zip(run.turns, run.meta["data"]["ex_data_per_edit_call"], strict=True)):
        preserved = run.editor.encoder.prompts(texts)
        for ids, expected in zip(preserved, run.recorded[f"edit{i:02d}/ex/input_ids"].tolist(), strict=True):
            assert expected == ids + [0] * (len(expected) - len(ids))
        assert turn.targets[0].mask.sum(dim=1).tolist() == [len(ids) for ids in preserved]


def test_target_vectors_and_their_losses_agree(run: Run) -> None:
    for turn, row, name in per_edit(run):
        assert turn.trained is not None
        losses = run.recorded[f"{name}/losses"][:, 1]
        assert_close(turn.trained.losses[:, row], losses, FIRST)
        assert_close(turn.trained.vectors[row], run.recorded[f"{name}/z"], 1e-3)


def test_what_enters_the_block_and_what_must_come_out_agree_in_the_first_turn(run: Run) -> None:
    preserved, prompts = run.turns[0].targets
    assert_close(prompts.args[0], run.recorded["edit00/layer_in"], 1e-5)
    if run.variant == "tuple_layers":
        assert_close(preserved.outputs, run.recorded["edit00/stat_out"], 1e-5)
    for row, edit in enumerate(run.turns[0].edits):
        vector = prompts.outputs[row, len(edit.prompt) - 1]
        assert_close(vector, run.recorded[f"edit00/z{row}/z"], 1e-3)


def test_errors_of_the_block_agree_at_every_step(run: Run) -> None:
    for i, turn in enumerate(run.turns):
        expected = run.recorded[f"edit{i:02d}/optim_losses"]
        assert turn.errors.shape == expected.shape == (25, 2)
        for column in (0, 1):
            assert_close(turn.errors[:, column], expected[:, column], FIRST if i == 0 else 1e-3)


def test_parameters_agree_after_every_turn(run: Run) -> None:
    recorded = {name: tensor for name, tensor in run.recorded.items() if "/after/" in name}
    assert len(recorded) == {"tuple_layers": 22, "as_released": 17, "tuple_layers_batched": 9}[run.variant]
    for name, expected in recorded.items():
        edit, _, parameter = name.split("/")
        i = int(edit[4:])
        assert_close(run.turns[i].weights[parameter], expected, FIRST if i == 0 else SEQUENCE)


def test_edited_model_generates_the_recorded_tokens(run: Run) -> None:
    texts = [sample[kind] for sample in run.meta["data"]["samples"] for kind in ("question", "para_question")]
    rows = run.editor.encoder.prompts(texts)
    decoded = greedy_decode(run.editor.model, rows, [24] * len(rows), pad_id=0)
    for ids, expected in zip(decoded, run.recorded["post/generations"].tolist(), strict=True):
        recorded = [token for token in expected if token >= 0]
        assert list(ids[: len(recorded)]) == recorded
