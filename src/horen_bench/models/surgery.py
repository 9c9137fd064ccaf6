"""Overwriting parameters of a model, undone bit for bit: what every method that rewrites weights stands on."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horen_bench.errors import UserError
from horen_bench.models.architecture import PlainLinear, check_linear, check_module, is_linear, is_packed, matrix_of


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
        paths: dotted paths of linear modules, e.g. `model.layers.5.mlp.down_proj`.
        where: the configuration key that holds the paths, for messages.

    Attributes:
        modules: by path.

    Raises:
        UserError: no path, a path twice, or a module that is not there, not plain, or not writable.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], *, where: str) -> None:
        if not paths or len(set(paths)) < len(paths):
            raise UserError(f"{where} must name at least one module, each once; got {list(paths)}")
        self.modules = {path: check_plain_linear(model, path, where=where) for path in paths}
        for path in paths:
            check_writable(model, path, where=where)
        super().__init__({path: module.get_parameter("weight") for path, module in self.modules.items()})

    def matrix(self, path: str) -> Tensor:
        """A weight as `(d, m)`, however it is stored; a view, without gradient: what is written into it is written."""
        return matrix_of(self.modules[path]).detach()

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


def check_plain_linear(model: nn.Module, path: str, *, where: str) -> PlainLinear:
    """Return the linear module at a dotted path, which gives `W x + b` of a weight of floating-point numbers.

    Raises:
        UserError: no such module, or one of another kind; its weight is quantised, or it does more than that product.
    """
    module = check_linear(model, path, where=where)
    _refuse_quantised(module, f"{where}={path}")
    if not isinstance(module, PlainLinear) or not _computes_its_product(module):
        raise UserError(
            f"{where}={path} is a {type(module).__name__} that gives other outputs than its weight times its input, so "
            "that what is written there is not what comes out; load the model without adapters, as it was published"
        )
    return module


def check_writable(model: nn.Module, path: str, *, where: str) -> nn.Module:
    """Return the module at a dotted path, all of whose parameters can be overwritten.

    Raises:
        UserError: no such module; a weight of it is quantised; or another module has the same parameter.
    """
    module = check_module(model, path, where=where)
    for name, part in module.named_modules():
        _refuse_quantised(part, f"{where}={path}.{name}".rstrip("."))
    own = {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(f"{path}."):
            raise UserError(
                f"{where}={path} shares its weight with {name}, which would change too; name another module"
            )
    return module


def _refuse_quantised(module: nn.Module, named: str) -> None:
    """Refuse one module, not those inside, whose numbers are packed, in parameters or, without a weight, in buffers."""
    lacks_weight = is_linear(module) and getattr(module, "weight", None) is None
    if lacks_weight or any(is_packed(parameter) for parameter in module.parameters(recurse=False)):
        raise UserError(
            f"{named} is a {type(module).__name__} whose weight is quantised, and this method rewrites or copies it; "
            "load the model unquantised, in bfloat16 or float32, or take a method that leaves weights alone"
        )


def _computes_its_product(module: PlainLinear) -> bool:
    """Whether it gives `W x + b` for its own `W`; one that rounds or adapts on the way does not."""
    matrix = matrix_of(module).detach()
    if matrix.is_meta:
        return True
    x = torch.linspace(-1, 1, matrix.shape[1], device=matrix.device).to(matrix.dtype)[None]
    product = F.linear(x, matrix, module.bias)
    difference = (module(x) - product).abs()
    return not bool((difference > 50 * torch.finfo(matrix.dtype).eps * product.abs().max()).any())
