"""What names a model's weights: the content of a folder, or a commit of the hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from horen_bench.errors import UserError
from horen_bench.models import file_hashes
from horen_bench.models.file_hashes import sha256_of
from horen_bench.models.loading import load_model
from horen_bench.models.weights import weights_fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2


def named(folder: Path, dtype: str = "float32") -> str:
    name = weights_fingerprint(str(folder), dtype)
    assert name is not None
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like a model folder to what only hashes it; the weights are 3 MB."""
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    return folder


# --- What is in the name --------------------------------------------------------------------------------


def test_one_bit_in_the_middle_of_the_weights_is_another_name(folder: Path) -> None:
    first = named(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"\x01")
    assert named(folder) != first


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "vocab.txt",
        "vocab.json",
        "qwen.tiktoken",
        "source.spm",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tools.jinja",
        "model-00002-of-00002.safetensors",
    ],
)
def test_each_file_that_changes_what_a_model_says_changes_its_name(name: str, folder: Path) -> None:
    without = named(folder)
    (folder / name).write_text('{"a": 1}')
    first = named(folder)
    (folder / name).write_text('{"a": 2}')
    assert len({without, first, named(folder)}) == 3


@pytest.mark.parametrize("name", ["README.md", "modeling_mine.py", "pytorch_model.bin", ".gitattributes", "run.log"])
def test_a_file_that_is_never_read_does_not(name: str, folder: Path) -> None:
    first = named(folder)
    (folder / name).write_text("text")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"of another time")
    assert named(folder) == first


def test_a_copy_has_the_same_name_and_another_dtype_has_not(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    assert named(copy) == named(folder)
    assert named(copy, "bfloat16") == named(folder).replace("float32", "bfloat16")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "parts/a.safetensors"}}),
        ("config.json", {"transformers_weights": "parts/a.safetensors"}),
    ],
)
def test_weights_in_a_folder_inside_count_where_they_are_named(
    file: str, content: dict[str, Any], folder: Path
) -> None:
    (folder / "parts").mkdir()
    (folder / "parts" / "a.safetensors").write_bytes(b"1")
    (folder / file).write_text(json.dumps(content))
    first = named(folder)
    (folder / "parts" / "a.safetensors").write_bytes(b"2")
    assert named(folder) != first
    (folder / file).write_text(json.dumps(content).replace("parts", ".."))
    with pytest.raises(UserError, match=r"names weights outside itself \(\.\./a\.safetensors\)"):
        named(folder)


def test_a_loaded_model_has_the_name_that_is_known_without_loading_it() -> None:
    loaded = load_model("embedded:tiny", dtype="bfloat16", device="cpu")
    assert loaded.fingerprint == weights_fingerprint("embedded:tiny", "bfloat16")


def test_a_name_needs_no_torch() -> None:
    code = (
        "import sys; from horen_bench.models.weights import weights_fingerprint as name; "
        "name('embedded:tiny', 'float32'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_of_the_hub_is_named_by_its_commit(
    golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_fingerprint("someone/small", "float32") is None
    cached = tmp_path / "models--someone--small"
    shutil.copytree(golden_folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert weights_fingerprint("someone/small", "float32") == "0123456789abcdef-float32"
    assert weights_fingerprint("someone/small", "float32", COMMIT) == "0123456789abcdef-float32"
    assert weights_fingerprint("someone/small", "float32", "v2") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model("someone/small", dtype="float32", device="cpu").fingerprint == "0123456789abcdef-float32"


def test_a_folder_is_named_by_content_even_where_it_claims_a_commit(folder: Path) -> None:
    """A snapshot of the hub's cache that is given by its path can be edited like any other."""
    snapshot = folder.parent / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    assert named(snapshot) == named(folder)


# --- Remembering ----------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hashes of files of any size and age are remembered here."""
    place = tmp_path / "cache" / "file_hashes.json"
    monkeypatch.setattr(file_hashes, "cache_file", lambda: place)
    monkeypatch.setattr(file_hashes, "_LARGE", 0)
    monkeypatch.setattr(file_hashes, "_SETTLED", -(10**12))
    return place


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files whose content was read."""
    names: list[str] = []
    digest: Callable[..., Any] = hashlib.file_digest

    def counted(file: Any, *rest: Any) -> Any:
        names.append(Path(file.name).name)
        return digest(file, *rest)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_file_is_read_once_and_again_after_a_change(memory: Path, reads: list[str], tmp_path: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("abc")
    other.write_text("abd")
    assert sha256_of([file, other, file])[::2] == [ABC, ABC]
    reads.clear()
    assert sha256_of([file]) == [ABC]
    assert reads == []
    file.write_text("abd")
    assert sha256_of([file]) == sha256_of([other]) != [ABC]
    assert reads == ["a"]


def test_an_edit_that_keeps_size_and_time_is_seen(memory: Path, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("abd")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    first = sha256_of([file])
    with file.open("r+") as same_inode:
        same_inode.write("abc")
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1]
    assert sha256_of([file]) == [ABC] != first


@pytest.mark.parametrize("content", ["", "[]", "{", '{"PLACE": 1}', '{"PLACE": [[], 2]}', '{"PLACE": [[], "12"]}'])
def test_a_damaged_memory_is_none(content: str, memory: Path, reads: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("abc")
    memory.parent.mkdir()
    memory.write_text(content.replace("PLACE", str(file)))
    assert sha256_of([file]) == [ABC]
    reads.clear()
    assert sha256_of([file]) == [ABC]
    assert reads == [], "it was mended"


def test_a_memory_that_cannot_be_written_costs_time_only(memory: Path, tmp_path: Path) -> None:
    memory.parent.write_text("a file where the folder would be")
    (tmp_path / "a").write_text("abc")
    assert sha256_of([tmp_path / "a"]) == [ABC]


def test_files_that_are_gone_are_forgotten(memory: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("abc")
    sha256_of([tmp_path / "a"])
    (tmp_path / "a").unlink()
    sha256_of([tmp_path / "b"])
    assert list(json.loads(memory.read_text())) == [str(tmp_path / "b")]


def test_small_files_and_those_just_written_are_not_remembered(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may change twice within the resolution of its times."""
    (tmp_path / "a").write_text("abc")
    with monkeypatch.context() as fresh:
        fresh.setattr(file_hashes, "_SETTLED", 3600 * 10**9)
        sha256_of([tmp_path / "a"])
    with monkeypatch.context() as small:
        small.setattr(file_hashes, "_LARGE", 4)
        sha256_of([tmp_path / "a"])
    assert not memory.exists()
