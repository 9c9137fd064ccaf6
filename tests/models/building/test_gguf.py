"""A GGUF file becomes a model folder that says what the weights say."""

import json
from functools import reduce
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from horen_bench.config.compose import run_config
from horen_bench.errors import UserError
from horen_bench.models.architecture import without_weights
from horen_bench.models.building.gguf import convert
from horen_bench.models.loading import load_model
from horen_bench.models.pretrained import whole_model
from horen_bench.paths import resource

gguf = pytest.importorskip("gguf")

SIZES = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}
NAMES = {
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def written(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model of random weights with the embedded tokenizer, and the file that it is written to."""
    rules = json.loads((resource("data") / "tiny" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(rules["vocab"], key=rules["vocab"].__getitem__)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    path = tmp_path / "weights" / "model.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, size in SIZES.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        renamed = reduce(lambda done, pair: done.replace(*pair), NAMES.items(), name)
        writer.add_tensor(renamed, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def test_a_converted_model_says_what_the_weights_say(written: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, file = written
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(file, folder)
    ids = torch.tensor([[1, 5, 9, 77]])
    with torch.no_grad():
        again = whole_model(AutoModelForCausalLM, folder)(input_ids=ids).logits
        assert torch.equal(again, model(input_ids=ids).logits)


def test_a_gguf_folder_is_a_model_like_any_other(
    written: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, file = written
    config = run_config([f"model.hub_id={file.parent}"]).model
    assert without_weights(config) is None, "nothing is converted for a check"
    loaded = load_model(config.hub_id, dtype="float32", device="cpu")
    assert loaded.encoder.texts(["Who?"]) != []
    assert loaded.fingerprint == load_model(str(file), dtype="float32", device="cpu").fingerprint
    assert without_weights(config) is not None


def test_what_is_no_gguf_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match=r"model\.gguf cannot be converted"):
        convert(tmp_path / "model.gguf", tmp_path)
