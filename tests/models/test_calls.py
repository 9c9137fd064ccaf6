"""Models are called by keyword: what stands second is the mask in one architecture, the cache in the next."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from horen_bench.models.calls import run, takes
from horen_bench.prompts import pad

SOURCES = sorted((Path(__file__).parents[2] / "src" / "horen_bench").rglob("*.py"))
A_MODEL = re.compile(r"_?(model|decoder|upper)")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},  # the cache stands second
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},  # no positions
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # neither
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=50, **SIZES[kind]))
    model.requires_grad_(False)
    model.eval()
    return model


def calls_by_position(source: str) -> list[int]:
    """Lines on which something that is named like a model is called with a positional argument."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    names = {node.lineno: getattr(node.func, "attr", getattr(node.func, "id", "")) for node in calls}
    return [line for line, name in names.items() if A_MODEL.fullmatch(name)]


def test_no_model_is_called_by_position() -> None:
    assert calls_by_position("model(batch.input_ids, batch.attention_mask)\nself._model(ids)\nrun(model, batch)") == [
        1,
        2,
    ]
    found = {str(path): lines for path in SOURCES if (lines := calls_by_position(path.read_text(encoding="utf-8")))}
    assert found == {}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_padded_batch_gets_the_logits_that_it_gets_alone(kind: str, side: Any) -> None:
    model, rows = made(kind), [[5, 6, 7, 8], [9, 10]]
    batch = pad(rows, 0, side)
    logits = run(model, batch).logits[batch.attention_mask.bool()].split([4, 2])
    for of_row, row in zip(logits, rows, strict=True):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(of_row, alone, rtol=1e-3, atol=1e-4)


def test_a_decoder_is_called_like_its_model_and_takes_what_is_said_besides() -> None:
    model = made("gpt2")
    batch = pad([[5, 6, 7]], 0)
    hidden = run(model.get_decoder(), batch).last_hidden_state
    head: Any = model.get_output_embeddings()
    assert torch.equal(run(model, batch, logits_to_keep=1).logits, head(hidden[:, -1:]))


def test_arguments_that_only_disappear_in_kwargs_do_not_count() -> None:
    class Swallowing(nn.Module):
        def forward(self, input_ids: Any, **kwargs: Any) -> None: ...

    assert takes(Swallowing(), "input_ids") and not takes(Swallowing(), "position_ids")
    assert takes(made("gpt2"), "position_ids") and not takes(made("bloom"), "position_ids")
