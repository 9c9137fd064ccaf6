"""AKEW (`bobxwu/AKEW`): the unstructured view of CounterFact, MQuAKE-CF and WikiUpdate.

Everything comes from a record's `requested_rewrite` (of MQuAKE-CF its first one):

| dataset | prompt | paraphrase |
| --- | --- | --- |
| counterfact | `prompt_full` | the record's `paraphrase_prompts[0]` |
| mquake, wikiupdate | `prompt` with its subject filled in, and "?" | `question` |

The target is `fact_new_uns`; the extra `sub_question` asks the first five `unsfact_triplets_GPT`, each a `prompt` with
its own `subject` filled in, answered by `target`. A record without triplets has no sub-questions.
"""

from pathlib import Path
from typing import Literal

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Conflicts, Dataset, Text
from horen_bench.datasets.base import cases_of_file, stream_head
from horen_bench.datasets.records import Record

Part = Literal["counterfact", "mquake", "wikiupdate"]

_N_TRIPLETS = 5


class Akew(Dataset):
    """One file of AKEW."""

    part: Part
    """Which of the three it is."""
    path: Text
    """The file."""
    conflicts: Conflicts = "keep"
    """What becomes of prompts that are given different targets."""

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` records in file order."""
        return stream_head(self._read, n, self.conflicts, self.path)

    def _read(self, enough: int | None) -> list[EditCase]:
        how_to_get = f"run python -m horen_bench.datasets fetch {self.part}, or name your file with dataset.path="
        return cases_of_file(Path(self.path), self._case, enough, how_to_get)

    def _case(self, record: Record) -> EditCase:
        rewrite = record.inside("requested_rewrite", at=0 if self.part == "mquake" else None)
        if self.part == "counterfact":
            prompt = rewrite.text("prompt_full")
            paraphrases = record.texts("paraphrase_prompts")[:1]
        else:
            prompt = _filled(rewrite) + "?"
            paraphrases = (rewrite.text("question"),)
        target = rewrite.text("fact_new_uns")
        triplets = [rewrite.inside("unsfact_triplets_GPT", at=i) for i in range(_n_triplets(rewrite))]
        return EditCase(
            id=record.id("case_id", record.index),
            prompt=prompt,
            target=target,
            subject=rewrite.optional("subject"),
            paraphrases=tuple(Probe(text, target) for text in paraphrases),
            extras={"sub_question": tuple(Probe(_filled(triplet), triplet.text("target")) for triplet in triplets)},
        )


def _n_triplets(rewrite: Record) -> int:
    return min(_N_TRIPLETS, len(rewrite.items("unsfact_triplets_GPT")))


def _filled(record: Record) -> str:
    """The record's `prompt` with its `subject` in place of the braces; other braces are left alone."""
    return record.text("prompt").replace("{}", record.text("subject"))
