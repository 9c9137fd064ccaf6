"""Which rows may share a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.models.calls import run
from horen_bench.models.padding import length_class, pads_safely, same_logits, together
from horen_bench.prompts import pad

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


class MaskBlind(LlamaForCausalLM):
    """To this model padding is text."""

    def forward(self, input_ids: Tensor, **settings: Any) -> Any:
        return super().forward(input_ids)


class Sparing(LlamaForCausalLM):
    """A model that cannot be run on tokens alone."""

    def forward(self, input_ids: Tensor, **settings: Any) -> Any:
        raise KeyError("pixel_values")


def ready(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False).eval()
    return model


def long_phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES, original_max_position_embeddings=8, max_position_embeddings=64, rope_parameters=dict(LONGROPE)
    )
    model = ready(Phi3ForCausalLM(config))
    for weight in model.parameters():
        weight.mul_(3)
    return model


def test_rows_share_a_batch_where_padding_changes_nothing() -> None:
    model = ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert pads_safely(model)
    assert together(model, [3, 9, 3]) == [[0, 1, 2]]
    assert together(model, []) == []


def test_rows_of_one_length_share_a_batch_where_padding_is_text() -> None:
    model = ready(MaskBlind(LlamaConfig(**SIZES)))
    assert not pads_safely(model)
    assert together(model, [3, 9, 3]) == [[0, 2], [1]]


def test_a_long_row_does_not_change_the_rotation_of_short_ones() -> None:
    model = long_phi3()
    rows = [[5, 6, 7], list(range(5, 25)), [8, 9]]
    assert together(model, [len(row) for row in rows]) == [[0, 2], [1]]
    alone = run(model, pad(rows[:1], 0)).logits[0]
    apart = run(model, pad([rows[0], rows[2]], 0)).logits[0]
    beside = run(model, pad(rows, 0)).logits[0, -3:]
    assert torch.allclose(apart, alone, atol=1e-6)
    assert not torch.allclose(beside, alone, atol=1e-4), "the rotation does not matter here"


@pytest.mark.parametrize(
    ("rope", "classes"),
    [
        (None, [0, 0, 0]),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, [0, 1, 2]),
        ({**LONGROPE, "original_max_position_embeddings": 8}, [0, 1, 1]),
        ({"full_attention": {**LONGROPE, "original_max_position_embeddings": 8}, "sliding_attention": {}}, [0, 1, 1]),
    ],
)
def test_classes_of_length_begin_behind_the_border(rope: dict[str, Any] | None, classes: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8))
    model.config.rope_parameters = rope
    assert [length_class(model, length) for length in (8, 9, 10)] == classes


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="Sparing"):
        pads_safely(ready(Sparing(LlamaConfig(**SIZES))))


@pytest.mark.parametrize("half", [False, True])
def test_a_difference_is_rounding_according_to_the_dtype(half: bool) -> None:
    model = ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
    model = model.bfloat16() if half else model
    logits = torch.tensor([[1.0, 2.0, 3.0]])  # spread 1
    assert same_logits(model, logits + 0.1, logits) is half
    assert same_logits(model, logits + 0.001, logits)
    assert not same_logits(model, logits + 1, logits)
    assert not same_logits(model, logits * torch.nan, logits)
    assert same_logits(model, logits, logits * torch.nan), "what overflows says nothing"
