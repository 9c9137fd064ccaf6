import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.models.loading import load_model


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


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "configuration_mine.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig as Mine\nPath({str(ran)!r}).touch()\n"
    )
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert message(folder).startswith(f"{folder} cannot be loaded (")
    assert not ran.exists()


@pytest.mark.parametrize("dtype", ["int64", "float31", "nn"])
def test_a_dtype_that_is_none_is_refused(dtype: str, folder: Path) -> None:
    assert message(folder, dtype=dtype) == (
        f"model.dtype={dtype} is no floating-point dtype; write float32, bfloat16 or float16"
    )


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    said = message(folder, device="qpu")
    assert said.startswith("device=qpu cannot be used here (")
    assert said.endswith("); write cpu, cuda or cuda:N")
    assert message(folder, device="cuda:99").startswith("device=cuda:99 cannot be used here (")
