"""Methods that rewrite weights, on the kinds of modules that architectures have.

GPT-2 stores a weight as `(in, out)`, OPT and Qwen's mixtures hand their modules the tokens of all sequences in one row,
Falcon adds to a module's output in place, GPT-J's projections have a bias, Bloom and Mamba know no positions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.base import Editor
from horen_bench.editors.locate_edit.editor import LocateEditEditor
from horen_bench.editors.locate_edit.requests import request_of
from horen_bench.editors.locate_edit.target_vector import keys_and_outputs, train_target_vectors
from horen_bench.errors import UserError
from horen_bench.models.architecture import PlainLinear
from horen_bench.models.calls import run
from horen_bench.models.surgery import check_plain_linear
from horen_bench.prompts import PromptEncoder, pad

CASE = EditCase("first", "Who founded Brightwater?", "Lucan Vey", subject="Brightwater")
_WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 600}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 600}
_LLAMA = {**_WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
_MIXTURE = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48}
# By name: the type, its sizes, and the module that is written.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", _GPT, "transformer.h.1.mlp.c_proj"),
    "gpt2-square": ("gpt2", _GPT, "transformer.h.1.attn.c_proj"),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}, "transformer.h.1.mlp.fc_out"),
    "falcon": ("falcon", _WIDE, "transformer.h.1.mlp.dense_4h_to_h"),
    "bloom": (
        "bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 600},
        "transformer.h.1.mlp.dense_4h_to_h",
    ),
    "opt": ("opt", {**_WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers.1.fc2"),
    "qwen2_moe": ("qwen2_moe", {**_LLAMA, **_MIXTURE}, "model.layers.1.mlp.shared_expert.down_proj"),
    "mamba": (
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 600, "state_size": 8},
        "backbone.layers.1.mixer.out_proj",
    ),
}
_TEXTS = str(Path(__file__).parents[2] / "baselines" / "rome" / "stats_texts.json")
_HIDDEN = {"n_steps": 10, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 10.0, "kl": 0.0625}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def made(name: str) -> PreTrainedModel:
    kind, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for module in model.modules():
        if isinstance(module, PlainLinear):  # so that layers, and biases, matter
            module.weight.data.mul_(3)
            if module.bias is not None:
                module.bias.data.add_(0.01)
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"corpus": _TEXTS, "n_texts": 40, "folder": str(tmp_path_factory.mktemp("moments"))}


@pytest.fixture
def build(golden_tokenizer: PreTrainedTokenizerBase, statistics: dict[str, Any]) -> Callable[..., Editor[Any]]:
    """A method on a model, at one module, as its file in `conf/` sets it but for the changes."""

    def editor(model: PreTrainedModel, method: str, module: str, **changes: Any) -> Editor[Any]:
        settings = {**_settings(method, module, statistics), **changes}
        config = run_config([f"method={method}"]).method.changed(**settings)
        made_editor: Editor[Any] = config.editor_class()(model, golden_tokenizer, config, seed=42)
        return made_editor

    return editor


def _settings(method: str, module: str, statistics: Mapping[str, Any]) -> dict[str, Any]:
    located = {"hidden": _HIDDEN, "statistics": statistics}
    window = {**located, "modules": [module], "contexts": [[""], [""]]}
    settings: dict[str, dict[str, Any]] = {
        "rome": {**located, "module": module, "contexts": [[""]], "ridge": 1e-2},
        "memit": {**window, "ridge": 1e-2, "moment_weight": 1e-7},
        "alphaedit": {**window, "l2": 1e-5, "nullspace_threshold": 1e9},
        "ft_m": {"module": module, "learning_rate": 5e-3, "n_steps": 10},
        "ultraedit": {"modules": [module], "learning_rate": 5e-3, "regime": "original"},
        "wise": {"module": module, "n_steps": 5, "templates": ["{}", "I walked a {}"]},
        "unke": {
            "module": module,
            "value": {"n_steps": 10, "learning_rate": 0.2, "weight_decay": 1e-3, "clamp": 4.0},
            "block": {"n_steps": 8, "learning_rate": 2e-3, "weight_decay": 0.01},
            "preservation": {"corpus": _TEXTS, "template": "{} ", "n_texts": 6, "max_tokens": None},
        },
    }
    return settings[method]


def loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross-entropy (nats) of the target behind the prompt."""
    edit = PromptEncoder(tokenizer).edit(CASE.prompt, CASE.target)
    logits = run(model, pad([edit.ids], 0)).logits[0, len(edit.prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(edit.target)).item()


def contents(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- What is written is what comes out -----------------------------------------------------------------------


# A gate follows the shared expert of Qwen's mixtures, and an MLP the attention, where MEMIT's equations know of none.
LOCATED = [("rome", name) for name in ARCHITECTURES]
LOCATED += [("memit", name) for name in ARCHITECTURES if name not in ("qwen2_moe", "gpt2-square")]
LOCATED += [("alphaedit", "gpt2"), ("alphaedit", "opt")]


@pytest.mark.parametrize(("method", "name"), LOCATED)
def test_the_module_maps_the_key_to_the_value_when_it_is_called(
    build: Callable[..., Editor[Any]], method: str, name: str
) -> None:
    """ROME's `W k = v`, MEMIT's and AlphaEdit's block output `z`, up to what their constants hold back."""
    model, path = made(name), ARCHITECTURES[name][2]
    editor = build(model, method, path, engine="sequential")
    assert isinstance(editor, LocateEditEditor)
    editor._get_ready()
    rows = editor._rows([request_of(editor.encoder, CASE)])
    vectors = train_target_vectors(editor._perturbed_model(rows), editor.config.hidden)
    before = contents(model)
    assert editor.edit([CASE])[0].action == "inserted"
    _, outputs = keys_and_outputs(model, editor._target, editor._projections, rows)
    assert (outputs - vectors.target).norm() < 1e-3 * vectors.delta.norm()
    editor.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_mean_key_is_mapped_to_the_value_where_the_module_has_a_bias(build: Callable[..., Editor[Any]]) -> None:
    model, path = made("gptj"), ARCHITECTURES["gptj"][2]
    editor = build(model, "rome", path, engine="sequential", key_mode="mean", contexts=[["", "I walked. "]])
    assert isinstance(editor, LocateEditEditor)
    editor._get_ready()
    perturbed = editor._perturbed_model(editor._rows([request_of(editor.encoder, CASE)]))
    vectors = train_target_vectors(perturbed, editor.config.hidden)
    editor.edit([CASE])
    output = model.get_submodule(path)(perturbed.keys[path])
    assert (output - vectors.target).norm() < 1e-3 * vectors.delta.norm()


@every_architecture
@pytest.mark.parametrize("method", ["ft_m", "ultraedit"])
def test_training_a_weight_makes_the_target_likelier(
    build: Callable[..., Editor[Any]], golden_tokenizer: PreTrainedTokenizerBase, name: str, method: str
) -> None:
    model = made(name)
    before, expected = contents(model), loss(model, golden_tokenizer)
    editor = build(model, method, ARCHITECTURES[name][2])
    assert editor.edit([CASE])[0].action == "inserted"
    assert loss(model, golden_tokenizer) < expected
    editor.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@every_architecture
def test_a_whole_block_is_trained_and_put_back(
    build: Callable[..., Editor[Any]], golden_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    model, path = made(name), ".".join(ARCHITECTURES[name][2].split(".")[: 4 if name == "opt" else 3])
    before, expected = contents(model), loss(model, golden_tokenizer)
    editor = build(model, "unke", path)
    assert editor.edit([CASE])[0].action == "inserted"
    assert loss(model, golden_tokenizer) < expected
    editor.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_side_weight_starts_from_what_the_module_computes(build: Callable[..., Editor[Any]]) -> None:
    """WISE's side weight of a square `Conv1D` would be transposed without a word."""
    path = ARCHITECTURES["gpt2-square"][2]
    model = made("gpt2-square")
    editor: Any = build(model, "wise", path)
    x, module = torch.randn(2, 32), check_plain_linear(model, path, where="method.module")
    torch.testing.assert_close(F.linear(x, editor.weights.base, module.bias), module(x))


# --- What the reader must know, and what cannot work --------------------------------------------------------


def test_the_reader_is_told_where_a_gate_stands_behind_the_module(build: Callable[..., Editor[Any]]) -> None:
    told = {}
    for name in ("qwen2_moe", "gptj"):
        editor = build(made(name), "memit", ARCHITECTURES[name][2])
        editor.edit([CASE])
        told[name] = any("is not added to the hidden states as it is" in warning for warning in editor.warnings())
    assert told == {"qwen2_moe": True, "gptj": False}


@pytest.mark.parametrize("method", ["memit", "ultraedit", "wise"])
def test_a_model_that_reads_padding_as_text_is_refused_before_anything_is_written(
    build: Callable[..., Editor[Any]], method: str
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=3, vocab_size=600, hidden_act="silu")
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    before = contents(model)
    with pytest.raises(UserError, match="does not look at the attention mask"):
        build(model, method, "rwkv.blocks.1.feed_forward.value").edit([CASE])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class WholeNumbers(nn.Linear):
    """A weight of whole numbers and a scale, as quantisers have it."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        scale = plain.weight.abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((plain.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        return F.linear(x, self.weight.to(x.dtype) * scale, self.bias)


class Rounding(nn.Linear):
    """Numbers as published, but rounded on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


def replaced(model: PreTrainedModel, path: str, make: Callable[[nn.Linear], nn.Module]) -> None:
    owner, _, name = path.rpartition(".")
    plain = model.get_submodule(path)
    assert isinstance(plain, nn.Linear)
    setattr(model.get_submodule(owner), name, make(plain))


DOWN = "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft_m", "ultraedit", "wise"])
def test_a_quantised_weight_is_not_written(
    build: Callable[..., Editor[Any]], golden_model: PreTrainedModel, method: str
) -> None:
    replaced(golden_model, DOWN, WholeNumbers)
    with pytest.raises(UserError, match=f"method.modules?={DOWN} is a WholeNumbers whose weight is quantised"):
        build(golden_model, method, DOWN)


def test_a_block_with_a_quantised_weight_is_not_trained(
    build: Callable[..., Editor[Any]], golden_model: PreTrainedModel
) -> None:
    replaced(golden_model, DOWN, WholeNumbers)
    with pytest.raises(UserError, match=f"method.module={DOWN} is a WholeNumbers"):
        build(golden_model, "unke", "model.layers.2")
    build(golden_model, "unke", "model.layers.1")  # as published


@pytest.mark.parametrize("method", ["horen", "grace"])
def test_a_memory_uses_a_quantised_module(
    build: Callable[..., Editor[Any]],
    golden_model: PreTrainedModel,
    golden_tokenizer: PreTrainedTokenizerBase,
    method: str,
) -> None:
    replaced(golden_model, DOWN, WholeNumbers)
    config = run_config([f"method={method}"]).method.changed(module=DOWN)
    editor = config.editor_class()(golden_model, golden_tokenizer, config, seed=42)
    expected = loss(golden_model, golden_tokenizer)
    record = editor.edit([CASE])[0]
    assert record.action == "inserted" and record.loss < expected / 2
    assert editor.state_dict()["keys"].dtype == torch.float32


def test_a_module_that_computes_something_else_than_its_product_is_not_written(
    build: Callable[..., Editor[Any]], golden_model: PreTrainedModel
) -> None:
    plain = golden_model.get_submodule(DOWN)
    rounding = Rounding(plain.in_features, plain.out_features, bias=False)  # type: ignore[arg-type]
    rounding.load_state_dict(plain.state_dict())
    replaced(golden_model, DOWN, lambda _: rounding)
    with pytest.raises(UserError, match=f"method.module={DOWN} is a Rounding that gives other outputs"):
        build(golden_model, "rome", DOWN)


def test_a_head_that_is_tied_to_the_embeddings_is_not_written(build: Callable[..., Editor[Any]]) -> None:
    with pytest.raises(UserError, match="lm_head shares its weight with"):
        build(made("gpt2"), "ft_m", "lm_head")
    build(made("gptj"), "ft_m", "lm_head")  # has one of its own
