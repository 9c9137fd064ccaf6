"""ZsRE in the schema of Mitchell et al. (`zsre_mend_*.json`): a JSON list of question-answer edits.

| field | becomes |
| --- | --- |
| `src` | prompt |
| `answers[0]` or `alt` | target (`target=answers`: the HoReN release; `target=alt`: EasyEdit, WISE) |
| `rephrase` | paraphrase |
| `subject` | subject |
| `loc`, `loc_ans` | locality: a Natural Questions string, "nq question: ..." without a question mark |
| `hard_loc`, `extra` | our own: further probes by name, each `{"prompt": ..., "answer": ...}` |

The release takes the locality of edit `i` from record `i` of a second file, the train split.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Conflicts, Dataset, Text
from horen_bench.datasets.base import cases_of_file, stream_head
from horen_bench.datasets.records import Record
from horen_bench.errors import UserError

Target = Literal["answers", "alt"]
LocalitySource = Literal["train", "record"]

HOW_TO_GET = "run python -m horen_bench.datasets fetch zsre, or name your file with dataset.path="
_HOW_TO_GET_LOCALITY = (
    "the locality of the edits is read there; run python -m horen_bench.datasets fetch zsre, name your train split "
    "with dataset.train_path=, or write dataset.locality_source=record"
)
_NQ = "nq question: "


class Zsre(Dataset):
    """A ZsRE edit file, as in the HoReN release."""

    files: ClassVar[frozenset[str]] = frozenset({"path", "train_path"})

    name: Text = "zsre"
    label: Text = "ZsRE"
    path: Text
    """The edit file."""
    train_path: Text | None = None
    """The file whose record `i` gives the locality of edit `i`; read only for `locality_source=train`."""
    target: Target = "answers"
    """The field that is written: the true answer (`answers`) or the counterfactual one (`alt`)."""
    locality_source: LocalitySource = "train"
    """`train`, as the release does, or `record`: the edit's own `loc`."""
    strip_nq_prefix: bool = False
    """Leave out "nq question: " from locality prompts (EasyEdit's loader does)."""
    append_question_mark: bool = False
    """End locality prompts with "?" (ROME and UltraEdit do)."""
    conflicts: Conflicts = "keep"
    """What becomes of prompts that are given different targets."""

    @model_validator(mode="after")
    def _locality_has_a_file(self) -> Self:
        if self.locality_source == "train" and self.train_path is None:
            raise ValueError(
                "dataset.locality_source=train needs dataset.train_path=; or write dataset.locality_source=record"
            )
        return self

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` records in file order."""
        return stream_head(self._read, n, self.conflicts, self.path)

    def _read(self, enough: int | None) -> list[EditCase]:
        edits = cases_of_file(Path(self.path), self._case, enough, HOW_TO_GET)
        if self.train_path is None or self.locality_source == "record":
            return edits
        probes = cases_of_file(Path(self.train_path), self._locality_alone, len(edits), _HOW_TO_GET_LOCALITY)
        if len(probes) < len(edits):
            fewer = f"n={len(probes)} or less, or " if enough is not None else ""  # else all edits are wanted
            raise UserError(
                f"{self.train_path} has locality for {len(probes)} of {len(edits)} edits; write {fewer}"
                "dataset.locality_source=record"
            )
        return [replace(edit, locality=probe.locality) for edit, probe in zip(edits, probes, strict=True)]

    def _case(self, record: Record) -> EditCase:
        return zsre_case(record, self.target, self._wording())

    def _locality_alone(self, record: Record) -> EditCase:
        return EditCase(str(record.index), "", "", locality=self._wording().of(record))

    def _wording(self) -> "NqWording":
        return NqWording(self.strip_nq_prefix, self.append_question_mark)


@dataclass(frozen=True, slots=True)
class NqWording:
    """How the Natural Questions strings of the locality fields are worded; verbatim by default."""

    strip_prefix: bool = False
    append_question_mark: bool = False

    def of(self, record: Record) -> tuple[Probe, ...]:
        """The record's locality probe, or nothing."""
        return tuple(Probe(self._worded(probe.prompt), probe.answer) for probe in record.probe("loc", "loc_ans"))

    def _worded(self, prompt: str) -> str:
        prompt = prompt.removeprefix(_NQ) if self.strip_prefix else prompt
        return f"{prompt}?" if self.append_question_mark and not prompt.endswith("?") else prompt


def zsre_case(record: Record, target: Target, wording: NqWording) -> EditCase:
    """A record as a case.

    Raises:
        UserError: a field is not of the schema; the sentence names file, record and field.
    """
    prompt, rephrase = record.text("src"), record.optional("rephrase")
    answer = record.text("alt") if target == "alt" else _first_answer(record)
    return EditCase(
        id=str(record.index),
        prompt=prompt,
        target=answer,
        subject=record.optional("subject"),
        paraphrases=(Probe(rephrase, answer),) if rephrase else (),
        locality=wording.of(record),
        hard_locality=_named_probes(record, "hard_loc"),
        extras=_named_probes(record, "extra"),
    )


def _first_answer(record: Record) -> str:
    answers = record.texts("answers")
    return answers[0] if answers else record.refuse("answers", "a list with an answer")


def _named_probes(record: Record, field: str) -> dict[str, tuple[Probe, ...]]:
    if record.value(field) is None:
        return {}
    families = record.inside(field)
    return {name: _required_probe(families.inside(name)) for name in families.values}


def _required_probe(record: Record) -> tuple[Probe, ...]:
    return (Probe(record.text("prompt"), record.text("answer")),)
