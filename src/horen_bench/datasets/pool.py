"""The 50K stress pool (paper E.4.4): a large pool of ZsRE-style edits and a fixed draw from it.

The paper gives the size of the pool (75,658), its sources (the train split of Mitchell et al. and further entries of
the ZsRE corpus) and that 50,000 are drawn with a fixed seed. Where it is silent the recipe is ours:

1. read the files in the order given; keep records with all of `src`, `subject` inside `src`, target, `rephrase`,
   `loc`, `loc_ans`, and say how many were left out for which of these; a file in which no record has them all is of
   another schema;
2. of equal `src` keep the first;
3. stop at `pool_size`, or take what there is and say so;
4. draw with `numpy.random.default_rng(seed).permutation(len(pool))[:draw]`.

Locality stays aligned with its record. The ids of the drawn records (`file:position`) and their hash are written
beside a run, so that two labs can tell whether they ran the same stream.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import PrivateAttr

from horen_bench.cases import EditCase
from horen_bench.config.schema import Count, Dataset, Seed, Text
from horen_bench.datasets.records import Record, read_records
from horen_bench.datasets.zsre import HOW_TO_GET, NqWording, Target, zsre_case
from horen_bench.errors import UserError

_NEEDED = ("src", "subject", "rephrase", "loc", "loc_ans")


class ZsrePool(Dataset):
    """A seeded draw from a deduplicated pool of ZsRE files."""

    files: ClassVar[frozenset[str]] = frozenset({"paths"})

    name: Text = "zsre_50k"
    label: Text = "ZsRE 50K"
    paths: list[Text]
    """The files, in order of preference."""
    target: Target = "answers"
    """The field that is written, as for `Zsre`."""
    pool_size: Count = 75_658
    """Most records in the pool; the paper's value."""
    draw: Count = 50_000
    """Length of the stream."""
    draw_seed: Seed = 42
    """Of the permutation."""
    _warnings: list[str] = PrivateAttr(default_factory=list)
    _left_out: Counter[str] = PrivateAttr(default_factory=Counter)

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` cases of the draw."""
        pool = self._pool()
        length = min(self.draw, len(pool))
        if n > length:
            raise UserError(f"n={n} is more than the {length} edits of this draw; write n={length} or less")
        order = np.random.default_rng(self.draw_seed).permutation(len(pool))[:n]
        return [pool[i] for i in order]

    def warnings(self) -> list[str]:
        """Sentences if the pool is smaller than the paper's, and if records were left out of it."""
        return self._warnings

    def _pool(self) -> list[EditCase]:
        pool: dict[str, EditCase] = {}
        self._left_out.clear()
        for case in self._usable():
            if len(pool) == self.pool_size:
                break
            pool.setdefault(case.prompt, case)
        self._warnings.clear()
        if len(pool) < self.pool_size:
            self._warnings.append(f"the pool has {len(pool)} records, not {self.pool_size}; the draw is another one")
        if self._left_out:
            reasons = ", ".join(f"{n} without {field}" for field, n in self._left_out.items())
            self._warnings.append(f"{self._left_out.total()} records were left out of the pool: {reasons}")
        return list(pool.values())

    def _usable(self) -> Iterator[EditCase]:
        for path in map(Path, self.paths):
            records = [Record.of(value, i, str(path)) for i, value in enumerate(read_records(path, HOW_TO_GET))]
            if all(self._lacks(record) for record in records):
                first = records[0]
                raise UserError(
                    f"{path}: none of {len(records)} records is complete; record 0 has no {self._lacks(first)}, its "
                    f"fields are {', '.join(first.values) or 'none'}; name files in the ZsRE schema with dataset.paths="
                )
            for record in records:
                if (lacking := self._lacks(record)) is not None:
                    self._left_out[lacking] += 1
                    continue
                case = zsre_case(record, self.target, NqWording())
                yield EditCase(
                    id=f"{path.stem}:{record.index}",
                    prompt=case.prompt,
                    target=case.target,
                    subject=case.subject,
                    paraphrases=case.paraphrases,
                    locality=case.locality,
                )

    def _lacks(self, record: Record) -> str | None:
        """The first thing that a record of the pool must have and this one has not, or None."""
        texts = {field: record.optional(field) for field in _NEEDED}
        missing = next((field for field, text in texts.items() if text is None), None)
        if missing is not None:
            return missing
        if not (record.optional("alt") if self.target == "alt" else record.texts("answers")):
            return self.target
        return None if str(texts["subject"]) in str(texts["src"]) else "its subject in src"
