import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import horen_bench
from horen_bench.errors import UserError
from horen_bench.models.architecture import folder_skeleton
from horen_bench.models.loading import load_model, load_tokenizer
from horen_bench.paths import resource


@pytest.fixture
def folder(tmp_path: Path, golden_folder: Path) -> Path:
    """A model folder of one's own, to damage at will."""
    copy = tmp_path / "model"
    shutil.copytree(golden_folder, copy)
    return copy


def message(hub_id: str | Path, dtype: str = "float32", device: str = "cpu") -> str:
    """What the user is told when the model cannot be loaded."""
    with pytest.raises(UserError) as caught:
        load_model(str(hub_id), dtype=dtype, device=device)
    return str(caught.value)


def test_a_local_folder_loads_frozen_and_in_evaluation_mode_with_its_own_numbers(
    folder: Path, golden_model: PreTrainedModel
) -> None:
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    for name, tensor in golden_model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer("Who founded Brightwater?")["input_ids"][0] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for(dtype: str, folder: Path) -> None:
    loaded = load_model(str(folder), dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_the_fingerprint_stays_with_the_files_and_changes_with_weights_and_dtype(folder: Path) -> None:
    def fingerprint(dtype: str = "float32") -> str:
        return load_model(str(folder), dtype=dtype, device="cpu").fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint("bfloat16") != first
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert fingerprint() == first, "a copy of the same files is the same model"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert fingerprint() != first


def test_the_embedded_model_is_found_by_its_name_and_others_are_not() -> None:
    assert message("embedded:unknown") == (
        "model.hub_id=embedded:unknown: no such embedded model; the package brings embedded:tiny"
    )


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert message(missing) == (f"model.hub_id={missing}: there is no such folder; give a hub id or an existing folder")


def test_a_folder_without_weights_says_what_belongs_in_it(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    said = message(folder)
    assert said.startswith(f"{folder} cannot be loaded (")
    assert said.endswith(
        "; give a hub id or a folder with config.json, tokenizer files and *.safetensors in model.hub_id="
    )


def test_pickled_weights_are_refused(folder: Path, golden_model: PreTrainedModel) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(golden_model.state_dict(), folder / "pytorch_model.bin")
    assert message(folder).startswith(f"{folder} cannot be loaded (")


# --- Code that comes with a model -----------------------------------------------------------------------


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Transformers offers on stdin to run a model's code; each offer is accepted."""
    made: list[str] = []

    def agree(text: str = "") -> str:
        made.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    return made


def with_code(folder: Path, **config: Any) -> Path:
    """Put code into a folder that leaves a file behind when it is imported."""
    ran = folder.parent / "ran"
    code = (
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class MyConfig(LlamaConfig): model_type = 'mine'\nclass Mine(LlamaForCausalLM): config_class = MyConfig\n"
    )
    (folder / "mine.py").write_text(code)
    change(folder / "config.json", **config)
    return ran


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}, id="unknown type"),
        pytest.param({"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, id="no such model of it"),
    ],
)
def test_code_in_a_model_folder_is_neither_run_nor_offered(
    config: dict[str, Any], folder: Path, offers: list[str]
) -> None:
    ran = with_code(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert message(folder).startswith(f"{folder} cannot be loaded (The repository {folder} contains custom code")
    with pytest.raises(UserError, match=r"no causal language model to load here .* contains custom code"):
        folder_skeleton(folder)
    assert not offers
    assert not ran.exists()


def test_a_tokenizer_that_needs_code_is_refused(folder: Path, offers: list[str]) -> None:
    ran = with_code(folder)
    change(
        folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded \(its tokenizer: "):
        load_tokenizer(str(folder))
    assert not offers
    assert not ran.exists()


def test_a_known_model_that_also_brings_code_loads_without_it(folder: Path, offers: list[str]) -> None:
    ran = with_code(folder, auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"})
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert type(loaded.model).__module__ == "transformers.models.llama.modeling_llama"
    assert not offers
    assert not ran.exists()


@pytest.mark.parametrize("name", ["someone/kernel", "someone/kernel@main:function"])
def test_attention_whose_code_is_on_the_hub_is_refused(name: str, folder: Path) -> None:
    change(folder / "config.json", attn_implementation=name)
    assert f"its config.json names code from {name}" in message(folder)
    with pytest.raises(UserError, match="take attn_implementation out of config"):
        folder_skeleton(folder)


def test_nothing_is_loaded_past_the_one_door() -> None:
    """`from_pretrained` and `from_config` can run code, and the rest reads pickles, which can too."""
    root = Path(horen_bench.__file__).parent
    forbidden = re.compile(r"\.from_pretrained\(|\.from_config\(|torch\.load\(|\bpickle\b|\btrust_remote_code=True")
    places = {str(path.relative_to(root)) for path in root.rglob("*.py") if forbidden.search(path.read_text())}
    assert places == {str(Path("models") / "pretrained.py")}


# --- Weights that are not those of the model ------------------------------------------------------------


DOWN = "model.layers.1.mlp.down_proj.weight"


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        pytest.param(lambda t: t.pop(DOWN), f"lack {DOWN};", id="missing"),
        pytest.param(lambda t: t.update(extra=torch.ones(2)), "hold beyond it extra;", id="left over"),
        pytest.param(
            lambda t: t.update({DOWN: torch.ones(3, 5)}),
            f"hold in another shape {DOWN} [3, 5] for [64, 176];",
            id="another shape",
        ),
        pytest.param(
            lambda t: t.update(a=t.pop(DOWN), b=torch.ones(1), c=torch.ones(1), d=torch.ones(1)),
            f"lack {DOWN}, hold beyond it a, b, c and 1 more;",
            id="all at once",
        ),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], named: str, folder: Path
) -> None:
    rewrite(folder, edit)
    sentence = message(folder)
    assert named in sentence
    assert sentence.startswith(f"{folder} cannot be loaded: ")
    assert sentence.endswith("copy the folder again from where the model comes from")


def test_a_head_that_is_tied_to_the_embedding_is_not_missing() -> None:
    assert "lm_head.weight" not in load_file(resource("data") / "tiny" / "model.safetensors")
    model = load_model("embedded:tiny", dtype="float32", device="cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, folder: Path) -> None:
    rewrite(folder, lambda t: t[DOWN][3:4, 4].fill_(value))
    sentence = message(folder)
    assert sentence.startswith(f"{folder} has weights that are not finite in float32 ({DOWN}); copy the folder again")


def test_weights_beyond_the_range_of_a_dtype_are_refused_with_a_wider_one(folder: Path) -> None:
    rewrite(folder, lambda t: t[DOWN][3:4, 4].fill_(1e5))
    assert f"not finite in float16 ({DOWN}); its range may be too small for them, try model.dtype=bfloat16" in message(
        folder, dtype="float16"
    )
    load_model(str(folder), dtype="bfloat16", device="cpu")


# --- Damaged files --------------------------------------------------------------------------------------


def header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the description in front of the tensors."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    described = json.loads(content[8:end])
    edit(described)
    text = json.dumps(described).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda f: cut(f, -1000), id="truncated"),
        pytest.param(lambda f: cut(f, 0), id="empty"),
        pytest.param(lambda f: header(f, lambda h: h[DOWN].update(h["model.norm.weight"])), id="overlapping"),
        pytest.param(lambda f: header(f, lambda h: h[DOWN].update(shape=[3, 5])), id="wrong shape"),
        pytest.param(lambda f: header(f, lambda h: h[DOWN].update(dtype="Q7")), id="unknown dtype"),
    ],
)
def test_a_damaged_safetensors_file_is_named(damage: Callable[[Path], object], folder: Path) -> None:
    damage(folder)
    assert message(folder).startswith(f"{folder} cannot be loaded (model.safetensors: ")


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_settings_that_are_no_json_object_are_refused_by_file(name: str, content: str, folder: Path) -> None:
    """Transformers takes its defaults instead of a damaged generation configuration, and says nothing."""
    (folder / name).write_text(content)
    assert message(folder).startswith(f"{folder / name} ")
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        folder_skeleton(folder)


