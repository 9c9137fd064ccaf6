"""MEMIT and AlphaEdit against the published code, ha11ucin8/HoReN @38bbf34d4f37a2bb1b24dbef6b8bc1fb5554fbae.

`baselines/memit` and `baselines/alphaedit` hold what that code computed on the reference model (float32, CPU, one
thread); its contexts, which were sampled, are injected. Each stream is edited once, by both engines: one request per
turn, and five. Of square matrices the first rows were kept.
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
from horen_bench.editors.alphaedit.editor import AlphaEditEditor
from horen_bench.editors.locate_edit.requests import request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import PerturbedModel, TargetVectors
from horen_bench.editors.locate_edit.window import WindowEditor
from horen_bench.editors.shared.second_moments import SecondMoment, second_moments
from horen_bench.evaluation.decoding import greedy_decode

BASELINES = Path(__file__).parents[2] / "baselines"
MODULES = {1: "model.layers.1.mlp.down_proj", 2: "model.layers.2.mlp.down_proj"}
METHODS = ("memit", "alphaedit")
SIZES = ("sequential", "batched")
VARIANTS = [(method, size, engine) for method in METHODS for size in SIZES for engine in ("sequential", "cached")]


@dataclass
class Written:
    """What one turn wrote to one layer."""

    path: str
    keys: Tensor
    residual: Tensor
    update: Tensor


@dataclass
class Run:
    method: str
    recorded: dict[str, Tensor]
    calls: list[list[int]]
    editor: WindowEditor[Any]
    requests: list[dict[str, Any]]
    records: list[EditRecord] = field(default_factory=list)
    vectors: list[TargetVectors] = field(default_factory=list)
    written: list[list[Written]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    moments: list[list[Tensor]] = field(default_factory=list)

    def turns(self, name: str) -> list[tuple[int, Tensor]]:
        """A recorded tensor of every turn that has it."""
        keys = [(i, f"edit{i:02d}/{name}") for i in range(len(self.calls))]
        return [(i, self.recorded[key]) for i, key in keys if key in self.recorded]


def case_of(i: int, item: dict[str, Any]) -> EditCase:
    return EditCase(str(i), item["prompt"], item["target_new"], item["subject"])


def relative(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


def published_editor(method: str, meta: dict[str, Any], engine: str, folder: Path) -> WindowEditor[Any]:
    published, groups = meta["hyperparameters"], meta["data"]["context_templates"]
    config = run_config([f"method={method}", "compat=release"]).method
    own = {
        "memit": {"moment_weight": published.get("mom2_update_weight")},
        "alphaedit": {"nullspace_threshold": published.get("nullspace_threshold"), "l2": published.get("L2")},
    }
    settings = {
        **config.model_dump(),
        **own[method],
        "modules": list(MODULES.values()),
        "hidden": {
            "n_steps": published["v_num_grad_steps"],
            "learning_rate": published["v_lr"],
            "weight_decay": published["v_weight_decay"],
            "clamp": published["clamp_norm_factor"],
            "kl": published["kl_factor"],
        },
        "statistics": {
            "corpus": str(BASELINES / "rome" / "stats_texts.json"),
            "n_texts": published["mom2_n_samples"],
            "max_length": 128,
            "folder": str(folder),
        },
        "contexts": [[text.removesuffix("{}") for text in group] for group in groups],
        "batch_size": len(meta["data"]["request_ids_per_edit_call"][0]),
        "engine": engine,
    }
    model = AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASELINES / "model")
    editor: WindowEditor[Any] = config.editor_class()(model, tokenizer, type(config)(**settings))
    return editor


@pytest.fixture(scope="module")
def moment_of_layer_1() -> Tensor:
    """As the published code computed it; ROME, MEMIT and AlphaEdit have the same."""
    return load_file(BASELINES / "rome" / "cov32" / "tensors.safetensors")["mom2_moment"]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, moment_of_layer_1: Tensor
) -> Iterator[Run]:
    method, size, engine = request.param
    folder = BASELINES / method / size
    meta = json.loads((folder / "meta.json").read_text())
    requests = json.loads((BASELINES / method / "requests.json").read_text())
    editor = published_editor(method, meta, engine, tmp_path_factory.mktemp("statistics"))
    calls = meta["data"]["request_ids_per_edit_call"]
    stream = Run(method, load_file(folder / "tensors.safetensors"), calls, editor, requests)
    write, update = editor._write, editor._update

    def noting(rows: Any, model: PerturbedModel, vectors: TargetVectors) -> None:
        stream.vectors.append(vectors)
        stream.written.append([])
        write(rows, model, vectors)

    def noting_update(path: str, keys: Tensor, residual: Tensor) -> Tensor:
        change = update(path, keys, residual)
        stream.written[-1].append(Written(path, keys, residual, change))
        return change

    with pytest.MonkeyPatch.context() as patch:
        if method == "memit":
            # The published code estimated layer 2's moment at its first use, after layer 1 was changed (CARD.md).
            means = {MODULES[1]: moment_of_layer_1, MODULES[2]: stream.recorded[f"cov/{MODULES[2]}"]}
            moments = {path: SecondMoment(mean, 1) for path, mean in means.items()}
            patch.setattr(editor, "_moments", lambda: moments)
        patch.setattr(editor, "_write", noting)
        patch.setattr(editor, "_update", noting_update)
        for ids in calls:
            stream.records += editor.edit([case_of(i, requests[i]) for i in ids])
            stream.weights.append({path: weight.detach().clone() for path, weight in editor.pristine.weights.items()})
    yield stream
    editor.detach()


@pytest.fixture
def alphaedit(run: Run) -> AlphaEditEditor:
    """The editor of a run of AlphaEdit."""
    if not isinstance(run.editor, AlphaEditEditor):
        pytest.skip("MEMIT has neither null space nor memory")
    return run.editor


def test_every_request_is_written(run: Run) -> None:
    assert [record.problem for record in run.records] == [None] * len(run.requests)


def test_second_moments_are_the_recorded_ones(run: Run, moment_of_layer_1: Tensor) -> None:
    """MEMIT's of layer 1 only; its recorded one of layer 2 was estimated on an edited model."""
    editor = run.editor
    fresh = AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False)
    moments = second_moments(fresh, editor.encoder, editor.config.modules, editor.config.statistics)
    assert relative(moments[MODULES[1]].mean, moment_of_layer_1) < 1e-5
    if run.method == "alphaedit":
        rows = recorded_projectors()[f"cov/{MODULES[2]}"]
        assert relative(moments[MODULES[2]].mean[: len(rows)], rows) < 1e-5


