"""The growing store of (key, value, label) entries that routing looks in."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class Codebook:
    """Entries in the order in which they were written; appending is amortised O(1).

    Buffers double when they are full, so that a stream of C inserts copies O(C) numbers in all.

    Args:
        key_size: `m`, size of a key.
        value_shapes: shape of each tensor that makes up a value, by name.
        device: where keys and values live.
        dtype: of the keys; values are float32.
    """

    def __init__(
        self,
        key_size: int,
        value_shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._keys = torch.empty((_FIRST_CAPACITY, key_size), device=device, dtype=dtype)
        self._values = {
            name: torch.empty((_FIRST_CAPACITY, *shape), device=device) for name, shape in value_shapes.items()
        }
        self.labels: list[tuple[int, ...]] = []
        self.prompt_lengths: list[int] = []
        self.versions: list[int] = []  # grows whenever the entry's value is set; 0: not yet

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Tensor:
        """All keys, `(C, m)`; a view."""
        return self._keys[: len(self)]

    @property
    def values(self) -> dict[str, Tensor]:
        """All values, float32 `(C, ...)` each; views."""
        return {name: buffer[: len(self)] for name, buffer in self._values.items()}

    def value(self, entry: int | Tensor) -> dict[str, Tensor]:
        """The value of one entry, or of several (an int64 `(R,)` tensor)."""
        return {name: buffer[entry] for name, buffer in self._values.items()}

    def append(self, key: Tensor, label: tuple[int, ...], prompt_length: int) -> int:
        """Make a new entry, whose value is still to be set; its index.

        Args:
            key: `(m,)`.
            label: token ids of the target that created the entry.
            prompt_length: tokens of its prompt (only the release's label rule looks at it).
        """
        entry = len(self)
        if entry == self._keys.shape[0]:
            self._reserve(2 * entry)
        self._keys[entry] = key
        self.labels.append(label)
        self.prompt_lengths.append(prompt_length)
        self.versions.append(0)
        return entry

    def mark(self) -> Callable[[], None]:
        """What takes the codebook back to how it is now, as long as no value of a present entry is set."""
        size = len(self)
        return lambda: self.truncate(size)

    def truncate(self, size: int) -> None:
        """Forget the entries from `size` on."""
        del self.labels[size:], self.prompt_lengths[size:], self.versions[size:]

    def set_value(self, entry: int, value: Mapping[str, Tensor]) -> None:
        """Overwrite the value of an entry; its key and label stay."""
        self.versions[entry] += 1
        for name, buffer in self._values.items():
            buffer[entry] = value[name]

    def numel(self) -> int:
        """Numbers held in keys and values."""
        return self.keys.numel() + sum(value.numel() for value in self.values.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Keys, values and labels as tensors; label `i` is `labels[ends[i-1]:ends[i]]`."""
        lengths = torch.tensor([len(label) for label in self.labels], dtype=torch.long)
        return {
            "keys": self.keys.clone(),
            **{f"value.{name}": value.clone() for name, value in self.values.items()},
            "labels": torch.tensor([token for label in self.labels for token in label], dtype=torch.long),
            "label_ends": lengths.cumsum(dim=0),
            "prompt_lengths": torch.tensor(self.prompt_lengths, dtype=torch.long),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: a tensor is missing, has another shape than this codebook's, or another number of entries than
                the others; the codebook is then as it was.
        """
        ends, lengths = self._checked(state)
        tokens = state["labels"].tolist()
        self.labels = [tuple(tokens[a:b]) for a, b in pairwise([0, *ends])]
        self.prompt_lengths = lengths
        self.versions = [1] * len(self.labels)
        self._reserve(max(len(self), _FIRST_CAPACITY))
        self.keys[:] = state["keys"]
        for name, value in self.values.items():
            value[:] = state[f"value.{name}"]

    def _checked(self, state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
        """Label ends and prompt lengths of a state that fits."""
        shapes = self._shapes()
        for name, shape in shapes.items():
            given = tuple(state[name].shape) if name in state else None
            if given is None or given[1:] != tuple(shape):
                raise ValueError(f"codebook state '{name}' must be (C, *{tuple(shape)}), got {given or 'nothing'}")
        counts = {name: state[name].shape[0] for name in shapes if name != "labels"}
        if len(set(counts.values())) != 1:
            raise ValueError(f"codebook state has different numbers of entries: {counts}")
        ends: list[int] = state["label_ends"].tolist()
        if (ends[-1] if ends else 0) != state["labels"].shape[0]:
            raise ValueError("codebook state 'label_ends' does not end where 'labels' does")
        return ends, state["prompt_lengths"].tolist()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one entry's part of each tensor of a state, by name."""
        shapes: dict[str, tuple[int, ...]] = {"keys": tuple(self._keys.shape[1:])}
        shapes |= dict.fromkeys(("labels", "label_ends", "prompt_lengths"), ())
        return shapes | {f"value.{name}": tuple(buffer.shape[1:]) for name, buffer in self._values.items()}

    def _reserve(self, capacity: int) -> None:
        self._keys = _grown(self._keys, capacity)
        self._values = {name: _grown(buffer, capacity) for name, buffer in self._values.items()}


class BallCodebook(Codebook):
    """A codebook whose entries are balls around their keys: each has a radius, 0 until it is set."""

    def __init__(
        self,
        key_size: int,
        value_shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(key_size, value_shapes, device, dtype)
        self._radii = torch.zeros(_FIRST_CAPACITY, device=device)

    @property
    def radii(self) -> Tensor:
        """All radii, float32 `(C,)`; a view."""
        return self._radii[: len(self)]

    def append(self, key: Tensor, label: tuple[int, ...], prompt_length: int) -> int:
        """Make a new entry of radius 0, whose value is still to be set; its index."""
        entry = super().append(key, label, prompt_length)
        self._radii[entry] = 0
        return entry

    def mark(self) -> Callable[[], None]:
        """As for `Codebook`; radii and labels are put back."""
        back, labels, lengths, radii = super().mark(), self.labels[:], self.prompt_lengths[:], self.radii.clone()

        def put_back() -> None:
            back()
            self.labels[:], self.prompt_lengths[:] = labels, lengths
            self.radii.copy_(radii)

        return put_back

    def relabel(self, entry: int, label: tuple[int, ...], prompt_length: int) -> None:
        """Give an entry the target of a later edit."""
        self.labels[entry], self.prompt_lengths[entry] = label, prompt_length

    def numel(self) -> int:
        """Numbers held in keys, values and radii."""
        return super().numel() + len(self)

    def state_dict(self) -> dict[str, Tensor]:
        """As for `Codebook`, and the radii."""
        return super().state_dict() | {"radii": self.radii.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As for `Codebook`, and the radii."""
        super().load_state_dict(state)
        self.radii[:] = state["radii"]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._shapes() | {"radii": ()}

    def _reserve(self, capacity: int) -> None:
        super()._reserve(capacity)
        self._radii = _grown(self._radii, capacity)


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    if buffer.shape[0] >= capacity:
        return buffer
    larger = buffer.new_empty((capacity, *buffer.shape[1:]))
    larger[: buffer.shape[0]] = buffer
    return larger
