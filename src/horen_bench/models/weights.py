"""Where a model's weights are: in the package, in a folder, or in the hub's cache; needs no torch."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from horen_bench.errors import UserError
from horen_bench.paths import resource

EMBEDDED = "embedded:"


def model_source(hub_id: str) -> str:
    """What transformers loads: the folder of an embedded model, else the id as given.

    Raises:
        UserError: a folder that is not there, or no such embedded model.
    """
    if hub_id.startswith(("/", ".", "~")) and not Path(hub_id).expanduser().is_dir():
        raise UserError(f"model.hub_id={hub_id}: there is no such folder; give a hub id or an existing folder")
    if not hub_id.startswith(EMBEDDED):
        return str(Path(hub_id).expanduser()) if hub_id.startswith("~") else hub_id
    folder = resource("data") / hub_id.removeprefix(EMBEDDED)
    if not folder.is_dir():
        raise UserError(f"model.hub_id={hub_id}: no such embedded model; the package brings embedded:tiny")
    return str(folder)


def weights_at_hand(hub_id: str, revision: str | None = None) -> bool:
    """Whether a model's weights are on this machine: a folder, or in the hub's cache; nothing is fetched."""
    if hub_id.startswith(EMBEDDED) or Path(hub_id).expanduser().is_dir():
        return True
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str) for name in names)