def recorded_projectors() -> dict[str, Tensor]:
    return load_file(BASELINES / "alphaedit" / "sequential" / "tensors.safetensors")


def test_projectors_are_the_recorded_ones(alphaedit: AlphaEditEditor) -> None:
    recorded = recorded_projectors()
    for i, path in enumerate(MODULES.values()):
        space, rows = alphaedit.memory[path].space, recorded["P"][i]
        assert space.rank == recorded["P_rank"][i].item()
        torch.testing.assert_close(space.matrix()[: len(rows)], rows, rtol=0, atol=1e-5)


def test_rows_hold_the_recorded_tokens(run: Run) -> None:
    encoder, contexts = run.editor.encoder, run.editor.contexts
    assert contexts is not None
    for k, i in enumerate(run.calls[0]):
        ids, at = run.recorded[f"edit00/z{k}/input_ids"], run.recorded[f"edit00/z{k}/lookup_idxs"]
        labels = run.recorded[f"edit00/z{k}/rewriting_targets"]
        rows = rows_of(encoder, [request_of(encoder, case_of(i, run.requests[i]))], contexts)
        assert len(rows) == len(ids)
        for j, row in enumerate(rows):
            assert list(row.ids) == ids[j, : len(row.ids)].tolist()
            assert row.subject == at[j].item()
            if row.labels:
                assert list(row.labels) == [label for label in labels[j].tolist() if label != -100]


def test_target_vectors_and_their_losses_agree(run: Run) -> None:
    for i, ids in enumerate(run.calls):
        for k in range(len(ids)):
            recorded = {
                name: run.recorded[f"edit{i:02d}/z{k}/{name}"] for name in ("target_init", "delta", "z", "losses")
            }
            vectors = run.vectors[i]
            assert relative(vectors.initial[k], recorded["target_init"]) < 1e-3
            assert relative(vectors.delta[k], recorded["delta"]) < 1e-3
            assert relative(vectors.target[k], recorded["z"]) < 1e-3
            ours = torch.tensor(vectors.losses[k])
            assert ours.shape == recorded["losses"].shape
            assert relative(ours, recorded["losses"]) < 1e-3


def test_keys_residuals_and_updates_agree(run: Run) -> None:
    for layer, path in MODULES.items():
        for i, keys in run.turns(f"layer{layer}/ks"):
            (written,) = [change for change in run.written[i] if change.path == path]
            assert relative(written.keys.T, keys) < 1e-3
            assert relative(written.residual.T, run.recorded[f"edit{i:02d}/layer{layer}/resid"]) < 1e-3
        for i, update in run.turns(f"layer{layer}/upd_matrix"):
            (written,) = [change for change in run.written[i] if change.path == path]
            assert relative(written.update, update) < 1e-3


def test_weights_agree(run: Run) -> None:
    for path in MODULES.values():
        compared = run.turns(f"weight_after/{path}.weight")
        assert compared[-1][0] == len(run.calls) - 1
        for i, weight in compared:
            assert relative(run.weights[i][path], weight) < 1e-3


def test_key_memory_agrees(run: Run, alphaedit: AlphaEditEditor) -> None:
    ((last, moments),) = run.turns("cache_c_after")
    assert last == len(run.calls) - 1
    for path, rows in zip(MODULES.values(), moments, strict=True):
        assert relative(alphaedit.memory[path].moment()[: len(rows)], rows) < 1e-3


def test_generations_are_the_recorded_tokens(run: Run) -> None:
    prompts = [item[kind] for item in run.requests for kind in ("prompt", "rephrase", "locality_prompt")]
    rows = run.editor.encoder.prompts(prompts)
    last = torch.stack([run.editor.model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert relative(last, run.recorded["post/last_logits"]) < 1e-3
    expected = [[token for token in row if token != -1] for row in run.recorded["post/generations"].tolist()]
    decoded = greedy_decode(run.editor.model, rows, [8] * len(rows), pad_id=0)
    assert [row[: len(end)] for row, end in zip(decoded, expected, strict=True)] == expected
