"""Reading files record by record, and the sentence about each thing that is not of their schema."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import Probe
from horen_bench.datasets.records import Record, clean, read_records

NAN = float("nan")
SEPARATORS = ["\u2028", "\u2029", "\x85"]  # line ends to Unicode, plain characters to JSON

Refusal = Callable[[Callable[[], object]], str]


def record(**values: Any) -> Record:
    return Record(values, 7, "F.json")


# --- Files -------------------------------------------------------------------------------------------------


def test_a_json_list_is_read_in_file_order(written: Callable[..., Path]) -> None:
    assert read_records(written([{"a": 1}, {"b": "é"}]), "") == [{"a": 1}, {"b": "é"}]


def test_a_jsonl_file_is_read_line_by_line_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n{"b": "x\\u2028y"}\n')
    assert read_records(path, "") == [{"a": 1}, {"b": "x\u2028y"}]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_a_line_break_ends_a_record(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(f'{{"a": "x{separator}y"}}\n{{"a": "z"}}'.encode())
    assert read_records(path, "") == [{"a": f"x{separator}y"}, {"a": "z"}]


@pytest.mark.parametrize(("name", "text"), [("records.json", '[{"a": "é"}]'), ("records.jsonl", '{"a": "é"}')])
def test_a_byte_order_mark_is_no_damage(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert read_records(path, "") == [{"a": "é"}]


def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "none.json"
    assert refusal(lambda: read_records(path, "ask for it")) == f"{path} does not exist; ask for it"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    found = refusal(lambda: read_records(tmp_path, "ask for it"))
    assert found == f"{tmp_path} cannot be read (Is a directory); ask for it"


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_file_is_refused(content: bytes, tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    assert refusal(lambda: read_records(path, "ask for it")) == f"{path} is empty; ask for it"


def test_a_list_without_records_is_refused(written: Callable[..., Path], refusal: Refusal) -> None:
    path = written([])
    assert refusal(lambda: read_records(path, "ask for it")) == f"{path} holds no record; ask for it"


@pytest.mark.parametrize(
    ("content", "kind"),
    [({"a": []}, "an object"), ("text", "a string"), (None, "null"), (3.5, "3.5"), (True, "True")],
)
def test_something_else_than_a_list_is_refused_by_its_kind(
    content: object, kind: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written(content)
    assert refusal(lambda: read_records(path, "")) == f"{path}: a JSON list of records is needed, got {kind}"


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b"[", "record 0", "Expecting value"),
        (b'[{"a": 1}, {"b": 2}, {"c": "th', "record 2", "Unterminated string starting at"),
        (b'[{"a": 1}, {"b": 2}', "record 2", "Expecting ',' delimiter"),
        (b'[{"a": 1},\n {"b": 2 "c": 3}, {"d": 4}]', "record 1", "Expecting ',' delimiter"),
        (b'[{"a": 1}] and more', "record 1", "Extra data"),
        (b'{"a": [1, 2', "record 2", "Expecting ',' delimiter"),
    ],
)
def test_damaged_json_is_refused_by_the_record_that_it_breaks_off_in(
    content: bytes, place: str, reason: str, tmp_path: Path, refusal: Refusal
) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    assert refusal(lambda: read_records(path, "")) == (
        f"{path}: JSON breaks off or is damaged in {place} ({reason}); the file may be incomplete, get it again"
    )


def test_a_damaged_line_of_a_jsonl_file_is_refused_by_its_number(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert refusal(lambda: read_records(path, "")) == (
        f"{path}: JSON breaks off or is damaged in record 2 (Expecting value); the file may be incomplete, get it again"
    )


def test_bytes_that_are_not_utf8_are_refused_by_record(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "records.json"
    path.write_bytes('[{"a": 1}, {"b": "Köln"}]'.encode("latin-1"))
    assert refusal(lambda: read_records(path, "")).startswith(
        f"{path}: JSON breaks off or is damaged in record 1 ('utf-8' codec can't decode byte 0xf6 in position 19: "
    )


def test_json_nested_beyond_reason_is_refused_like_other_damage(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(b'[{"a": 1}, ' + b"[" * 100_000)
    assert refusal(lambda: read_records(path, "")).startswith(f"{path}: JSON breaks off or is damaged in record 1 (")


def test_nan_as_pandas_writes_it_can_be_read(written: Callable[..., Path]) -> None:
    path = written([{"loc": NAN, "src": "é"}])
    assert b"NaN" in path.read_bytes()
    (value,) = read_records(path, "")
    assert Record.of(value, 0, "F.json").optional("loc") is None
    assert Record.of(value, 0, "F.json").optional("src") == "é"


@pytest.mark.parametrize(
    ("value", "kind"), [([], "a list"), ("text", "a string"), (None, "null"), (3.5, "3.5"), (True, "True")]
)
def test_a_record_that_is_no_object_is_refused_by_number_and_kind(value: object, kind: str, refusal: Refusal) -> None:
    assert refusal(lambda: Record.of(value, 4, "F.json")) == f"F.json: record 4 must be an object, got {kind}"


# --- Texts -------------------------------------------------------------------------------------------------


def test_texts_are_stripped_and_composed() -> None:
    assert record(a=" \u00a0 Szlez\u0061\u0301k\n").text("a") == "Szlez\u00e1k"
    assert record(a=["e\u0301 ", " b"]).texts("a") == ("\u00e9", "b")
    assert clean("\tplain ") == "plain"


@pytest.mark.parametrize("values", [{}, {"a": None}, {"a": ""}, {"a": " \u00a0\n"}, {"a": NAN}])
def test_a_missing_null_empty_blank_or_nan_text_is_none_where_it_may_be_missing(values: dict[str, Any]) -> None:
    assert record(**values).optional("a") is None


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"b": 1, "c": 2}, "nothing; its fields are b, c"),
        ({}, "nothing; its fields are none"),
        ({"a": None}, "None"),
        ({"a": " "}, "' '"),
        ({"a": NAN}, "nan"),
    ],
)
def test_a_text_that_must_be_there_is_refused_where_it_is_missing(
    values: dict[str, Any], found: str, refusal: Refusal
) -> None:
    sentence = refusal(lambda: record(**values).text("a"))
    assert sentence == f"F.json: record 7, field 'a' must be a non-empty string, got {found}"


@pytest.mark.parametrize(
    ("value", "found"),
    [(3, "3"), (True, "True"), (["x"], "['x']"), ({"x": 1}, "{'x': 1}"), (float("inf"), "inf")],
)
def test_something_else_than_a_text_is_refused(value: object, found: str, refusal: Refusal) -> None:
    expected = f"F.json: record 7, field 'a' must be a string of valid Unicode, got {found}"
    assert refusal(lambda: record(a=value).optional("a")) == expected
    assert refusal(lambda: record(a=value).text("a")) == expected


def test_half_a_surrogate_pair_is_refused_because_no_tokenizer_reads_it(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(rb'[{"whole": "\ud83d\ude00", "half": "a \ud83d", "list": ["\ude00"]}]')
    (value,) = read_records(path, "")
    found = Record.of(value, 0, "F.json")
    assert found.text("whole") == "😀"
    assert refusal(lambda: found.text("half")) == (
        r"F.json: record 0, field 'half' must be a string of valid Unicode, got 'a \ud83d'"
    )
    assert refusal(lambda: found.texts("list")) == (
        r"F.json: record 0, field 'list' must be a list of non-empty strings, got ['\ude00']"
    )


def test_a_long_value_is_cut_in_the_sentence_about_it(refusal: Refusal) -> None:
    sentence = refusal(lambda: record(a=["x" * 10_000]).text("a"))
    assert sentence.endswith(", got ['" + "x" * 78)


# --- Texts of which nothing is seen ------------------------------------------------------------------------

UNSEEN = [
    "\u200b",
    "\u200b \ufeff\u2060",
    "\u00ad",
    "\x00\x07",
    "\u2800\u3164",
    "\ufe0f",
    "\u202e\u200f",
    "\u034f",
    "\u2028",
]
SEEN = ["a", "\u200ba", "。", "é", "\U0001f600\ufe0f", "क\u200dष", "\u0301", "\ue000"]


@pytest.mark.parametrize("text", UNSEEN)
def test_a_text_of_which_nothing_is_seen_is_no_text(text: str, refusal: Refusal) -> None:
    assert record(a=text).optional("a") is None
    assert record(q=text, a="x").probe("q", "a") == ()
    assert refusal(lambda: record(a=text).text("a")).startswith(
        "F.json: record 7, field 'a' must be a non-empty string, got "
    )
    assert "field 'a' must be a list of non-empty strings" in refusal(lambda: record(a=["x", text]).texts("a"))


@pytest.mark.parametrize("text", SEEN)
def test_a_text_with_one_visible_character_is_kept_as_it_is(text: str) -> None:
    assert record(a=text).text("a") == text
    assert record(a=[text]).texts("a") == (text,)


# --- Ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "identity"),
    [(10**30, "1" + "0" * 30), (-(2**70), "-1180591620717411303424"), (7, "7"), (0, "0"), ("Q42", "Q42"), (2.5, "2.5")],
)
def test_an_id_is_written_out_whatever_its_size(value: object, identity: str, written: Callable[..., Path]) -> None:
    (values,) = read_records(written([{"id": value, "loc": NAN}]), "")
    assert Record.of(values, 3, "F.json").id("id", 3) == identity
    (values,) = read_records(written([{"id": value}]), "")
    assert Record.of(values, 3, "F.json").id("id", 3) == identity


def test_two_long_ids_that_differ_in_their_last_digit_stay_two(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f'{{"id": {10**30}}}\n{{"id": {10**30 + 1}}}\n')
    first, second = (Record.of(values, i, "F.jsonl").id("id", i) for i, values in enumerate(read_records(path, "")))
    assert int(second) - int(first) == 1


@pytest.mark.parametrize("values", [{}, {"id": None}, {"id": NAN}])
def test_a_record_without_an_id_is_named_by_its_position(values: dict[str, Any]) -> None:
    assert record(**values).id("id", 7) == "7"


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, "\ud83d"])
def test_an_id_that_is_neither_text_nor_a_number_is_refused(value: object, refusal: Refusal) -> None:
    assert refusal(lambda: record(id=value).id("id", 7)).startswith("F.json: record 7, field 'id' must be ")


# --- Lists, objects, probes --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"a": None}, {"a": NAN}, {"a": []}])
def test_a_list_may_be_missing(values: dict[str, Any]) -> None:
    assert list(record(**values).items("a")) == []
    assert record(**values).texts("a") == ()


@pytest.mark.parametrize("value", ["text", 3, {"x": 1}])
def test_something_else_than_a_list_in_a_field_is_refused(value: object, refusal: Refusal) -> None:
    expected = f"F.json: record 7, field 'a' must be a list, got {value!r}"
    assert refusal(lambda: record(a=value).items("a")) == expected
    assert refusal(lambda: record(a=value).texts("a")) == expected


@pytest.mark.parametrize("item", ["", "  ", None, 3, NAN, ["x"]])
def test_a_list_of_texts_holds_non_empty_strings_only(item: object, refusal: Refusal) -> None:
    assert refusal(lambda: record(a=["x", item]).texts("a")) == (
        f"F.json: record 7, field 'a' must be a list of non-empty strings, got ['x', {item!r}]"
    )


def test_nested_fields_are_named_by_their_path(refusal: Refusal) -> None:
    outer = record(a={"b": [{"c": "x"}, {"d": 2}]})
    assert outer.inside("a").inside("b", at=0).text("c") == "x"
    assert refusal(lambda: outer.inside("a").inside("b", at=1).text("d")) == (
        "F.json: record 7, field 'a.b[1].d' must be a string of valid Unicode, got 2"
    )


@pytest.mark.parametrize("value", [None, [], "x", 3, NAN])
def test_something_else_than_a_nested_object_is_refused(value: object, refusal: Refusal) -> None:
    assert refusal(lambda: record(a=value).inside("a")) == (
        f"F.json: record 7, field 'a' must be an object, got {value!r}"
    )


@pytest.mark.parametrize("value", [None, [], [{}], [{}, 3]])
def test_a_list_too_short_or_without_an_object_there_is_refused(value: object, refusal: Refusal) -> None:
    assert refusal(lambda: record(a=value).inside("a", at=1)) == (
        f"F.json: record 7, field 'a' must be a list with an object at 1, got {value!r}"
    )


def test_a_field_name_with_a_bracket_is_only_a_name(refusal: Refusal) -> None:
    assert record(**{"a[b": {"c": "x"}}).inside("a[b").text("c") == "x"
    assert refusal(lambda: record(**{"a[0]": 1}).inside("a[0]")).endswith("field 'a[0]' must be an object, got 1")


@pytest.mark.parametrize("prompt", [None, "", "  ", NAN])
def test_no_prompt_means_no_probe_whatever_the_answer(prompt: object) -> None:
    assert record(q=prompt, a="x").probe("q", "a") == ()
    assert record(q=prompt, a=None).probe("q", "a") == ()
    assert record(a=3).probe("q", "a") == ()


def test_a_prompt_makes_a_probe_and_needs_an_answer(refusal: Refusal) -> None:
    assert record(q=" Q ", a=" A ").probe("q", "a") == (Probe("Q", "A"),)
    assert refusal(lambda: record(q="Q", a="").probe("q", "a")) == (
        "F.json: record 7, field 'a' must be a non-empty string, got ''"
    )


def test_every_character_of_a_file_may_be_outside_the_basic_plane(written: Callable[..., Path]) -> None:
    path = written([{"a": "𝔸😀"}])
    assert json.loads(path.read_bytes()) == read_records(path, "")
