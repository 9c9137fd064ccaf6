"""The layers above one module on cached states against the whole model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.models.hooks import as_sequences
from horen_bench.models.partial import FastPath, NotSupportedError, UpperLayers
from horen_bench.prompts import EncodedEdit

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_GPT: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 4}
_TINY_EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}
_BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4}


def _sizes_without(*names: str, **more: Any) -> dict[str, Any]:
    return {**{name: value for name, value in _SIZES.items() if name not in names}, **more}


def _random(kind: str, **sizes: Any) -> PreTrainedModel:
    """A frozen model with weights so large that its layers and its head's scale or cap make a difference."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    model.eval().requires_grad_(False)
    return model


def _llama() -> PreTrainedModel:
    return _random("llama", **_SIZES)


# Prompts longer and shorter than each other and than the windows of 4, targets of one to four tokens.
_EDITS = [
    EncodedEdit((1, 2, 3, 4, 5, 6, 7, 21, 22, 23, 24, 25), (8, 9)),
    EncodedEdit((10,), (11,)),
    EncodedEdit((12, 13, 14), (15, 16, 17, 18)),
]


def _whole_model_loss(model: PreTrainedModel, module: str, edit: EncodedEdit, added: Tensor) -> Tensor:
    last = len(edit.prompt) - 1

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        tokens = output.reshape(-1, output.shape[-1])  # of a single sequence, so OPT's list is the same
        return torch.cat([tokens[:last], (tokens[last] + added)[None], tokens[last + 1 :]]).view_as(output)

    handle = model.get_submodule(module).register_forward_hook(add)
    try:
        logits = model(input_ids=torch.tensor([edit.ids]), use_cache=False).logits[0, last:-1]
    finally:
        handle.remove()
    return F.cross_entropy(logits, torch.tensor(edit.target))


def _own_output(model: PreTrainedModel, module: str, edit: EncodedEdit) -> Tensor:
    """The module's output `(d,)` at the last prompt token, copied before its layer goes on."""
    outputs: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    with hook:
        model(input_ids=torch.tensor([edit.prompt]), use_cache=False)
    return outputs[0].reshape(-1, outputs[0].shape[-1])[-1]


