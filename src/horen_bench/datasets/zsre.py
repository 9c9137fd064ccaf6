"""ZsRE in the schema of Mitchell et al. (`zsre_mend_*.json`): a JSON list of question-answer edits.

| field | becomes |
| --- | --- |
| `src` | prompt |
| `answers[0]` or `alt` | target (`target=answers`: the HoReN release; `target=alt`: EasyEdit, WISE) |
| `rephrase` | paraphrase |
| `subject` | subject |
| `loc`, `loc_ans` | locality, verbatim ("nq question: ..." without a question mark) |
| `hard_loc`, `extra` | our own: further probes by name, each `{"prompt": ..., "answer": ...}` |
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from horen_bench.cases import EditCase, Probe
from horen_bench.errors import UserError

Target = Literal["answers", "alt"]


class Zsre:
    """A ZsRE edit file.

    Args:
        path: the JSON file.
        target: which field is written: the true answer (`answers`) or the counterfactual one (`alt`).
    """

    def __init__(self, path: str | Path, target: Target) -> None:
        if target not in ("answers", "alt"):
            raise UserError(f"dataset.target must be answers or alt, got {target!r}")
        self.path = Path(path)
        self.target: Target = target

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` records in file order.

        Raises:
            UserError: the file is missing or not of this schema, or holds fewer than `n` records.
        """
        records = _read(self.path)
        if n > len(records):
            raise UserError(f"n={n} is more than {self.path} holds; write n={len(records)} or less")
        return [case_of(record, i, self.target, str(self.path)) for i, record in enumerate(records[:n])]


def case_of(record: object, index: int, target: Target, where: str) -> EditCase:
    """One record as a case.

    Args:
        record: the parsed JSON value.
        index: its position in the stream, from 0; becomes the id.
        target: which field is written.
        where: the source, for messages.

    Raises:
        UserError: the record is not of the schema; the message names record and field.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: record {index} must be an object, got {type(record).__name__}")

    def text(field: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{where}: record {index}, field '{field}' must be a non-empty string, got {value!r}"
            )
        return value.strip()

    return EditCase(
        id=str(index),
        prompt=text("src", record.get("src")),
        target=text(target, _target_value(record, target)),
        subject=text("subject", record["subject"]) if record.get("subject") is not None else None,
        paraphrases=(text("rephrase", record["rephrase"]),) if record.get("rephrase") else (),
        locality=(Probe(text("loc", record["loc"]), text("loc_ans", record.get("loc_ans"))),)
        if record.get("loc")
        else (),
        hard_locality=_probes(record, "hard_loc", text),
        extras=_probes(record, "extra", text),
    )


def _target_value(record: Mapping[str, Any], target: Target) -> object:
    if target == "alt":
        return record.get("alt")
    answers = record.get("answers")
    return answers[0] if isinstance(answers, Sequence) and not isinstance(answers, str) and answers else None


def _probes(record: Mapping[str, Any], field: str, text: Any) -> dict[str, tuple[Probe, ...]]:
    families = record.get(field) or {}
    if not isinstance(families, Mapping):
        text(field, families)
    return {
        name: (
            Probe(
                text(f"{field}.{name}.prompt", probe.get("prompt")),
                text(f"{field}.{name}.answer", probe.get("answer")),
            ),
        )
        for name, probe in families.items()
    }


def _read(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give the path of your ZsRE edit file with dataset.path="
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a JSON list of records, got {type(records).__name__}")
    return records
