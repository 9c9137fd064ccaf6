"""General text for second moments: a file, a text corpus that comes with the package, or a data set of the hub."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horen_bench.errors import UserError, reason_of
from horen_bench.models.weights import EMBEDDED
from horen_bench.paths import resource

_WHERE = "method.statistics.corpus"
_SAMPLE_SEED = 1  # the published code's, whatever the run's seed


def read_corpus(source: str, n_texts: int) -> list[str]:
    """The texts of a corpus, or a fixed sample of `n_texts` of them, in the order of the sample.

    Args:
        source: `embedded:PATH` inside the package's data; a local `.txt` (one text a line), `.jsonl` (field `text`) or
            `.json` (a list of strings); or a hub id, with a configuration behind a colon, e.g.
            `wikimedia/wikipedia:20231101.en` (field `text`, split `train`).
        n_texts: most texts.

    Raises:
        UserError: no such corpus, or it holds no text.
    """
    rows = read_rows(source, _WHERE)
    order = list(range(len(rows)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    texts = [text for i in order[:n_texts] if (text := text_of(rows[i], _WHERE)).strip()]
    if not texts:
        raise UserError(f"{_WHERE}={source}: it holds no text")
    return texts


def read_rows(source: str, where: str) -> Sequence[Any]:
    """The items of a corpus in its own order: strings, or mappings with a text in some of their fields.

    Args:
        source: as for `read_corpus`.
        where: the configuration key that holds it, for messages.

    Raises:
        UserError: no such corpus.
    """
    if source.startswith(EMBEDDED):
        return _read_file(resource("data") / source.removeprefix(EMBEDDED), f"{where}={source}")
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".json", ".jsonl"):
        return _read_file(path, f"{where}={source}")
    return _load_from_hub(source, f"{where}={source}")


def text_of(row: Any, where: str) -> str:
    """The text of an item.

    Raises:
        UserError: it is neither a string nor a mapping with a field `text`.
    """
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f"{where}: every item must be a text or have a field 'text'")
    return text


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 file that hold something, with or without a byte order mark.

    Only a line break ends a line: texts, and JSON, may hold other characters that Unicode counts as one (U+2028).

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _read_file(path: Path, named: str) -> Sequence[Any]:
    try:
        if path.suffix == ".json":
            rows: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))
            return rows
        lines = lines_of(path)
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise UserError(f"{named} cannot be read ({error})") from error


def _load_from_hub(source: str, named: str) -> Sequence[Any]:
    name, _, configuration = source.partition(":")
    advice = "give a local .txt, .jsonl or .json file instead"
    try:
        from datasets import load_dataset  # noqa: PLC0415 - only whoever asks for a hub corpus needs it
    except ImportError as error:
        raise UserError(f"{named} is read with the package datasets; pip install datasets, or {advice}") from error
    try:
        rows: Sequence[Any] = load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the hub's client raises what it likes
        reason = reason_of(error)
        raise UserError(f"{named} cannot be loaded ({reason}); {advice}") from error
    return rows
