"""ROME against the published implementation, ha11ucin8/HoReN @38bbf34d4f37a2bb1b24dbef6b8bc1fb5554fbae.

`baselines/rome` holds what that code computed on the reference model (float32, CPU, one thread); its contexts, which
were sampled, are injected. Each stream is edited once by either engine, `sequential` under `compat=release`.
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
from horen_bench.editors.locate_edit.requests import request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import PerturbedModel, TargetVectors
from horen_bench.editors.rome.config import RomeConfig
from horen_bench.editors.rome.editor import RomeEditor
from horen_bench.editors.shared.second_moments import second_moments
from horen_bench.evaluation.decoding import greedy_decode

BASELINES = Path(__file__).parents[2] / "baselines"
MODULE = "model.layers.1.mlp.down_proj"
VARIANTS = [("cov32", "sequential"), ("cov32", "cached"), ("nocov", "sequential"), ("nocov", "cached")]


@dataclass
class Run:
    recorded: dict[str, Tensor]
    editor: RomeEditor
    requests: list[dict[str, Any]]
    records: list[EditRecord] = field(default_factory=list)
    models: list[PerturbedModel] = field(default_factory=list)
    vectors: list[TargetVectors] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def per_edit(self, name: str) -> list[tuple[int, Tensor]]:
        keys = [(i, f"edit{i:02d}/{name}") for i in range(len(self.requests))]
        return [(i, self.recorded[key]) for i, key in keys if key in self.recorded]


def case_of(i: int, item: dict[str, Any]) -> EditCase:
    return EditCase(str(i), item["prompt"], item["target_new"], item["subject"])


def relative(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


def published_editor(meta: dict[str, Any], engine: str, folder: Path) -> RomeEditor:
    published = meta["hyperparameters"]
    settings = {
        **run_config(["method=rome", f"compat={'release' if engine == 'sequential' else 'none'}"]).method.model_dump(),
        "module": MODULE,
        "hidden": {
            "n_steps": published["v_num_grad_steps"],
            "learning_rate": published["v_lr"],
            "weight_decay": published["v_weight_decay"],
            "clamp": published["clamp_norm_factor"],
            "kl": published["kl_factor"],
        },
        "covariance": published["mom2_adjustment"],
        "statistics": {
            "corpus": str(BASELINES / "rome" / "stats_texts.json"),
            "n_texts": published["mom2_n_samples"],
            "max_length": 128,
            "folder": str(folder),
        },
        "contexts": [[text.removesuffix("{}") for text in meta["data"]["context_templates"]]],
        "engine": engine,
    }
    model = AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval()
    return RomeEditor(model, AutoTokenizer.from_pretrained(BASELINES / "model"), RomeConfig(**settings))


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    variant, engine = request.param
    folder = BASELINES / "rome" / variant
    meta = json.loads((folder / "meta.json").read_text())
    requests = json.loads((BASELINES / "rome" / "requests.json").read_text())
    editor = published_editor(meta, engine, tmp_path_factory.mktemp("statistics"))
    stream = Run(load_file(folder / "tensors.safetensors"), editor, requests)
    write = editor._write

    def noting(rows: Any, model: PerturbedModel, vectors: TargetVectors) -> None:
        stream.models.append(model)
        stream.vectors.append(vectors)
        write(rows, model, vectors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editor, "_write", noting)
        for i, item in enumerate(requests):
            stream.records += editor.edit([case_of(i, item)])
            stream.weights.append(editor.pristine.weights[MODULE].detach().clone())
    yield stream
    editor.detach()


def test_every_request_is_written(run: Run) -> None:
    assert [record.problem for record in run.records] == [None] * len(run.requests)


def test_second_moment_is_the_recorded_one(run: Run) -> None:
    if not run.editor.config.covariance:
        pytest.skip("recorded without covariance")
    editor = run.editor
    editor.detach()
    moment = second_moments(editor.model, editor.encoder, [MODULE], editor.config.statistics)[MODULE]
    with torch.no_grad():
        editor.pristine.weights[MODULE].copy_(run.weights[-1])
    assert moment.n_tokens == run.recorded["mom2_count"].item()
    assert relative(moment.mean, run.recorded["mom2_moment"]) < 1e-5


def test_rows_hold_the_recorded_tokens(run: Run) -> None:
    encoder, contexts = run.editor.encoder, run.editor.contexts
    assert contexts is not None
    order = list(contexts.shares())
    for i, ids in run.per_edit("v_input_ids"):
        rows = rows_of(encoder, [request_of(encoder, case_of(i, run.requests[i]))], contexts)
        place = [order.index(text) for text in contexts.groups[0]] + [len(order)]
        at, labels = run.recorded[f"edit{i:02d}/lookup_idxs"], run.recorded[f"edit{i:02d}/v_rewriting_targets"]
        for j, row in enumerate(rows[k] for k in place):
            assert list(row.ids) == ids[j, : len(row.ids)].tolist()
            assert row.subject == at[j].item()
            if row.labels:
                assert list(row.labels) == [label for label in labels[j].tolist() if label != -100]


def test_keys_and_directions_agree(run: Run) -> None:
    for i, key in run.per_edit("mean_key"):
        assert relative(run.models[i].keys[MODULE][0], key) < 1e-5
        assert relative(run.models[i].prompt_keys[MODULE][0], run.recorded[f"edit{i:02d}/cur_input"]) < 1e-5
        u = run.recorded[f"edit{i:02d}/left_vector_u"]
        assert relative(run.editor.direction(key), u) < 1e-4


def test_losses_agree_step_by_step(run: Run) -> None:
    for i, losses in run.per_edit("losses"):
        ours = torch.tensor(run.vectors[i].losses[0])
        assert len(ours) == len(losses)
        torch.testing.assert_close(ours[:10], losses[:10], rtol=1e-3, atol=1e-5)
        assert relative(ours, losses) < 5e-3, i


def test_values_and_weights_agree_after_every_edit(run: Run) -> None:
    for i, delta in run.per_edit("delta_v"):
        assert relative(run.vectors[i].initial[0], run.recorded[f"edit{i:02d}/target_init"]) < 5e-3
        assert relative(run.vectors[i].delta[0], delta) < 5e-3
    for i, weight in run.per_edit("weight_after"):
        assert relative(run.weights[i], weight) < 5e-3, i


def test_generations_are_the_recorded_tokens(run: Run) -> None:
    prompts = [item[kind] for item in run.requests for kind in ("prompt", "rephrase", "locality_prompt")]
    rows = run.editor.encoder.prompts(prompts)
    last = torch.stack([run.editor.model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert relative(last, run.recorded["post/last_logits"]) < 5e-3
    expected = [[token for token in row if token != -1] for row in run.recorded["post/generations"].tolist()]
    decoded = greedy_decode(run.editor.model, rows, [8] * len(rows), pad_id=0)
    assert [row[: len(end)] for row, end in zip(decoded, expected, strict=True)] == expected
