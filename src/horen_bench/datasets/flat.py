"""One fact a record, with the field names that published files and tables of one's own have: `dataset=records`.

| what | fields, the first that is there |
| --- | --- |
| prompt | `prompt`, `src`, `question` |
| target | `target_new`, `target`, `answer` |
| subject | `subject` |
| paraphrases, answered by the target | `rephrase_prompt`, `rephrase`, `paraphrase`, a text; `paraphrases`, a list |
| locality | `locality_prompt` with `locality_ground_truth`; `locality`, a list of objects |
| hard locality by family | `locality`, an object with a list of objects for each family (KnowEdit) |
| extras by family | `portability`, likewise |

An object of a list has its prompt in `prompt` or `loc`, its answer in `ground_truth`, `answer` or `loc_ans`; of several
answers the first counts. Probes whose prompt is missing or empty are none.

A record with `requested_rewrite` is one of CounterFact's own layout: the prompt has `{}` for its subject, `target_new`
and `target_true` are objects with the text in `str`, `paraphrase_prompts` are paraphrases, `neighborhood_prompts`
locality (answered by `target_true`), and `attribute_prompts` the hard locality `attribute` (by `target_new`, which is
true of them). Of a list of rewrites (MQuAKE) the first is taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Conflicts, Dataset, Text
from horen_bench.datasets.base import cases_of_file, stream_head
from horen_bench.datasets.records import Record
from horen_bench.errors import UserError

HOW_TO_GET = "name your file with dataset.path="

_PROMPTS, _TARGETS = ("prompt", "src", "question"), ("target_new", "target", "answer")
_PARAPHRASES = ("rephrase_prompt", "rephrase", "paraphrase")
_PROBE_PROMPTS, _PROBE_ANSWERS = ("prompt", "loc"), ("ground_truth", "answer", "loc_ans")
_OF_REWRITES = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts")
_LOCALITY = ("locality_prompt", "locality_ground_truth", "locality")
_READ = {*_PROMPTS, *_TARGETS, *_PARAPHRASES, *_LOCALITY, *_OF_REWRITES}
_READ |= {"id", "case_id", "subject", "paraphrases", "portability"}
_NAMED = 8  # unread fields that a warning lists


class FlatRecords(Dataset):
    """A file of facts: JSON, JSONL, CSV, TSV or Parquet."""

    name: Text = "records"
    label: Text = "records"
    path: Text | None = None
    """The file; `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet`."""
    conflicts: Conflicts = "keep"
    """What becomes of prompts that are given different targets."""
    _unread: set[str] = PrivateAttr(default_factory=set)
    _unanswered: list[str] = PrivateAttr(default_factory=list)

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` records in file order."""
        if self.path is None:
            raise UserError(
                f"dataset={self.name} reads a file of yours; {HOW_TO_GET}FILE (json, jsonl, csv, tsv, parquet)"
            )
        self._unread.clear()
        self._unanswered.clear()
        return stream_head(self._read, n, self.conflicts, self.path)

    def warnings(self) -> list[str]:
        """Which fields have no meaning here (a misspelt one may be among them), and which probes have no answer."""
        names = ", ".join(sorted(self._unread)[:_NAMED]) + (", ..." if len(self._unread) > _NAMED else "")
        sentences = [f"fields of {self.path} that were not read: {names}"] if self._unread else []
        if n := len(self._unanswered):
            sentences.append(f"{n} probes of {self.path} have an empty list of answers and were left out")
        return sentences

    def _read(self, enough: int | None) -> list[EditCase]:
        return cases_of_file(Path(str(self.path)), self._case, enough, HOW_TO_GET)

    def _case(self, record: Record) -> EditCase:
        self._unread.update(record.values.keys() - _READ)
        return _rewrite(record) if "requested_rewrite" in record.values else self._flat(record)

    def _flat(self, record: Record) -> EditCase:
        prompt, target = _first(record, _PROMPTS), _first(record, _TARGETS)
        paraphrase = next((text for field in _PARAPHRASES if (text := record.optional(field))), None)
        texts = (*([paraphrase] if paraphrase else []), *record.texts("paraphrases"))
        listed, hard = self._locality(record)
        return EditCase(
            id=_id(record),
            prompt=prompt,
            target=target,
            subject=record.optional("subject"),
            paraphrases=tuple(Probe(text, target) for text in texts),
            locality=(*record.probe("locality_prompt", "locality_ground_truth"), *listed),
            hard_locality=hard,
            extras=self._families(record, "portability"),
        )

    def _locality(self, record: Record) -> tuple[tuple[Probe, ...], Mapping[str, tuple[Probe, ...]]]:
        """The probes of `locality`: a list of them, or one for each family."""
        if isinstance(record.value("locality"), list):
            return self._probes(record, "locality"), {}
        return (), self._families(record, "locality")

    def _families(self, record: Record, field: str) -> dict[str, tuple[Probe, ...]]:
        """Probes by family, in lower case; families without any are left out."""
        if record.value(field) is None:
            return {}
        inside = record.inside(field)
        families = {name.lower(): self._probes(inside, name) for name in inside.values}
        return {name: probes for name, probes in families.items() if probes}

    def _probes(self, record: Record, field: str) -> tuple[Probe, ...]:
        """The probes of a list of objects."""
        probes = []
        for i in range(len(record.items(field))):
            each = record.inside(field, at=i)
            prompt = next((text for name in _PROBE_PROMPTS if (text := each.optional(name))), None)
            answer = _answer(each) if prompt else None
            if prompt and answer:
                probes.append(Probe(prompt, answer))
            elif prompt:
                self._unanswered.append(prompt)
        return tuple(probes)


def _rewrite(record: Record) -> EditCase:
    several = isinstance(record.value("requested_rewrite"), list)
    rewrite = record.inside("requested_rewrite", at=0 if several else None)
    subject, target = rewrite.text("subject"), rewrite.inside("target_new").text("str")
    true = rewrite.inside("target_true").text("str")
    attributes = tuple(Probe(text, target) for text in record.texts("attribute_prompts"))
    return EditCase(
        id=_id(record),
        prompt=rewrite.text("prompt").replace("{}", subject),
        target=target,
        subject=subject,
        paraphrases=tuple(Probe(text, target) for text in record.texts("paraphrase_prompts")),
        locality=tuple(Probe(text, true) for text in record.texts("neighborhood_prompts")),
        hard_locality={"attribute": attributes} if attributes else {},
    )


def _id(record: Record) -> str:
    return record.id("case_id" if record.value("case_id") is not None else "id", record.index)


def _first(record: Record, fields: Sequence[str]) -> str:
    """The text in the first of the fields that is there."""
    there = next((field for field in fields if field in record.values), None)
    if there is None:
        record.refuse(fields[0], f"a non-empty string (as may be {' or '.join(fields[1:])} in its place)")
    return record.text(there)


def _answer(record: Record) -> str | None:
    """The first answer, which may lie in a list, or in a list of lists of equal names; None where the list is empty."""
    field = next((field for field in _PROBE_ANSWERS if field in record.values), _PROBE_ANSWERS[0])
    value: Any = record.value(field)
    while isinstance(value, list) and value:
        value = value[0]
    return None if value == [] else Record({field: value}, record.index, record.where, record.inner).text(field)
