"""Batched, cached decoding says what the plain model says, on every kind of architecture, or does without.

The reference: each prompt alone, no cache, the whole sequence run again for each token.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import WAYS, decoding_drawbacks, greedy_decode, inference_ms, way_of
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.models.calls import run
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import PromptEncoder, last_prompt_positions, pad

VOCABULARY = 97
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [0.25, 0.5, 4.0, 64.0],
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

# Model type, its place in `WAYS` and its settings. Windows, chunks and borders are shorter than the prompts.
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 0, LLAMA),
    "mistral": ("mistral", 0, LLAMA | {"sliding_window": 4}),
    "gemma3": (
        "gemma3_text",
        0,
        LLAMA | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4": (
        "llama4_text",
        0,
        LLAMA
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "longrope": ("phi3", 0, LLAMA | {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    "dynamic": ("llama", 0, LLAMA | {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "gpt2": ("gpt2", 0, GPT2),
    "gptj": ("gptj", 0, GPT2 | {"rotary_dim": 4}),
    "codegen": ("codegen", 0, GPT2 | {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", 0, GPT2),
    "gpt_neo": (
        "gpt_neo",
        0,
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("gpt_neox", 0, SIZES | {"intermediate_size": 48, "num_attention_heads": 4}),
    "opt": ("opt", 0, SIZES | {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", 0, SIZES | {"num_attention_heads": 4}),
    "bloom": ("bloom", 0, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "mpt": ("mpt", 0, {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}),
    "mamba2": (
        "mamba2",
        0,
        SIZES | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    ),
    "jamba": (
        "jamba",
        0,
        LLAMA
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "qwen3_next": (
        "qwen3_next",
        0,
        LLAMA
        | EXPERTS
        | {"head_dim": 16, "shared_expert_intermediate_size": 16}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("lfm2", 0, LLAMA | {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        0,
        LLAMA
        | MAMBA2
        | {"mamba_d_head": 16, "mamba_n_groups": 2, "mamba_expand": 2, "layer_types": ["mamba", "attention"]}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    "falcon_h1": (
        "falcon_h1",
        0,
        LLAMA | MAMBA2 | {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_n_groups": 1},
    ),
    "mamba": ("mamba", 1, SIZES | {"state_size": 8}),
    "rwkv": ("rwkv", 3, SIZES | {"attention_hidden_size": 32, "context_length": 64}),
    "openai-gpt": ("openai-gpt", 3, GPT2),
    "recurrent_gemma": (
        "recurrent_gemma",
        3,
        LLAMA | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
    ),
}
# Rows of one length leave at different times, and one grows over the borders at 8.
LENGTHS, N_TOKENS = (11, 3, 7, 7, 2, 12, 3), [4, 5, 1, 3, 6, 2, 2]


def decided(model: PreTrainedModel) -> PreTrainedModel:
    """The model with larger weights, whose logits lie far apart."""
    for weight in model.requires_grad_(False).eval().parameters():
        if weight.dim() > 1:
            weight.mul_(3)
    return model


def random_model(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return decided(model)


def random_prompts(lengths: Sequence[int] = LENGTHS, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [[1, *torch.randint(5, vocabulary, (length - 1,), generator=generator).tolist()] for length in lengths]


def said_plainly(model: PreTrainedModel, prompt: Sequence[int], n_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(run(model, pad([ids], 0)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class MaskBlind(LlamaForCausalLM):
    """To this model padding is text."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, cache: Any = None, **settings: Any) -> Any:
        return super().forward(input_ids, cache=cache, use_cache=cache is not None)


