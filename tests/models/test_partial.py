"""The layers above one module on cached states against the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from horen_bench.models.partial import FastPath, NotSupportedError, UpperLayers
from horen_bench.prompts import EncodedEdit

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def _qwen2() -> PreTrainedModel:
    sizes = {key: value for key, value in _SIZES.items() if key != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES))


def _gpt_oss() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    return GptOssForCausalLM(GptOssConfig(**_SIZES, **experts))


# Prompts longer and shorter than each other and than GPT-OSS's window, targets of one to four tokens.
_EDITS = [
    EncodedEdit((1, 2, 3, 4, 5, 6, 7), (8, 9)),
    EncodedEdit((10,), (11,)),
    EncodedEdit((12, 13, 14), (15, 16, 17, 18)),
]


def _whole_model_loss(model: PreTrainedModel, module: str, edit: EncodedEdit, added: Tensor) -> Tensor:
    last = len(edit.prompt) - 1

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :last], (output[:, last] + added)[:, None], output[:, last + 1 :]], dim=1)

    handle = model.get_submodule(module).register_forward_hook(add)
    try:
        logits = model(torch.tensor([edit.ids]), use_cache=False).logits[0, last:-1]
    finally:
        handle.remove()
    return F.cross_entropy(logits, torch.tensor(edit.target))


@pytest.mark.parametrize(
    ("build", "module", "ends_layer"),
    [
        pytest.param(_llama, "model.layers.1.mlp.down_proj", True, id="llama"),
        pytest.param(_llama, "model.layers.3.mlp.down_proj", True, id="llama-last-layer"),
        pytest.param(_qwen2, "model.layers.2.mlp.down_proj", True, id="qwen2"),
        pytest.param(_qwen3, "model.layers.2.mlp.down_proj", True, id="qwen3"),
        pytest.param(_gpt_oss, "model.layers.1.self_attn.o_proj", False, id="gpt-oss-sliding-first"),
        pytest.param(_gpt_oss, "model.layers.2.self_attn.o_proj", False, id="gpt-oss-full-first"),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_model(
    build: Callable[[], PreTrainedModel], module: str, ends_layer: bool
) -> None:
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    upper = UpperLayers(model, module)
    assert upper.module_ends_layer is ends_layer
    added = torch.randn(len(_EDITS), 32, requires_grad=True)
    losses = upper.losses(upper.prepare(_EDITS), added)
    (gradient,) = torch.autograd.grad(losses.sum(), added)
    for row, edit in enumerate(_EDITS):
        expected = _whole_model_loss(model, module, edit, added[row])
        (expected_gradient,) = torch.autograd.grad(expected, added)
        torch.testing.assert_close(losses[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[row], expected_gradient[row], rtol=1e-4, atol=1e-7)


def test_states_of_some_edits_joined_with_others_give_the_same_losses() -> None:
    torch.manual_seed(0)
    model = _llama().eval().requires_grad_(False)
    upper = UpperLayers(model, "model.layers.1.mlp.down_proj")
    added = torch.randn(3, 32)
    together = upper.losses(upper.prepare(_EDITS), added)
    single = upper.prepare(_EDITS).select(torch.tensor([1]))
    assert single.prefix_mask.shape[1] == 0, "a prompt of single token has no prefix to keep"
    assert single.hidden.shape[1] == 1, "a target of single token needs single position"
    joined = single.joined(upper.prepare([_EDITS[2], _EDITS[0]]))
    torch.testing.assert_close(upper.losses(joined, added[[1, 2, 0]]), together[[1, 2, 0]])


def test_a_decoder_of_another_layout_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(NotSupportedError, match=r"GPT2LMHeadModel has no decoder\.layers with a head"):
        UpperLayers(model, "transformer.h.0.mlp.c_proj")


def test_a_decoder_that_treats_given_embeddings_specially_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama().eval()
    plain = LlamaModel.forward

    def scaled(self: LlamaModel, inputs_embeds: Tensor | None = None, **kwargs: object) -> object:
        return plain(self, inputs_embeds=None if inputs_embeds is None else 3 * inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    with pytest.raises(NotSupportedError, match="gives other logits from its upper layers alone"):
        UpperLayers(model, "model.layers.1.mlp.down_proj")


def _refuse() -> UpperLayers:
    raise NotSupportedError("odd layout")


def test_the_fast_path_makes_its_layers_once() -> None:
    model = _llama().eval()
    made: list[UpperLayers] = []

    def make() -> UpperLayers:
        made.append(UpperLayers(model, "model.layers.1.mlp.down_proj"))
        return made[-1]

    path = FastPath(make, "all was slow")
    assert made == []
    assert path.layers() is path.layers() is made[0]
    assert len(made) == 1
    assert path.warnings() == []


def test_a_fast_path_that_does_not_fit_or_is_given_up_says_why() -> None:
    refused, given_up = FastPath(_refuse, "all was slow"), FastPath(_llama_layers, "all was slow")
    given_up.give_up("no need")
    assert (refused.layers(), given_up.layers()) == (None, None)
    assert refused.warnings() == ["all was slow: odd layout"]
    assert given_up.warnings() == ["all was slow: no need"]


def test_a_fast_path_that_is_not_wanted_is_not_tried_and_says_nothing() -> None:
    path = FastPath(_refuse, "all was slow", wanted=False)
    assert path.layers() is None
    assert path.warnings() == []


def test_a_module_in_no_numbered_layer_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="lm_head is in no numbered layer"):
        UpperLayers(_llama(), "lm_head")


def _llama_layers() -> UpperLayers:
    return UpperLayers(_llama().eval(), "model.layers.1.mlp.down_proj")
