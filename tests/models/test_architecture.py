import re
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from horen_bench.errors import UserError
from horen_bench.models.architecture import (
    check_linear,
    check_module,
    compute_dtype,
    context_length,
    decoder_layer_index,
    device_of,
    is_last_layer,
    is_packed,
    linear_sizes,
    n_decoder_layers,
    skeleton,
)
from horen_bench.paths import resource

MODELS = {path.stem: path for path in sorted((resource("conf") / "model").glob("*.yaml"))}

# Parameters: those of the hub's weights. Memory: key size d_i and value size d_o of the wrapped module.
PUBLISHED = {
    "llama3_8b": (8_030_261_248, 14336, 4096),
    "llama31_8b": (8_030_261_248, 14336, 4096),
    "deepseek_llama_8b": (8_030_261_248, 14336, 4096),
    "qwen25_7b": (7_615_616_512, 18944, 3584),
    "deepseek_qwen_15b": (1_777_088_000, 8960, 1536),
    "sea_lion_32b": (32_762_123_264, 25600, 5120),
    "gpt_oss_20b": (20_914_757_184, 4096, 2880),
    "qwen3_8b": (8_190_735_360, 12288, 4096),
    "qwen3_4b": (4_022_468_096, 9728, 2560),
    "llama32_1b": (1_235_814_400, 8192, 2048),
    "llama32_3b": (3_212_749_824, 8192, 3072),
    "mistral_7b": (7_248_023_552, 14336, 4096),
    "gemma2_9b": (9_241_705_984, 14336, 3584),
    "gemma3_4b": (4_300_079_472, 10240, 2560),
    "gemma3_270m": (268_098_176, 2048, 640),
    "gemma3_270m_en32k": (268_098_176 - (262_144 - 32_768) * 640, 2048, 640),
    "gpt2_xl": (1_557_611_200, 1600, 6400),
    "gptj_6b": (6_050_882_784, 16384, 4096),
    "tiny": (1_574_016, 512, 128),
}

# Paper Table 3: threshold, pooling ratio.
TABLE_3 = {
    "llama3_8b": (0.80, 0.50),
    "llama31_8b": (0.85, 0.60),
    "deepseek_llama_8b": (0.85, 0.60),
    "qwen25_7b": (0.55, 0.60),
    "deepseek_qwen_15b": (0.60, 0.60),
    "sea_lion_32b": (0.55, 0.60),
    "gpt_oss_20b": (0.80, 0.60),
}

HEAD = ["name", "label", "hub_id", "revision", "dtype", "device_map", "threads", "memory_module"]
# By block of a model's file, the keys that a method's file reads.
READ: dict[str, set[str]] = {}
for method in (resource("conf") / "method").glob("*.yaml"):
    for block, key in re.findall(r"model\.([a-z]+)\.(\w+)", method.read_text()):
        READ.setdefault(block, set()).add(key)

# Methods for which the release has no values of a backbone of the paper.
WITHOUT = {
    "deepseek_llama_8b": {"wise", "rome", "memit", "alphaedit", "ft", "statistics"},
    "gpt_oss_20b": {"wise", "rome", "memit", "alphaedit", "ultraedit", "unke", "ft", "statistics"},
    "sea_lion_32b": {"wise", "unke"},
    "tiny": set[str](),
}


@cache
def config(name: str) -> DictConfig:
    return cast(DictConfig, OmegaConf.load(MODELS[name]))


@cache
def tree(name: str) -> PreTrainedModel:
    return skeleton(cast(dict[str, Any], OmegaConf.to_container(config(name).architecture)))


def module_names(node: Any, where: str = "model") -> Iterator[tuple[str, str]]:
    """Every (configuration key, dotted module name) of a model file."""
    if isinstance(node, str) and re.fullmatch(r"[a-z_]+(\.\w+)*\.\d+(\.\w+)*", node):
        yield where, node
    elif isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from module_names(child, f"{where}.{key}")


