"""Where a model's weights are, in the package, a folder, or the hub's cache, and what names them; needs no torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from horen_bench.errors import UserError
from horen_bench.models.building.built import built_folder
from horen_bench.models.file_hashes import sha256_of
from horen_bench.paths import resource

EMBEDDED = "embedded:"

# What lies in model folders and is never read: texts about the model, code, and weights in other formats.
_NEVER_READ = frozenset(
    (".md", ".pdf", ".png", ".jpg", ".log", ".py", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
)
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)
_MEND = "copy the folder again from where the model comes from"


def model_source(hub_id: str) -> str:
    """What transformers loads: the folder of an embedded or built model, else the id as given.

    Raises:
        UserError: a folder that is not there, no such embedded model, or none that can be built.
    """
    if folder := built_folder(hub_id):
        return str(folder)
    if hub_id.startswith(("/", ".", "~")) and not Path(hub_id).expanduser().is_dir():
        raise UserError(f"model.hub_id={hub_id}: there is no such folder; give a hub id or an existing folder")
    if not hub_id.startswith(EMBEDDED):
        return str(Path(hub_id).expanduser()) if hub_id.startswith("~") else hub_id
    folder = resource("data") / hub_id.removeprefix(EMBEDDED)
    if not folder.is_dir():
        raise UserError(f"model.hub_id={hub_id}: no such embedded model; the package brings embedded:tiny")
    return str(folder)


def weights_at_hand(hub_id: str, revision: str | None = None) -> bool:
    """Whether a model's weights are on this machine: a folder, built, or in the hub's cache; nothing is fetched."""
    if folder := built_folder(hub_id):
        return folder.is_dir()
    if hub_id.startswith(EMBEDDED) or Path(hub_id).expanduser().is_dir():
        return True
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str) for name in names)


def weights_fingerprint(hub_id: str, dtype: str, revision: str | None = None) -> str | None:
    """What names a model's weights in rows and stored predictions: `HASH-DTYPE`; nothing is fetched.

    The hash is sixteen hex digits of the hub's commit, or for a folder over the whole content of every file that may
    change what the model says. It is the same for a copy of the folder.

    Args:
        hub_id: a hub id, a local folder, `embedded:NAME`, `built:NAME` or a GGUF file.
        dtype: that the weights are loaded in.
        revision: branch, tag or commit on the hub.

    Returns:
        None for a model that is not here: of the hub and not in the local cache, or not built yet.

    Raises:
        UserError: no such folder or embedded model, or a file of it cannot be read.
    """
    source = Path(model_source(hub_id))
    if built_folder(hub_id) and not source.is_dir():
        return None
    name = _content_hash(source) if source.is_dir() else _cached_commit(hub_id, revision)
    return f"{name[:16]}-{dtype}" if name else None


def check_settings(folder: Path) -> None:
    """See that a model folder's small JSON files hold what transformers takes for granted.

    It passes over some damaged ones in silence, with the defaults in their place.

    Raises:
        UserError: a file is no JSON object, or the folder holds an adapter, whose weights lie elsewhere.
    """
    for name in _SETTINGS:
        if (folder / name).is_file():
            _json_object(folder / name)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), which is not read; merge it into the model's weights, "
            "save the whole model and give that folder with model.hub_id="
        )


def _content_hash(folder: Path) -> str:
    files = _files(folder)
    try:
        digests = sha256_of(files)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror}); mend that, or {_MEND}"
        ) from error
    lines = [f"{path.relative_to(folder)} {digest}\n" for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """All that may be read of a folder: its files, further chat templates, and weights that are named by path."""
    named = [folder / name for name in _named_weights(folder)]
    inside = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    read = [path for path in inside if path.suffix not in _NEVER_READ and not path.name.startswith(".")]
    return sorted(path for path in {*read, *named} if path.is_file())


def _named_weights(folder: Path) -> set[str]:
    """Files of weights that the settings name, which may lie in a folder inside.

    Raises:
        UserError: a file outside is named.
    """
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        weights = _json_object(index).get("weight_map")
        names |= set(map(str, weights.values())) if isinstance(weights, dict) else set()
    config = folder / "config.json"
    if config.is_file() and (explicit := _json_object(config).get("transformers_weights")):
        names.add(str(explicit))
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()) and not _is_plain(name):
            raise UserError(f"{folder} names weights outside itself ({name}); {_MEND}")
    return names


def _is_plain(name: str) -> bool:
    """Whether it is the name of a file in the folder; that may be a link to elsewhere, as in the hub's cache."""
    return Path(name).name == name


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that, or {_MEND}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); {_MEND}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but {str(content)[:40]!r}; {_MEND}")
    return content


def _cached_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit of a model in the hub's cache, whose files lie in a folder of that name."""
    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None
