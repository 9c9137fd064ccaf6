"""Reading published dataset files record by record, and refusing by name what is not of their schema."""

import csv
import json
import math
import re
import unicodedata
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import orjson

from horen_bench.cases import Probe
from horen_bench.errors import UserError, reason_of

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can escape it, no tokenizer can read it
_DIALECTS: dict[str, type[csv.Dialect]] = {".csv": csv.excel, ".tsv": csv.excel_tab}
_LONG_NUMBER = re.compile(rb"\d{20}")  # orjson rounds whole numbers beyond 64 bits
# Nothing is seen of characters of these categories (controls, formats such as zero-width spaces, separators), nor of
# these letters and marks (Unicode: Default_Ignorable_Code_Point, and the empty Braille pattern).
_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def read_records(path: Path, how_to_get: str) -> list[Any]:
    """The records of a JSON list, or of a `.jsonl`, `.csv`, `.tsv` or `.parquet` file.

    `NaN` as pandas writes it is read as a missing value, and so is an empty cell. A byte order mark may stand in front.

    Args:
        path: the file.
        how_to_get: end of the sentence for a missing file: where to get it.

    Raises:
        UserError: no such file, an empty one, one that breaks off, or no list of records.
    """
    try:
        content = path.read_bytes().removeprefix(BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {how_to_get}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {how_to_get}") from error
    if not content.strip():
        raise UserError(f"{path} is empty; {how_to_get}")
    if path.suffix in (".csv", ".tsv"):
        return _csv_rows(content, path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".jsonl":
        return [_parsed(line, path, i) for i, line in enumerate(content.split(b"\n")) if line.strip()]
    records = _parsed(content, path, None)
    if not isinstance(records, list):
        raise UserError(f"{path}: a JSON list of records is needed, got {_kind(records)}")
    if not records:
        raise UserError(f"{path} holds no record; {how_to_get}")
    return records


@dataclass(frozen=True, slots=True)
class Record:
    """One record, or an object inside one, with words for what is wrong with it.

    Attributes:
        values: the parsed JSON object.
        index: position of the record in its file, from 0.
        where: the file.
        inner: path from the record to this object, ending in a dot; empty for the record itself.
    """

    values: Mapping[str, Any]
    index: int
    where: str
    inner: str = ""

    @classmethod
    def of(cls, value: object, index: int, where: str) -> "Record":
        """The record in a parsed JSON value.

        Raises:
            UserError: it is no object.
        """
        if not isinstance(value, dict):
            raise UserError(f"{where}: record {index} must be an object, got {_kind(value)}")
        return cls(value, index, where)

    def value(self, field: str) -> Any:
        """Whatever is there; None where it is missing, null or NaN."""
        value = self.values.get(field)
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, field: str) -> str:
        """A text that must be there; stripped, in Unicode NFC.

        Raises:
            UserError: it is missing, empty, or no string.
        """
        found = self.optional(field)
        return found if found is not None else self.refuse(field, "a non-empty string")

    def optional(self, field: str) -> str | None:
        """A text that may be missing: null, NaN, an absent field and a text of which nothing is seen are all None.

        Raises:
            UserError: it is something else than a string.
        """
        value = self.value(field)
        if value is None:
            return None
        if not _is_text(value):
            self.refuse(field, "a string of valid Unicode")
        return clean(value) if _is_seen(value) else None

    def id(self, field: str, otherwise: int) -> str:
        """A name or number of the record; `otherwise` where it has none.

        Raises:
            UserError: it is neither text nor a number.
        """
        value = self.value(field)
        if value is None:
            return str(otherwise)
        if isinstance(value, bool) or not (isinstance(value, int | float) or _is_text(value)):
            self.refuse(field, "a text or a number")
        return str(value)

    def items(self, field: str) -> Sequence[Any]:
        """A list that may be missing.

        Raises:
            UserError: it is something else than a list.
        """
        value = self.value(field)
        if value is None:
            return ()
        return value if isinstance(value, list) else self.refuse(field, "a list")

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of non-empty strings that may be missing.

        Raises:
            UserError: it is no list, or an item is no non-empty string.
        """
        items = self.items(field)
        if not all(_is_text(item) and _is_seen(item) for item in items):
            self.refuse(field, "a list of non-empty strings")
        return tuple(map(clean, items))

    def inside(self, field: str, at: int | None = None) -> "Record":
        """A nested object that must be there: the field itself, or item `at` of a list.

        Raises:
            UserError: it is missing, or no object.
        """
        if at is None:
            value, name = self.values.get(field), field
        else:
            value, name = next(iter(self.items(field)[at : at + 1]), None), f"{field}[{at}]"
        if not isinstance(value, dict):
            self.refuse(field, "an object" if at is None else f"a list with an object at {at}")
        return Record(value, self.index, self.where, f"{self.inner}{name}.")

    def probe(self, prompt_field: str, answer_field: str) -> tuple[Probe, ...]:
        """The probe of two fields, or nothing where the prompt is missing.

        Raises:
            UserError: there is a prompt, but no answer to it.
        """
        prompt = self.optional(prompt_field)
        return (Probe(prompt, self.text(answer_field)),) if prompt else ()

    def refuse(self, field: str, expected: str) -> NoReturn:
        """Raise the sentence about a field.

        Raises:
            UserError: always.
        """
        if field in self.values:
            found = f"{self.values[field]!r}"[:80]
        else:
            found = f"nothing; its fields are {', '.join(map(str, self.values)) or 'none'}"
        raise UserError(
            f"{self.where}: record {self.index}, field '{self.inner}{field}' must be {expected}, got {found}"
        )


def clean(text: str) -> str:
    """A text without surrounding white space, in Unicode NFC; ASCII is NFC already."""
    stripped = text.strip()
    return stripped if stripped.isascii() else unicodedata.normalize("NFC", stripped)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and (value.isascii() or _SURROGATE.search(value) is None)


def _is_seen(text: str) -> bool:
    """Whether there is a character that can be seen."""
    return any(unicodedata.category(char) not in _UNSEEN_CATEGORIES and not _UNSEEN.match(char) for char in text)


def _parsed(content: bytes, path: Path, line: int | None) -> Any:
    if _LONG_NUMBER.search(content) is None:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            pass
    try:  # the standard library also reads NaN and whole numbers of any size
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        place = f"record {line}" if line is not None else f"record {_n_whole_records(content)}"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"{path}: JSON breaks off or is damaged in {place} ({reason}); the file may be incomplete, get it again"
        ) from error


def _csv_rows(content: bytes, path: Path) -> list[Any]:
    """The rows of a table with a header; a row with more or fewer cells than it has is refused."""
    try:
        rows = csv.reader(StringIO(content.decode(), newline=""), _DIALECTS[path.suffix], strict=True)
        header, *cells = [row for row in rows if row]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} breaks off or is damaged ({error}); look at its quotation marks") from error
    for i, row in enumerate(cells):
        if len(row) != len(header):
            raise UserError(
                f"{path}: record {i} has {len(row)} cells, its header {len(header)} ({', '.join(header)}); put texts "
                "that hold the separator into quotation marks"
            )
    return [dict(zip(header, row, strict=True)) for row in cells]


def _parquet_rows(path: Path) -> list[Any]:
    from pyarrow import ArrowException  # noqa: PLC0415 - a third of a second that other files do not need
    from pyarrow.parquet import read_table  # noqa: PLC0415

    try:
        rows: list[Any] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = reason_of(error)
        raise UserError(f"{path} is damaged or no Parquet file ({reason}); write it again") from error
    return rows


def _n_whole_records(content: bytes) -> int:
    """How many records of a damaged JSON list can be read before the damage."""
    try:
        text = content.decode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        text = content[: error.start].decode(errors="surrogatepass")
    decoder = json.JSONDecoder()
    position, n = text.find("[") + 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return n
        n += 1


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"{value!r}"[:40])
