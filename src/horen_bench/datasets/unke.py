"""UnKEBench (`TrustedLLM/UnKE`): questions answered by a paragraph, at most 1,000 of them.

| field | becomes |
| --- | --- |
| `question`, `answer` | prompt, target |
| `para_question` | paraphrase; where it is missing the question itself, as the release's loader does |
| `sub_question[]`, `sub_answer[]` | extra `sub_question` |
"""

from pathlib import Path

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Conflicts, Dataset, Protocol, Text
from horen_bench.datasets.base import cases_of_file, stream_head
from horen_bench.datasets.records import Record

HOW_TO_GET = "run python -m horen_bench.datasets fetch unke, or name your file with dataset.path="


class Unke(Dataset):
    """An UnKEBench file, `final_data_v3.json` or `final_data_v2.json`."""

    name: Text = "unke"
    label: Text = "UnKE"
    protocol: Protocol = "text"
    path: Text
    """The file."""
    conflicts: Conflicts = "keep"
    """What becomes of prompts that are given different targets."""

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` records in file order."""
        return stream_head(self._read, n, self.conflicts, self.path)

    def _read(self, enough: int | None) -> list[EditCase]:
        return cases_of_file(Path(self.path), unke_case, enough, HOW_TO_GET)


def unke_case(record: Record) -> EditCase:
    """A record as a case.

    Raises:
        UserError: a field is not of the schema; the sentence names file, record and field.
    """
    question = record.text("question")
    return EditCase(
        id=record.id("id", record.index),
        prompt=question,
        target=record.text("answer"),
        paraphrases=(Probe(record.optional("para_question") or question, record.text("answer")),),
        extras={"sub_question": _sub_questions(record)},
    )


def _sub_questions(record: Record) -> tuple[Probe, ...]:
    questions, answers = record.texts("sub_question"), record.texts("sub_answer")
    if len(questions) != len(answers):
        record.refuse("sub_answer", f"a list of {len(questions)} answers, one for each sub_question")
    return tuple(map(Probe, questions, answers))
