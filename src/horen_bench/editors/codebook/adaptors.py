"""What an entry adds to the wrapped module's output: a vector, or a low-rank map of that output.

Shapes: `d` output size of the wrapped module, `R` rows of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class Adaptor(ABC):
    """The form of a value.

    Attributes:
        learning_rate: Adam's, for values of this form.
        shapes: shape of each tensor that makes up a value, by name.
    """

    learning_rate: float
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A new value, float32 on the CPU, drawn from `generator`."""

    @abstractmethod
    def added(self, value: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
        """What values `(R, ...)` add to outputs `(R, d)`, float32 `(R, d)`."""


class VectorAdaptor(Adaptor):
    """A vector added to the output; starts at i.i.d. Uniform[0, 1) ("cold")."""

    def __init__(self, size: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.shapes = {"vector": (size,)}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Uniform[0, 1) of size `d`."""
        return {"vector": torch.rand(self.shapes["vector"], generator=generator)}

    def added(self, value: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
        """The vectors themselves."""
        return value["vector"]


class ReplacingAdaptor(VectorAdaptor):
    """A vector that takes the output's place: what it adds is what the output lacks."""

    def added(self, value: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
        """The vectors less the outputs."""
        return value["vector"] - outputs.float()


class LoraAdaptor(Adaptor):
    """`scale * B A o` for an output `o` (Appendix H.3); A starts at 0.01 * N(0, 1), B at zero."""

    def __init__(self, size: int, learning_rate: float, rank: int, scale: float) -> None:
        self.learning_rate = learning_rate
        self.scale = scale
        self.shapes = {"a": (rank, size), "b": (size, rank)}

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A `(r, d)` small and random, B `(d, r)` zero."""
        return {
            "a": 0.01 * torch.randn(self.shapes["a"], generator=generator),
            "b": torch.zeros(self.shapes["b"]),
        }

    def added(self, value: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
        """`scale * B A o` per row."""
        inner = torch.einsum("...rd,...d->...r", value["a"], outputs.float())
        return self.scale * torch.einsum("...dr,...r->...d", value["b"], inner)
