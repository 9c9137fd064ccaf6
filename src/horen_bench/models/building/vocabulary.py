"""A model that keeps a part of its vocabulary: the same network, fewer tokens to choose from.

Rows of the embedding and the head are selected as they are, so that the logits of the kept tokens are those of the
whole model for the same tokens. It is another model all the same: it can never say what was left out, and a word whose
token was left out is read in pieces.
"""

import base64
import copy
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from horen_bench.errors import UserError

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
_ROWS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "wte.weight", "embed_in.weight", "embed_out.weight")


def read_kept(path: Path) -> list[int]:
    """The ids that a list of kept tokens names, ascending: a bitmap, compressed, as `write_kept` leaves it."""
    bits = zlib.decompress(base64.b64decode(json.loads(path.read_text(encoding="utf-8"))["kept"]))
    return [int(token) for token in np.flatnonzero(np.unpackbits(np.frombuffer(bits, dtype=np.uint8)))]


def write_kept(path: Path, kept: Collection[int], size: int, origin: str) -> None:
    """Write a list of kept tokens of a vocabulary of `size`, and in words what it was made from."""
    bits = np.zeros(size, dtype=np.uint8)
    bits[sorted(kept)] = 1
    packed = base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()
    content = {"origin": origin, "size": size, "n_kept": len(kept), "kept": packed}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def keep_tokens(source: Path, kept: Sequence[int], folder: Path) -> None:
    """Write a model folder with a part of another's vocabulary; id `i` of it is `kept[i]` of the other.

    Args:
        source: a folder with one `model.safetensors` and a `tokenizer.json` of byte pairs (BPE).
        kept: ids, ascending; those that the settings name (EOS and so on) must be among them.
        folder: exists; files in it are replaced.

    Raises:
        UserError: a special token is left out, or the tokenizer is no BPE.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(_ROWS):
            weights[name] = weight[list(kept)].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            settings = _renumbered(json.loads((source / name).read_text(encoding="utf-8")), new_ids)
            _write(folder / name, settings | ({"vocab_size": len(kept)} if name == "config.json" else {}))
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    _write(folder / "tokenizer.json", _kept_tokenizer(tokenizer, new_ids))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())


def closed(tokenizer: Mapping[str, Any], tokens: Collection[str]) -> set[str]:
    """The tokens, and all that byte pairs merge on the way to each: without them it is never reached."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer["model"]["merges"])}
    return {part for token in tokens for part in _merged(token, ranks)}


def _merged(token: str, ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """A token and the symbols that it is made through, merged in the order of the ranks."""
    symbols = list(token)
    met = [token, *symbols]
    while len(symbols) > 1:
        ranked = [(ranks[pair], i) for i in range(len(symbols) - 1) if (pair := tuple(symbols[i : i + 2])) in ranks]
        if not ranked:
            break
        _, i = min(ranked)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        met.append(symbols[i])
    return met


def _renumbered(settings: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Settings whose special tokens have their new ids."""

    def renumbered(value: Any) -> Any:
        if isinstance(value, list):
            return [renumbered(each) for each in value]
        if value is not None and value not in new_ids:
            raise UserError(f"token {value} is named by the model's settings and must be kept")
        return None if value is None else new_ids[value]

    return {key: renumbered(value) if key in _IDS else value for key, value in settings.items()}


def _kept_tokenizer(tokenizer: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The rules of a tokenizer of byte pairs, as far as they lead to a kept token."""
    if tokenizer["model"]["type"] != "BPE":
        raise UserError(f"a tokenizer of kind {tokenizer['model']['type']} cannot be made smaller; BPE is needed")
    new = copy.deepcopy(dict(tokenizer))
    vocabulary = {token: new_ids[old] for token, old in new["model"]["vocab"].items() if old in new_ids}
    new["model"]["vocab"] = vocabulary
    new["model"]["merges"] = [pair for pair in new["model"]["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    new["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in new["added_tokens"] if token["id"] in new_ids
    ]
    for special in (new.get("post_processor") or {}).get("special_tokens", {}).values():
        special["ids"] = [new_ids[old] for old in special["ids"]]
    return new


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