@pytest.mark.parametrize("content", ["{}", "", "[]", "null"])
def test_a_damaged_tokenizer_is_said_to_be_one(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert message(folder).startswith(f"{folder} cannot be loaded (its tokenizer: ")


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": "none"},
        {"rope_parameters": {"rope_type": "none"}},
    ],
)
def test_settings_that_no_model_has_are_a_sentence(config: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", **config)
    assert message(folder).startswith(f"{folder} cannot be loaded (")
    with pytest.raises(UserError, match="no causal language model to load here"):
        folder_skeleton(folder)


def test_an_adapter_is_not_taken_for_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert message(folder).startswith(f"{folder} holds an adapter (adapter_config.json), which is not read; merge it")


# --- Memory ---------------------------------------------------------------------------------------------


def test_a_model_beyond_the_hosts_memory_is_a_sentence(folder: Path) -> None:
    change(folder / "config.json", vocab_size=10**13)
    sentence = message(folder)
    assert sentence.startswith(f"memory ran out while {folder} was loaded (")
    assert "write model.dtype=bfloat16" in sentence


def test_a_model_beyond_the_devices_memory_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    assert message(folder).startswith(
        f"memory ran out while {folder} was loaded (CUDA out of memory. Tried to allocate 2.00 GiB.); write model.dty"
    )


# --- Dtype and device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "float31", "nn", "float8_e4m3fn"])
def test_a_dtype_that_is_none_is_refused(dtype: str, folder: Path) -> None:
    assert message(folder, dtype=dtype) == (
        f"model.dtype={dtype} is no floating-point dtype; write float32, bfloat16 or float16"
    )


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    said = message(folder, device="qpu")
    assert said.startswith("device=qpu cannot be used here (")
    assert said.endswith("); write cpu, cuda or cuda:N")
    assert message(folder, device="cuda:99").startswith("device=cuda:99 cannot be used here (")