def n_weights(name: str, paths: list[str]) -> int:
    modules = [check_module(tree(name), path, where="modules") for path in paths]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def message(architecture: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        skeleton(architecture)
    return str(caught.value)


def missing(path: str, model: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_module(model or tree("tiny"), path, where="model.memory_module")
    return str(caught.value)


def test_every_model_file_is_known_here() -> None:
    assert set(MODELS) == set(PUBLISHED)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_one_that_methods_read(name: str) -> None:
    blocks = [str(block) for block in config(name) if block not in HEAD]
    assert list(config(name)) == [*HEAD, *blocks]
    assert blocks[-1] == "architecture"
    assert [block for block in blocks[:-1] if set(config(name)[block]) - READ.get(block, set())] == []


@pytest.mark.parametrize("name", [*TABLE_3, "tiny"])
def test_a_backbone_of_the_paper_has_a_block_for_every_method_but_those_without_a_source(name: str) -> None:
    assert READ.keys() - set(config(name)) == WITHOUT.get(name, {"wise"})


@pytest.mark.parametrize("name", MODELS)
def test_every_module_named_in_the_file_exists(name: str) -> None:
    named = list(module_names(OmegaConf.to_container(config(name))))
    assert ("model.memory_module", config(name).memory_module) in named
    for where, path in named:
        assert check_module(tree(name), path, where=where) is tree(name).get_submodule(path)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert sum(parameter.numel() for parameter in tree(name).parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_memory_module_has_its_key_and_value_size(name: str) -> None:
    module = check_module(tree(name), config(name).memory_module, where="model.memory_module")
    weight = module.get_parameter("weight")  # a Conv1D keeps it transposed
    shape = weight.T.shape if isinstance(module, nn.Linear) else weight.shape
    assert tuple(shape) == PUBLISHED[name][1:]
    assert (module.bias is not None) == (name in ("gpt_oss_20b", "gpt2_xl", "gptj_6b"))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_allocated(name: str) -> None:
    assert {parameter.device.type for parameter in tree(name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", TABLE_3)
def test_threshold_and_pooling_ratio_are_those_of_table_3(name: str) -> None:
    assert (config(name).horen.threshold, config(name).horen.pooling_ratio) == TABLE_3[name]


# Edited parameters as the UltraEdit release reports them: gate and up projections, hidden x inner size each.
@pytest.mark.parametrize(
    ("name", "n_modules", "n_parameters"),
    [
        ("llama3_8b", 12, 704_643_072),
        ("llama31_8b", 12, 704_643_072),
        ("deepseek_llama_8b", 12, 704_643_072),
        ("qwen25_7b", 18, 1_222_115_328),
        ("sea_lion_32b", 18, 2_359_296_000),
        ("deepseek_qwen_15b", 10, 137_625_600),
    ],
)
def test_ultraedit_edits_the_matrices_of_its_release(name: str, n_modules: int, n_parameters: int) -> None:
    modules = list(config(name).ultraedit.modules)
    assert len(set(modules)) == n_modules
    assert n_weights(name, modules) == n_parameters
    assert modules == sorted(modules, key=lambda path: ("up_proj" in path, decoder_layer_index(path)))


@pytest.mark.parametrize(("name", "n_parameters"), [("llama3_8b", 218_112_000), ("qwen25_7b", 233_057_792)])
def test_unke_edits_one_whole_block(name: str, n_parameters: int) -> None:
    assert n_weights(name, [config(name).unke.module]) == n_parameters


@pytest.mark.parametrize("name", MODELS)
def test_only_deepseek_qwen_keeps_its_memory_in_the_last_layer(name: str) -> None:
    assert is_last_layer(tree(name), config(name).memory_module) == (name == "deepseek_qwen_15b")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.24.mlp.down_proj", 24),
        ("model.layers.7", 7),
        ("transformer.h.3.mlp.c_proj", 3),
        ("model.layers.20.mlp.experts.3.down_proj", 20),
        ("model.embed_tokens", None),
        ("lm_head", None),
    ],
)
def test_layer_number_is_the_first_number_of_the_path(path: str, layer: int | None) -> None:
    assert decoder_layer_index(path) == layer


def test_number_of_layers_is_read_under_any_architectures_own_name() -> None:
    gpt2 = skeleton({"model_type": "gpt2", "n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 16})
    assert isinstance(gpt2, GPT2LMHeadModel)
    assert isinstance(gpt2.config, GPT2Config)
    assert n_decoder_layers(gpt2) == 3
    assert is_last_layer(gpt2, "transformer.h.2.mlp.c_proj")
    assert not is_last_layer(gpt2, "transformer.h.1.mlp.c_proj")
    assert not is_last_layer(gpt2, "lm_head")


def test_architecture_straight_from_a_model_file_is_accepted() -> None:
    assert n_decoder_layers(skeleton(config("llama31_8b").architecture)) == 32


def test_rotary_settings_reach_the_model() -> None:
    assert tree("llama31_8b").config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        pytest.param(
            {"model_type": "qwen22"},
            "model.architecture.model_type=qwen22: transformers has no causal language model of this type; "
            "did you mean qwen2?",
            id="misspelt type",
        ),
        pytest.param(
            {"model_type": "zzzzzzzz"},
            "model.architecture.model_type=zzzzzzzz: transformers has no causal language model of this type; "
            "one it has is llama",
            id="type like no other",
        ),
        pytest.param(
            {"hidden_size": 8},
            "model.architecture.model_type=: transformers has no causal language model of this type; "
            "one it has is llama",
            id="no type",
        ),
        pytest.param(
            {"model_type": "llama", "hiden_size": 8},
            "model.architecture.hiden_size: 'llama' has no such argument; did you mean hidden_size?",
            id="misspelt argument",
        ),
        pytest.param(
            {"model_type": "llama", "xyzzy": 8},
            "model.architecture.xyzzy: 'llama' has no such argument; config.json on the model's hub page has the names",
            id="argument like no other",
        ),
        pytest.param(
            {"model_type": "llama", "hidden_size": "big"},
            "model.architecture: transformers cannot build a 'llama' from these values (TypeError: Field "
            "'hidden_size' expected int, got str (value: 'big'))",
            id="wrong type of value",
        ),
        pytest.param(
            {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7},
            "model.architecture: transformers cannot build a 'llama' from these values (ValueError: The "
            "hidden size (100) is not a multiple of the number of attention heads (7).)",
            id="values that do not fit",
        ),
        pytest.param(
            {"model_type": "llama", "hidden_act": "swush"},
            "model.architecture: transformers cannot build a 'llama' from these values (KeyError: 'swush')",
            id="unknown activation",
        ),
    ],
)
def test_bad_architecture_is_told_in_one_sentence(architecture: dict[str, Any], text: str) -> None:
    assert message(architecture) == text


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.layers.9.mlp.down_proj", "model.layers has 4 entries, 0 to 3"),
        ("model.layers.-1.mlp.down_proj", "model.layers has 4 entries, 0 to 3"),
        (
            "model.layers.2.mlp.down_prj",
            "model.layers.2.mlp has gate_proj, up_proj, down_proj, act_fn; did you mean down_proj?",
        ),
        ("model.layers.2.mlp.c_fc", "model.layers.2.mlp has gate_proj, up_proj, down_proj, act_fn"),
        ("model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj has no modules inside"),
        ("transformer.h.2", "at its root it has model, lm_head"),
        ("", "at its root it has model, lm_head"),
    ],
)
def test_missing_module_is_told_with_what_is_there(path: str, found: str) -> None:
    assert missing(path) == f"model.memory_module={path}: LlamaForCausalLM has no such module; {found}"


def test_fused_experts_have_no_matrix_to_wrap() -> None:
    assert missing("model.layers.20.mlp.experts.down_proj", tree("gpt_oss_20b")) == (
        "model.memory_module=model.layers.20.mlp.experts.down_proj: GptOssForCausalLM has no such module; "
        "model.layers.20.mlp.experts has no modules inside"
    )


def test_model_files_open_with_their_sources() -> None:
    for path in MODELS.values():
        assert path.read_text(encoding="utf-8").startswith("# ")


# --- Sizes, dtypes, limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "positions", "n_layers"),
    [
        ({"model_type": "gpt2", "n_positions": 48, "n_layer": 3, "n_embd": 8, "n_head": 2}, 48, 3),
        ({"model_type": "opt", "max_position_embeddings": 48, "num_hidden_layers": 3, "hidden_size": 24}, 48, 3),
        ({"model_type": "mpt", "max_seq_len": 48, "n_layers": 3, "d_model": 16, "n_heads": 2}, 48, 3),
        ({"model_type": "rwkv", "context_length": 48, "num_hidden_layers": 3, "hidden_size": 16}, 48, 3),
        ({"model_type": "falcon", "max_position_embeddings": 48, "num_hidden_layers": 3}, 48, 3),
        ({"model_type": "falcon", "max_position_embeddings": 48, "num_hidden_layers": 3, "alibi": True}, None, 3),
        ({"model_type": "bloom", "n_layer": 3, "hidden_size": 16, "n_head": 2}, None, 3),
        ({"model_type": "mamba", "num_hidden_layers": 3, "hidden_size": 16}, None, 3),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_limits_are_read_under_any_architectures_own_name(
    architecture: dict[str, Any], positions: int | None, n_layers: int
) -> None:
    model = skeleton(architecture)
    assert (context_length(model), n_decoder_layers(model)) == (positions, n_layers)


class Packed(nn.Module):
    """A linear module whose numbers are in a buffer of another name, as GPTQ has it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 8
        self.register_buffer("qweight", torch.zeros(3, dtype=torch.int32))


class Quantised(torch.Tensor):
    """A tensor that says that it is float32, as torchao has it."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_sizes_are_inputs_and_outputs_whatever_the_weight_looks_like() -> None:
    for module in (nn.Linear(6, 8), Conv1D(nf=8, nx=6), Packed()):
        owner = nn.ModuleDict({"inner": module})
        assert linear_sizes(check_linear(owner, "inner", where="method.module")) == (6, 8)
        assert device_of(module).type == "cpu"


@pytest.mark.parametrize("module", [nn.Embedding(6, 8), nn.LayerNorm(6), nn.SiLU()])
def test_what_is_not_linear_is_refused(module: nn.Module) -> None:
    with pytest.raises(UserError, match=r"method\.module=inner is a \w+; a linear module is needed"):
        check_linear(nn.ModuleDict({"inner": module}), "inner", where="method.module")


def test_the_dtype_of_activations_is_never_that_of_packed_numbers() -> None:
    model = skeleton({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}).bfloat16()
    assert compute_dtype(model, nn.Linear(6, 8).half()) == torch.float16
    assert compute_dtype(model, Packed()) == torch.bfloat16
    eighth = nn.Linear(6, 8, bias=False).requires_grad_(False)
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        eighth.weight.data = torch.zeros(8, 6).to(dtype)
        assert compute_dtype(model, eighth) == torch.bfloat16
    eighth.weight = nn.Parameter(torch.zeros(8, 6).as_subclass(Quantised), requires_grad=False)
    assert is_packed(eighth.weight) and not is_packed(nn.Linear(6, 8).weight)
    assert compute_dtype(model, eighth) == torch.bfloat16
