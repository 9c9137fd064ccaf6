"""Shards of edits, and the side weights that they leave: one in training, those stored, and their merges.

Shapes: `m` input and `d` output size of the module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horen_bench.cases import EditCase
from horen_bench.editors.wise.config import SideMemoryConfig
from horen_bench.editors.wise.merging import ties
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.training import SideTrained
from horen_bench.models.architecture import PlainLinear, matrix_of

NOTHING_RECORDED = 1e9  # activation of a side weight before its first edit: no score reaches it
_NEW_SHARE = 0.4  # of the new shards together, where `retrieve` is off and an older merge is there


@dataclass(slots=True)
class OpenShard:
    """Edits that share a side weight, or those of them that are written now.

    Attributes:
        start: number of its first training.
        cases: in order.
        mask: of the gradient, `(d, m)`.
        weight: the side weight so far; None: nothing was trained.
        lowest: smallest activation so far.
    """

    start: int
    cases: Sequence[EditCase]
    mask: Tensor
    weight: Tensor | None
    lowest: float

    def take(self, trained: SideTrained) -> None:
        """Go on from an edit, unless it has failed."""
        if trained.finite:
            self.weight, self.lowest = trained.weight, min(self.lowest, trained.activation)


class SideWeights:
    """The side weights of one module.

    Args:
        linear: the module, whose own weight, `(d, m)`, all of them start from; never changed.
        side: when shards are stored and merged, and how.

    Attributes:
        n_edits: written so far.
        live: the weight of the open shard; None: nothing was trained in it.
        stored: finished shards and merges, in order.
        merged: the one weight of WISE-Merge.
        lowest: smallest activation of the open shard; in WISE-Merge of all edits.
    """

    def __init__(self, linear: PlainLinear, side: SideMemoryConfig) -> None:
        self._linear = linear
        self._side = side
        self.n_edits = 0
        self.live: Memory | None = None
        self.stored: list[Memory] = []
        self.merged: Memory | None = None
        self.lowest = NOTHING_RECORDED
        self._one_weight: Memory | None = None

    @property
    def base(self) -> Tensor:
        """The module's own weight, `(d, m)`."""
        return matrix_of(self._linear).detach()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to route to."""
        return self.live is None and not self.stored and self.merged is None

    def candidates(self) -> tuple[Memory | None, list[Memory]]:
        """What the router decides among: the live weight and the stored ones, or all of them in one."""
        return (self.live, self.stored) if self._side.retrieve else (None, [self.one_weight()])

    def one_weight(self) -> Memory:
        """What WISE-Merge answers with: the merge, and in it what waits for the next one."""
        if self._one_weight is None:
            waiting = [*self.stored, *([self.live] if self.live else [])]
            memory = self._merged_with(waiting) if waiting else self.merged
            assert memory is not None
            self._one_weight = Memory(memory.weight, self.lowest)
        return self._one_weight

    def start(self, weight: Tensor | None) -> Tensor:
        """A side weight to go on from; None: the module's own."""
        return self.base if weight is None else weight

    def take(self, shard: OpenShard) -> None:
        """Take in a shard's edits; store it after `save_freq` of them, merge what is stored after `merge_freq`."""
        self.lowest = min(self.lowest, shard.lowest)
        self.live = None if shard.weight is None else Memory(shard.weight, self.lowest)
        self.n_edits += len(shard.cases)
        if self.n_edits % self._side.save_freq == 0:
            self.stored.append(self.live or Memory(self.base.clone(), self.lowest))
            self.live = None
            if self._side.retrieve:  # WISE-Merge keeps its smallest activation for good
                self.lowest = NOTHING_RECORDED
        if self.n_edits % self._side.merge_freq == 0:
            self._merge()
        self._one_weight = None

    def _merge(self) -> None:
        if not self._side.retrieve:
            self.merged, self.stored = self._merged_with(self.stored), []
            return
        n_shards = self._side.merge_freq // self._side.save_freq
        shards = self.stored[-n_shards:]
        self.stored[-n_shards:] = [self._joined(shards, [1 / n_shards] * n_shards)]

    def _merged_with(self, shards: Sequence[Memory]) -> Memory:
        """The one weight of WISE-Merge with further shards in it; the older merge keeps the larger share."""
        if self.merged is None:
            return self._joined(shards, [1 / len(shards)] * len(shards))
        return self._joined([*shards, self.merged], [_NEW_SHARE / len(shards)] * len(shards) + [1 - _NEW_SHARE])

    def _joined(self, parts: Sequence[Memory], shares: Sequence[float]) -> Memory:
        weight = ties([part.weight for part in parts], self.base, shares, self._side.density)
        return Memory(weight, min(part.activation for part in parts))

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All of them, and the number of edits."""
        state = {
            "n_edits": torch.tensor(self.n_edits),
            "lowest": torch.tensor(self.lowest, dtype=torch.float64),
            "memories.activations": torch.tensor([part.activation for part in self.stored], dtype=torch.float64),
        }
        state |= {f"memories.{i}": part.weight.clone() for i, part in enumerate(self.stored)}
        for name, memory in (("live", self.live), ("merged", self.merged)):
            if memory is not None:
                state[name] = memory.weight.clone()
                state[f"{name}.activation"] = torch.tensor(memory.activation, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: something is missing, or of another shape; nothing was taken over.
        """
        for name in ("n_edits", "lowest", "memories.activations"):
            if name not in state:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
        activations = state["memories.activations"].tolist()
        stored = [Memory(self._loaded(state, f"memories.{i}"), lowest) for i, lowest in enumerate(activations)]
        self.live, self.merged = (
            Memory(self._loaded(state, name), state[f"{name}.activation"].item()) if name in state else None
            for name in ("live", "merged")
        )
        self.stored, self._one_weight = stored, None
        self.n_edits, self.lowest = int(state["n_edits"]), state["lowest"].item()

    def _loaded(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in state or state[name].shape != self.base.shape:
            raise ValueError(f"the state has no '{name}' of shape {tuple(self.base.shape)}, that of the side weights")
        return state[name].to(self.base, copy=True)

    def numel(self) -> int:
        """Numbers in side weights and their activations."""
        stored = [*self.stored, *(memory for memory in (self.live, self.merged) if memory)]
        return len(stored) * (self.base.numel() + 1)
