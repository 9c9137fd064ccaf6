"""WikiBigEdit (`lukasthede/WikiBigEdit`): half a million Wikidata changes in eight chronological JSON lists.

| field | becomes |
| --- | --- |
| `update`, `ans`, `subject`, `rephrase` | prompt, target, subject, paraphrase |
| `loc`, `loc_ans` | locality: the same relation of another, similarly named entity |
| `personas` | extra `personas`, answered by `ans` |
| `mhop`, `mhop_ans` | extra `mhop`; few records have it |

A missing, null, empty or NaN probe means that the record has none (the release crashes on it).
"""

from functools import partial
from pathlib import Path

from pydantic import PrivateAttr

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Conflicts, Dataset, Text
from horen_bench.datasets.base import cases_of_file, stream_head
from horen_bench.datasets.records import Record
from horen_bench.errors import UserError

HOW_TO_GET = "run python -m horen_bench.datasets fetch wikibigedit, or name your folder or file with dataset.path="
TIME_STEPS = (
    "20240201_20240220",
    "20240220_20240301",
    "20240301_20240320",
    "20240320_20240401",
    "20240401_20240501",
    "20240501_20240601",
    "20240601_20240620",
    "20240620_20240701",
)
# The order behind the published numbers, as the release's log of July 2026 shows it.
_PUBLISHED_HEAD = (
    "What is the family name of Thomas A. Szlezák?",
    "Who is Tyson Fury married to?",
    "What is the given name of Buddy Richard?",
    "What is Buddy Richard's family name?",
    "In which country did the Battle of Cape Finisterre take place?",
)


class WikiBigEdit(Dataset):
    """The time steps in order, from a folder that holds their files, or one merged file."""

    name: Text = "wikibigedit"
    label: Text = "WikiBigEdit"
    path: Text
    """The folder, or the merged file."""
    conflicts: Conflicts = "keep"
    """What becomes of prompts that are given different targets."""
    _head: list[str] = PrivateAttr(default_factory=list)

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` updates in chronological order."""
        cases = stream_head(self._read, n, self.conflicts, self.path)
        self._head[:] = [case.prompt for case in cases[: len(_PUBLISHED_HEAD)]]
        return cases

    def _read(self, enough: int | None) -> list[EditCase]:
        found: list[EditCase] = []
        for path in self._files():
            if enough is not None and len(found) == enough:
                break
            case_of = partial(_case, offset=len(found))
            found += cases_of_file(path, case_of, None if enough is None else enough - len(found), HOW_TO_GET)
        return found

    def warnings(self) -> list[str]:
        """A sentence if the stream does not begin as the published one."""
        if tuple(self._head) == _PUBLISHED_HEAD[: len(self._head)]:
            return []
        return [
            f"this WikiBigEdit stream begins with {self._head[0]!r} and not as the one behind the published numbers "
            f"({_PUBLISHED_HEAD[0]!r}); its rows do not compare edit by edit"
        ]

    def _files(self) -> list[Path]:
        folder = Path(self.path)
        if not folder.is_dir():
            return [folder]
        files = [folder / f"wiki_big_edit_{step}.json" for step in TIME_STEPS]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UserError(f"{self.path} lacks {', '.join(missing)}; {HOW_TO_GET}")
        return files


def _case(record: Record, offset: int) -> EditCase:
    answer = record.text("ans")
    rephrase, personas = record.optional("rephrase"), record.optional("personas")
    extras = {
        "personas": (Probe(personas, answer),) if personas else (),
        "mhop": record.probe("mhop", "mhop_ans"),
    }
    return EditCase(
        id=str(offset + record.index),
        prompt=record.text("update"),
        target=answer,
        subject=record.optional("subject"),
        paraphrases=(Probe(rephrase, answer),) if rephrase else (),
        locality=record.probe("loc", "loc_ans"),
        extras={name: probes for name, probes in extras.items() if probes},
    )