class WithoutCache(LlamaForCausalLM):
    """A model that takes no cache."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, use_cache: bool = False
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)


class Crowded(LlamaForCausalLM):
    """A model whose memory does for one row."""

    def forward(self, input_ids: Tensor, **settings: Any) -> Any:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("no more memory")
        return super().forward(input_ids, **settings)


def small_llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return decided(kind(LlamaConfig(**{**LLAMA, **settings})))


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_says_what_the_plain_model_says_of_each_prompt_alone(name: str) -> None:
    model_type, place, settings = KINDS[name]
    model, prompts = random_model(model_type, settings), random_prompts()
    alone = [said_plainly(model, prompt, n) for prompt, n in zip(prompts, N_TOKENS, strict=True)]
    assert greedy_decode(model, prompts, N_TOKENS, pad_id=0) == alone
    assert len({token for row in alone for token in row}) > 4, "the model says one thing only"
    assert WAYS.index(way_of(model)) == place
    assert bool(decoding_drawbacks(model)) == (place > 1)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_rows_that_grow_over_a_border_of_rotation_say_what_they_say_alone(name: str) -> None:
    """What is cached below the border was rotated by other factors, and rows cross it at different steps."""
    model_type, _, settings = KINDS[name]
    model, prompts = random_model(model_type, settings), random_prompts([5, 6, 7, 8, 9] * 5)
    n_tokens = [8, 7, 6, 5, 4] * 5
    alone = [said_plainly(model, prompt, n) for prompt, n in zip(prompts, n_tokens, strict=True)]
    assert greedy_decode(model, prompts, n_tokens, pad_id=0) == alone


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next", "mamba"])
def test_rounding_of_half_precision_is_no_reason_to_decode_slowly(name: str) -> None:
    model_type, place, settings = KINDS[name]
    assert WAYS.index(way_of(random_model(model_type, settings).bfloat16())) == place


def test_a_model_that_ignores_the_mask_is_decoded_with_prompts_of_one_length_at_once() -> None:
    model, prompts = small_llama(MaskBlind), random_prompts()
    alone = [said_plainly(model, prompt, n) for prompt, n in zip(prompts, N_TOKENS, strict=True)]
    assert greedy_decode(model, prompts, N_TOKENS, pad_id=0) == alone
    assert WAYS.index(way_of(model)) == 2
    assert "MaskBlind" in decoding_drawbacks(model)[0]


def test_a_memory_acts_at_the_prompt_alone_with_a_cache_and_without() -> None:
    """The hook adds a vector at the last token of the prompt, which is not the last one of a pass without a cache."""
    prompts = random_prompts()
    vector = 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))

    def add(_inputs: Tensor, output: Tensor, prompt: Tensor) -> Tensor:
        last = torch.nn.functional.one_hot(last_prompt_positions(prompt), output.shape[1])
        return output + last[..., None] * vector

    said = []
    for kind in (LlamaForCausalLM, WithoutCache):
        model = small_llama(kind)
        before = greedy_decode(model, prompts, N_TOKENS, pad_id=0)
        hook = PromptHook(model, model.get_submodule("model.layers.0.mlp.down_proj"), add)
        said.append(greedy_decode(model, prompts, N_TOKENS, pad_id=0))
        hook.remove()
        assert said[-1] != before
    assert said[0] == said[1]


def test_a_model_that_sees_the_answer_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=48, num_attention_heads=4, is_decoder=False)
    with pytest.raises(UserError, match="BertLMHeadModel"):
        greedy_decode(decided(BertLMHeadModel(config)), [[1, 5]], [1], pad_id=0)


def test_a_model_at_random_is_refused() -> None:
    model = small_llama(attention_dropout=0.5).train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        greedy_decode(model, [[1, 5]], [1], pad_id=0)


def test_an_edit_that_spoils_all_numbers_is_decoded_all_the_same() -> None:
    model = small_llama()
    model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(torch.nan)
    assert [len(row) for row in greedy_decode(model, [[1, 5], [1, 6, 7]], [2, 3], pad_id=0)] == [2, 3]


def test_memory_that_runs_out_is_no_property_of_the_architecture() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        greedy_decode(small_llama(Crowded), [[1, 5]], [1], pad_id=0)


def test_a_slow_way_is_named_to_the_reader_of_the_scores_and_timed(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    model, encoder = small_llama(WithoutCache, vocab_size=600), PromptEncoder(golden_tokenizer)
    probes = [CaseProbe(0, "rel", "answer", prompt, "Lucan Vey") for prompt in ("Who?", "Who founded Brightwater?")]
    evaluator = TokenMatchEvaluator(model=model, encoder=encoder, protocol=protocol_of("greedy", "generate"))
    assert evaluator.warnings() == []
    evaluator.predict(probes)
    assert "WithoutCache" in evaluator.warnings()[0]
    assert inference_ms(model, encoder, probes) > 0
    assert math.isnan(inference_ms(model, encoder, []))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MaskBlind])
def test_teacher_forcing_does_not_depend_on_company_either(
    kind: type[LlamaForCausalLM], golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["Who?", "Who founded Brightwater?", "The bridge", "Lucan Vey"]
    probes = [CaseProbe(0, "rel", "answer", prompt, "the guild of masons") for prompt in prompts]
    evaluator = TokenMatchEvaluator(
        model=small_llama(kind, vocab_size=600),
        encoder=PromptEncoder(golden_tokenizer),
        protocol=protocol_of("teacher_forced", "generate"),
    )
    assert evaluator.predict(probes) == [evaluator.predict([probe])[0] for probe in probes]
