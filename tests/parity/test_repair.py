"""REPAIR in `mode=released` against the published code, sci-m-wang/REPAIR @a4e4e0897d1ecf2baea8e16fdf4209be2a2a12d9.

`baselines/repair` holds what its file with the distillation computed on the reference model (float32, CPU, one
thread, SDPA attention). The contexts are injected; masks come out of the same seed. Without distillation the same
file computed what `baselines/wise/retrieve` holds, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from horen_bench.cases import EditCase, Probe
from horen_bench.config.compose import run_config
from horen_bench.editors.wise import compat
from horen_bench.editors.wise import editor as wise_editor
from horen_bench.editors.wise.config import RepairConfig
from horen_bench.editors.wise.distillation import divergence
from horen_bench.editors.wise.repair import RepairEditor
from horen_bench.editors.wise.training import SideTrained, train_sides

BASELINES = Path(__file__).parents[2] / "baselines"


def published_editor(meta: dict[str, Any]) -> RepairEditor:
    """The editor with the settings that the fixture was recorded under."""
    values = meta["hyperparameters"]
    released = run_config(["method=repair", "compat=release"]).method.model_dump()
    side = {
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
        "engine": "sequential",
    }
    recorded = {
        "module": "model.layers.2.mlp.down_proj",
        "act_weight": 1.0,
        "distill": "logit",
        "distill_lambda": values["lamda"],
        "temperature": values["temperature"],
        "side": {**released["side"], **side},
    }
    return RepairEditor(
        AutoModelForCausalLM.from_pretrained(BASELINES / "model").requires_grad_(False).eval(),
        AutoTokenizer.from_pretrained(BASELINES / "model"),
        RepairConfig.model_validate({**released, **recorded}),
        seed=42,
    )


def relative(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


def test_the_released_stream_is_the_recorded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = BASELINES / "repair" / "distill"
    recorded, meta = load_file(folder / "tensors.safetensors"), json.loads((folder / "meta.json").read_text())
    requests: list[dict[str, Any]] = json.loads((BASELINES / "repair" / "requests.json").read_text())
    editor = published_editor(meta)
    trained: list[SideTrained] = []
    terms: list[float] = []

    def noting(*args: Any, **kwargs: Any) -> list[SideTrained]:
        results = train_sides(*args, **kwargs)
        trained.extend(results)
        return results

    def noting_terms(*args: Any) -> Tensor:
        terms.append(plain(*args).item())
        return plain(*args)

    plain = divergence
    monkeypatch.setattr(wise_editor, "train_sides", noting)
    monkeypatch.setattr(compat, "divergence", noting_terms)
    for i, item in enumerate(requests):
        terms.clear()
        locality = (Probe(item["locality_prompt"], item["locality_answer"]),)
        editor.edit([EditCase(str(i), item["prompt"], item["target_new"], locality=locality)])
        losses, name = recorded[f"edit{i:02d}/losses"], f"edit{i:02d}"
        assert relative(torch.tensor(trained[i].losses), losses[:, :2]) < 1e-4, i
        expected = losses[:, 3] / editor.config.distill_lambda
        if terms:
            torch.testing.assert_close(torch.tensor(terms), expected, rtol=1e-4, atol=1e-4)
        else:
            assert expected.abs().max() < 1e-4
        assert relative(trained[i].weight, recorded[f"{name}/side_weight_trained"]) < 1e-4, i
        assert editor.released is not None
        assert (editor.released.teacher is not None) == bool(recorded[f"{name}/teacher_present_after"].item())
        if f"{name}/memory_min_act" in recorded:
            lowest = torch.tensor([memory.activation for memory in editor.weights.stored])
            torch.testing.assert_close(lowest, recorded[f"{name}/memory_min_act"], rtol=1e-5, atol=0)
    choices: list[int] = []

    def respond(inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor:
        done = editor.routed(inputs, outputs, mask)
        choices.extend(done.choices.tolist())
        return done.outputs

    prompts = [item[kind] for item in requests for kind in ("prompt", "rephrase", "locality_prompt")]
    with editor.hook.responding(respond):
        for row in editor.encoder.prompts(prompts):
            editor.model(torch.tensor([row]))
    # The recording numbers memories from 0 and says -2 for everything else.
    assert [choice - 1 if choice >= 1 else -2 for choice in choices] == recorded["probe/choice"].tolist()
