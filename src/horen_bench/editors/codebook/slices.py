"""Edits on their way into a codebook, where one whose training fails is to leave no trace.

Whether training fails shows only after later edits were routed as if it had not. So decisions are taken again without
such an edit, until all values that they call for are finite: what comes out is what the stream without it gives, its
random numbers aside, which belong to the edit's place in the stream. What was trained already is not trained again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from horen_bench.editors.codebook.entries import Codebook
from horen_bench.editors.codebook.routing import Decision
from horen_bench.editors.codebook.training import TrainedValue, Value, ValueJob, waves
from horen_bench.prompts import EncodedEdit

# All that a value depends on: an entry from before the slice as `~entry`, or else the position of the edit that made
# it; then the positions of the edits that it was trained on, in order.
Lineage = tuple[int, ...]

NOT_FINITE = "the loss was not finite; nothing was written"


@dataclass(slots=True)
class Slice:
    """Edits that are written together.

    Attributes:
        codebook: which they are written to; older values stay untouched until `commit`.
        edits: by position; those that cannot be routed are left out.
        decide: where the edits at some positions are written, in order; makes their entries.
        start: the first value of an entry, given it and the position of the edit that made it.
        train: trains values side by side.
        decisions: by position, as far as taken.
        lineages: of the value that each edit leaves, by position.
        trained: what came out, failures too.
    """

    codebook: Codebook
    edits: Mapping[int, EncodedEdit]
    decide: Callable[[Sequence[int]], list[Decision]]
    start: Callable[[int, int], Value]
    train: Callable[[Sequence[ValueJob]], Iterator[tuple[ValueJob, TrainedValue]]]
    decisions: dict[int, Decision] = field(default_factory=dict)
    lineages: dict[int, Lineage] = field(default_factory=dict)
    trained: dict[Lineage, TrainedValue] = field(default_factory=dict)

    def settle(self) -> None:
        """Decide and train until nothing fails; a slice that is interrupted leaves the codebook as it was."""
        back = self.codebook.mark()
        try:
            self._decide_all()
            while not self._train_all():
                back()
                self._decide_all()
        except BaseException:
            back()
            raise

    def commit(self) -> None:
        """Set the values of all entries that were written to."""
        last = {self.decisions[i].entry: lineage for i, lineage in self.lineages.items()}
        for entry, lineage in last.items():
            self.codebook.set_value(entry, self._value(entry, lineage))

    def result(self, position: int) -> TrainedValue | None:
        """What training made of an edit; None where nothing of it was trained."""
        lineage = self.lineages.get(position, ())
        return self.trained.get(lineage)

    def _decide_all(self) -> None:
        self.decisions, self.lineages = {}, {}
        size, latest = len(self.codebook), dict[int, Lineage]()
        broken = {lineage for lineage, result in self.trained.items() if not result.finite}
        suspects = {lineage[-1] for lineage in broken}
        for part in _parts(list(self.edits), suspects):
            back = self.codebook.mark()
            for i, decision in zip(part, self.decide(part), strict=True):
                entry = decision.entry
                before = latest.get(entry, (~entry if entry < size else i,))
                lineage = before if decision.action == "failed" else (*before, i)
                if lineage in broken:
                    back()  # the part is this edit alone
                    self.decisions[i] = Decision("failed", entry, decision.route, NOT_FINITE)
                else:
                    self.decisions[i], self.lineages[i], latest[entry] = decision, lineage, lineage

    def _train_all(self) -> bool:
        """Train what the decisions call for and is not trained yet; whether all of it is finite."""
        entries = {i: d.entry for i, d in self.decisions.items() if d.action != "failed"}
        for wave in waves(entries):
            missing = {i: entry for i, entry in wave.items() if self.lineages[i] not in self.trained}
            sound = {i: entry for i, entry in missing.items() if self._is_sound(self.lineages[i][:-1])}
            jobs = [ValueJob(i, self.edits[i], self._value(entry, self.lineages[i][:-1])) for i, entry in sound.items()]
            for job, result in self.train(jobs):
                self.trained[self.lineages[job.position]] = result
        return all(self._is_sound(self.lineages[i]) for i in entries)

    def _is_sound(self, lineage: Lineage) -> bool:
        """Whether a value is a start, or was trained without failing."""
        result = self.trained.get(lineage)
        return len(lineage) == 1 or (result is not None and result.finite)

    def _value(self, entry: int, lineage: Lineage) -> Value:
        """The value of a lineage, whose entry is `entry`."""
        if len(lineage) > 1:
            return self.trained[lineage].value
        return self.codebook.value(entry) if lineage[0] < 0 else self.start(entry, lineage[0])


def _parts(positions: Sequence[int], alone: set[int]) -> Iterator[list[int]]:
    """Positions in order, cut so that each of `alone` is a part of its own."""
    part: list[int] = []
    for position in positions:
        if part and (position in alone or part[-1] in alone):
            yield part
            part = []
        part.append(position)
    if part:
        yield part