_LLAMA_LIKE = "model.layers.{}.mlp.down_proj"
_OUT = "model.layers.{}.self_attn.o_proj"
_FAST: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("llama", _SIZES, _LLAMA_LIKE, True),
    "llama-tied": ("llama", {**_SIZES, "tie_word_embeddings": True}, _LLAMA_LIKE, True),
    "llama-block": ("llama", _SIZES, "model.layers.{}", True),
    "mistral": ("mistral", {**_SIZES, **_WINDOW}, _LLAMA_LIKE, True),
    "qwen2": ("qwen2", _SIZES, _LLAMA_LIKE, True),
    "qwen3": ("qwen3", _SIZES, _LLAMA_LIKE, True),
    "phi3": ("phi3", {**_SIZES, **_WINDOW, "pad_token_id": 0}, _LLAMA_LIKE, True),
    "phi-head-with-bias": ("phi", _SIZES, "model.layers.{}.mlp.fc2", True),
    "gpt2": ("gpt2", _GPT, "transformer.h.{}.mlp.c_proj", True),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out", True),
    "gpt-neox": ("gpt_neox", _sizes_without("num_key_value_heads"), "gpt_neox.layers.{}.mlp.dense_4h_to_h", True),
    "opt": (
        "opt",
        {**_sizes_without("num_key_value_heads", "intermediate_size"), **_OPT},
        "model.decoder.layers.{}.fc2",
        True,
    ),
    "opt-attention": (
        "opt",
        {**_sizes_without("num_key_value_heads"), **_OPT},
        "model.decoder.layers.{}.self_attn.out_proj",
        False,
    ),
    "bloom": ("bloom", _BLOOM, "transformer.h.{}.mlp.dense_4h_to_h", True),
    "falcon": ("falcon", _sizes_without("num_key_value_heads"), "transformer.h.{}.mlp.dense_4h_to_h", True),
    "mpt": (
        "mpt",
        {"vocab_size": 61, "d_model": 32, "n_layers": 3, "n_heads": 4},
        "transformer.blocks.{}.ffn.down_proj",
        True,
    ),
    # What the head makes of the last states is not the product alone, or the layer not the sum of its parts.
    "granite": ("granite", {**_SIZES, "logits_scaling": 8.0, "residual_multiplier": 0.3}, _LLAMA_LIKE, False),
    "cohere": ("cohere", {**_SIZES, "logit_scale": 0.0625}, _LLAMA_LIKE, True),
    "gemma2": ("gemma2", {**_SIZES, **_HEADS, **_WINDOW, "final_logit_softcapping": 1.0}, _LLAMA_LIKE, False),
    "gemma3": ("gemma3_text", {**_SIZES, **_HEADS, **_WINDOW, "final_logit_softcapping": 1.0}, _LLAMA_LIKE, False),
    "gemma3-with-eyes": (
        "gemma3",
        {
            "text_config": {**_SIZES, **_HEADS, **_WINDOW},
            "vision_config": {**_TINY_EYE, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
        "model.language_model.layers.{}.mlp.down_proj",
        False,
    ),
    "olmo2": ("olmo2", _SIZES, _LLAMA_LIKE, False),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "model.layers.{}.mlp.shared_expert.down_proj",
        False,
    ),
    "gpt-oss": (
        "gpt_oss",
        {**_SIZES, **_HEADS, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        _OUT,
        False,
    ),
}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *((name, 1) for name in _FAST),
        *((name, layer) for name in ("llama", "granite", "gpt2", "opt") for layer in (0, 2)),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_model(name: str, layer: int) -> None:
    kind, sizes, path, ends_layer = _FAST[name]
    model, module = _random(kind, **sizes), path.format(layer)
    upper = UpperLayers(model, module)
    assert upper.module_ends_layer is ends_layer
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(len(_EDITS), 32, generator=generator, requires_grad=True)
    states = upper.prepare(_EDITS)
    losses = upper.losses(states, added)
    (gradient,) = torch.autograd.grad(losses.sum(), added)
    for row, edit in enumerate(_EDITS):
        expected = _whole_model_loss(model, module, edit, added[row])
        (expected_gradient,) = torch.autograd.grad(expected, added)
        torch.testing.assert_close(losses[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[row], expected_gradient[row], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(states.module_output[row], _own_output(model, module, edit), rtol=1e-4, atol=1e-5)


_NEXT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_STATES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3}
_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {**_STATES, "state_size": 8}, "backbone.layers.1.mixer.out_proj"),
    "rwkv": ("rwkv", {**_STATES, "attention_hidden_size": 32}, "rwkv.blocks.1.feed_forward.value"),
    "qwen3-next": (
        "qwen3_next",
        {**_SIZES, **_HEADS, **_NEXT, "num_experts": 2, "num_experts_per_tok": 1},
        _OUT.format(1),
    ),
    "opt-with-narrow-embeddings": (
        "opt",
        {**_sizes_without("num_key_value_heads"), **_OPT, "word_embed_proj_dim": 16},
        "model.decoder.layers.1.fc2",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_an_architecture_that_does_not_run_on_cached_keys_and_values_is_refused_with_its_name(name: str) -> None:
    kind, sizes, path = _REFUSED[name]
    model = _random(kind, **sizes)
    module = path if name != "qwen3-next" else "model.layers.1.mlp.shared_expert.down_proj"
    with pytest.raises(
        NotSupportedError, match=type(model.get_submodule(path.split(".1.")[0].rpartition(".")[0])).__name__
    ):
        UpperLayers(model, module)


def test_an_editor_on_the_whole_model_does_not_act_in_the_check() -> None:
    """Hooks on the model act on calls of the model; an editor's own would change what is compared."""
    model = _llama()

    def upset(_model: object, _args: object, output: Any) -> Any:
        output.logits = output.logits + 1.0 * torch.arange(61)
        return output

    with model.register_forward_hook(upset):
        upper = UpperLayers(model, "model.layers.1.mlp.down_proj")
        states = upper.prepare(_EDITS)
        hooked = upper.losses(states, torch.zeros(3, 32))
    torch.testing.assert_close(upper.losses(states, torch.zeros(3, 32)), hooked, rtol=0, atol=0)


def test_a_module_that_sees_tokens_as_one_list_is_read_by_sequence() -> None:
    states = torch.arange(12.0).view(6, 2)
    assert torch.equal(as_sequences(states, (2, 3)), states.view(2, 3, 2))
    assert as_sequences(states.view(3, 2, 2), (3, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2), (2, 4, 2)], ids=["some tokens", "transposed", "one more token"])
def test_a_module_that_does_not_see_every_token_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"2 sequences of 3 tokens"):
        as_sequences(torch.zeros(shape), (2, 3))


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


def test_a_head_that_looks_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits follow from more than the state at their own position, so those alone give others."""
    model = _llama()
    plain = LlamaForCausalLM.forward

    def smoothed(self: LlamaForCausalLM, **kwargs: Any) -> Any:
        output = plain(self, **kwargs)
        output.logits = output.logits.cumsum(dim=1)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", smoothed)
    with pytest.raises(NotSupportedError, match="LlamaModel says other things"):
        UpperLayers(model, "model.layers.1.mlp.down_proj")


def test_a_decoder_that_treats_its_layers_specially_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it adds behind the layers depends on the embeddings, which the upper layers do not have."""
    model = _llama()
    plain = LlamaModel.forward

    def with_embeddings(self: LlamaModel, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(kwargs.pop("input_ids"))
        output = plain(self, inputs_embeds=inputs_embeds, **kwargs)
        output.last_hidden_state = output.last_hidden_state + inputs_embeds
        return output

    monkeypatch.setattr(LlamaModel, "forward", with_embeddings)
    with pytest.raises(NotSupportedError):
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


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_edits_past_the_length_where_rows_change_each_others_positions_take_the_plain_path(rope_type: str) -> None:
    rotary: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    rotary |= {"original_max_position_embeddings": 10, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = LlamaConfig(**_SIZES, rope_parameters=rotary)
    path = FastPath(
        lambda: UpperLayers(LlamaForCausalLM(config).eval(), "model.layers.1.mlp.down_proj"), "all was slow"
    )
    assert path.layers(longest=10) is not None
    assert path.warnings() == []
    assert path.layers(longest=11) is None
    assert path.layers(longest=10) is not None
    (warning,) = path.warnings()
    assert warning.startswith("all was slow: an edit of 11 tokens is past the 10 ")
