"""What the published codes do otherwise, and `compat=release` chooses.

WISE: ha11ucin8/HoReN @38bbf34, src/models/wise. REPAIR: sci-m-wang/REPAIR @a4e4e08, easyeditor/models/wise/WISE_V1.py.
"""

from collections.abc import Sequence

from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.editors.wise.config import RepairConfig
from horen_bench.editors.wise.distillation import divergence
from horen_bench.editors.wise.irrelevant import DisjointPrompts
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.shards import NOTHING_RECORDED
from horen_bench.editors.wise.training import Extra, SideEdit, SidePass, SideTrained
from horen_bench.models.architecture import PlainLinear, matrix_of

_TEACHING_GROUPS = (1, 2, 3)  # groups of `save_freq` edits whose first edit becomes the teacher


class LocalityPrompts(DisjointPrompts):
    """WISE's `loc_source=release`: an edit is trained on the locality prompt that it is later tested on."""

    def check(self, cases: Sequence[EditCase]) -> None:
        """Take any cases."""

    def of(self, case: EditCase, turn: int) -> str:
        """The case's first locality prompt; one of the list where it has none."""
        if case.locality:
            return case.locality[0].prompt
        self.n_borrowed += 1
        return super().of(case, turn)

    def warnings(self) -> list[str]:
        """That the test was trained on."""
        optimistic = "trained on the locality prompts of the cases that it is tested on; Loc is optimistic"
        borrowed = f"{self.n_borrowed} cases have no locality prompt; theirs are from the disjoint list"
        return [f"loc_source=release: {optimistic}", *([borrowed] if self.n_borrowed else [])]


def scoring_missing_bias(live: Memory | None, linear: PlainLinear) -> Memory | None:
    """WISE's `add_bias=false`: side outputs lack the module's bias, so even the module's own weight gets a score.

    Args:
        live: the side weight in training; None: it equals the module's own.
        linear: the module.
    """
    if live is None and linear.bias is not None:
        return Memory(matrix_of(linear), NOTHING_RECORDED)
    return live


class ReleasedDistillation:
    """REPAIR's `mode=released distill=logit`: a few edits become the teacher of all later ones, unless they stop early.

    All rows and positions are compared, cut to the shorter batch from the left, so that they are other tokens.

    Attributes:
        teacher: logits of all rows and positions, `(R, T, vocabulary)`; None: nobody teaches.
    """

    def __init__(self, config: RepairConfig) -> None:
        self.teacher: Tensor | None = None
        self._config = config

    def take(self, edit: SideEdit, trained: SideTrained) -> None:
        """Let an edit teach the later ones if its turn has come."""
        if self._teaches(edit.number):
            whole = trained.last is not None and trained.steps == self._config.side.n_steps
            self.teacher = trained.last.everything if trained.last is not None and whole else None

    def extra(self, edit: SideEdit) -> Extra | None:
        """The term of an edit's loss; None: nobody teaches it."""
        teacher, config = self.teacher, self._config
        if teacher is None or self._teaches(edit.number):
            return None

        def term(done: SidePass) -> Tensor:
            assert done.everything is not None
            n_columns = min(teacher.shape[1], done.everything.shape[1])
            pair = (teacher[:, :n_columns].flatten(0, 1), done.everything[:, :n_columns].flatten(0, 1))
            return config.distill_lambda * divergence(*pair, config.temperature)[None]

        return term

    def _teaches(self, number: int) -> bool:
        return number in [group * self._config.side.save_freq for group in _TEACHING_GROUPS]
