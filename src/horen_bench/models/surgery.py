"""Overwriting parameters of a model, undone bit for bit: what every method that rewrites weights stands on."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from horen_bench.errors import UserError
from horen_bench.models.architecture import check_module


class PristineParameters:
    """Parameters that a method overwrites, and copies of them as they were received.

    Nothing is copied before `keep`, which a method calls before it first writes; until then a model on the `meta`
    device will do. Copies are kept in main memory, in the model's dtype, so that a GPU holds every parameter once. They
    are needed because subtracting a change does not give back the same bits.

    Args:
        parameters: by dotted name, which is their name in a state.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(parameters)
        self._originals: dict[str, Tensor] = {}

    def _name(self, path: str) -> str:
        """A parameter's name in a state."""
        return path

    def keep(self) -> None:
        """Copy the parameters; only the first call does."""
        if not self._originals:
            self._originals = {path: weight.detach().to("cpu", copy=True) for path, weight in self.weights.items()}

    def originals(self) -> Mapping[str, Tensor]:
        """The copies by path, on the CPU; empty before `keep`."""
        return self._originals

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, bit for bit; without copies nothing was overwritten. They stay for further edits."""
        for path, original in self._originals.items():
            self.weights[path].copy_(original)

    def numel(self) -> int:
        """Numbers in the copies: what is stored beside the model."""
        return sum(original.numel() for original in self._originals.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the parameters as they are now, on the CPU, by name."""
        return {self._name(path): weight.detach().to("cpu", copy=True) for path, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write parameters that `state_dict` gave; the originals are kept first.

        Raises:
            ValueError: a parameter is missing or of another shape or dtype; nothing was written.
        """
        for path, weight in self.weights.items():
            name = self._name(path)
            saved = state.get(name)
            if saved is None:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
            if saved.shape != weight.shape or saved.dtype != weight.dtype:
                raise ValueError(
                    f"'{name}' is {saved.dtype} {tuple(saved.shape)} in the state, but {weight.dtype} "
                    f"{tuple(weight.shape)} in the model"
                )
        self.keep()
        for path, weight in self.weights.items():
            weight.copy_(state[self._name(path)])


class PristineWeights(PristineParameters):
    """The weight matrices of some modules; in a state they are `PATH.weight`.

    Args:
        model: the owner of the modules.
        paths: dotted paths of modules with a `weight`, e.g. `model.layers.5.mlp.down_proj`.
        where: the configuration key that holds the paths, for messages.

    Raises:
        UserError: no path, a path twice, or a module that is not there or has no weight matrix.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], *, where: str) -> None:
        if not paths or len(set(paths)) < len(paths):
            raise UserError(f"{where} must name at least one module, each once; got {list(paths)}")
        super().__init__({path: _weight(check_module(model, path, where=where), f"{where}={path}") for path in paths})

    def _name(self, path: str) -> str:
        return f"{path}.weight"


class MasterWeights:
    """float32 values behind a half-precision model's weights, so that steps below its rounding add up.

    A float32 weight is its own master, and nothing is stored for it.

    Args:
        weights: by path, as `PristineWeights.weights`.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._masters: dict[str, Tensor] = {}

    def of(self, path: str) -> Tensor:
        """The master of a weight, to be changed in place and followed by `write`; made at the first call."""
        weight = self._weights[path].detach()
        if weight.dtype == torch.float32:
            return weight
        return self._masters.setdefault(path, weight.float())

    @torch.no_grad()
    def write(self, path: str) -> None:
        """Round a master into its weight."""
        if path in self._masters:
            self._weights[path].copy_(self._masters[path])

    def clear(self) -> None:
        """Forget the masters: the weights were written by somebody else."""
        self._masters.clear()

    def numel(self) -> int:
        """Numbers stored beside the model."""
        return sum(master.numel() for master in self._masters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the masters on the CPU, by `PATH.master`."""
        return {f"{path}.master": master.to("cpu", copy=True) for path, master in self._masters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take masters that `state_dict` gave; the weights themselves are loaded apart."""
        self._masters = {
            path: state[f"{path}.master"].to(weight.device, copy=True)
            for path, weight in self._weights.items()
            if f"{path}.master" in state
        }


def all_finite(*tensors: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return all(math.isfinite(float(tensor.detach().abs().sum())) for tensor in tensors)


def bounded(*tensors: Tensor) -> bool:
    """Whether the Euclidean length of each is a finite number in float32; outputs of a longer weight are not."""
    return all(bool(torch.linalg.vector_norm(x.detach(), dtype=torch.float32).isfinite()) for x in tensors)


def _weight(module: nn.Module, named: str) -> nn.Parameter:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise UserError(f"{named} is a {type(module).__name__}; a module with a weight matrix is needed")
    return weight
