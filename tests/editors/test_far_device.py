"""Every editor on a device that is not the CPU, where a tensor left on the CPU is an error, as on a GPU.

Tensors of the far device say that they are on `meta` and hold numbers on the CPU. An operation that mixes them with
tensors of the CPU is refused as CUDA refuses it, and what a GPU's host would wait for is counted. So device mismatches
are found, and the numbers compared with those of the CPU, without a GPU; kernels and their speed are not tested.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.datasets.facts import Facts
from horen_bench.editors.base import Editor
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.probes import probes_of
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.models.loading import load_model
from horen_bench.prompts import PromptEncoder

_FAR = torch.device("meta")
_aten: Any = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_waits: list[str] = []  # operations for which the host waited


class Far(Tensor):
    """A tensor of the far device; its numbers are in `near`."""

    near: Tensor

    @staticmethod
    def __new__(cls: type["Far"], near: Tensor) -> "Far":
        make: Any = torch.Tensor._make_wrapper_subclass
        where = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        wrapped: Far = make(cls, near.shape, dtype=near.dtype, device=_FAR, **where)
        return wrapped

    def __init__(self, near: Tensor) -> None:
        assert near.device.type == "cpu"
        self.near = near

    def tolist(self) -> Any:
        _waits.append("tolist")
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own declaration lacks the function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _performed(func, args, kwargs or {})


def _performed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and put its results where a GPU would."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    any_far = any(isinstance(tensor, Far) for tensor in tensors)
    if any_far and func not in _CROSSING:
        _check_devices(func, args, tensors)
    device = kwargs.get("device")
    far = any_far if device is None else torch.device(device) == _FAR
    if far and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a generator of the far device")
    if any_far and (func in (_aten._local_scalar_dense.default, _aten.nonzero.default) or not far):
        _waits.append(str(func))
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not far:
        return result
    result = tree_map(lambda leaf: Far(leaf) if isinstance(leaf, Tensor) else leaf, result)
    if not any_far:
        return result
    return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-untyped-call]


def _check_devices(func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
    """As CUDA does: single numbers may come from the CPU, and so may indices into a tensor of the device."""
    checked = [args[0], *args[2:3]] if func in _INDEXING else tensors
    if any(not isinstance(tensor, Far) and tensor.dim() for tensor in checked):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, Far) else leaf


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Operations that make tensors without being given any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _performed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before any operation, and `meta` tensors lose their numbers in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == _FAR:
            return func(*args, **{name: value for name, value in kwargs.items() if name != "device"}).to(_FAR)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _as_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(list(index)) if isinstance(index, list | range) else index


@contextmanager
def _far_device() -> Iterator[None]:
    _waits.clear()
    with _Functions(), _Operations():  # type: ignore[no-untyped-call]
        yield


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the far device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Far(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Far(buffer)
    return model


# --- Editors ---------------------------------------------------------------------------------------------

Outcome = tuple[list[EditRecord], list[Prediction], list[Prediction]]
_MOMENTS = ["method.statistics.n_texts=20", "method.hidden.n_steps=3"]
_EDITORS: dict[str, list[str]] = {
    "horen": ["method.n_steps=5"],
    "horen, lora": ["method.n_steps=5", "method.adaptor=lora"],
    "horen, sequential": ["method.n_steps=5", "method.engine=sequential"],
    "grace": ["method.n_steps=5"],
    "grace_norm_cosine": ["method.n_steps=5"],
    "wise": ["method.n_steps=3"],
    "wise, merged": ["method.n_steps=3", "method.retrieve=false", "method.engine=sequential"],
    "repair": ["method.side.n_steps=1"],  # more steps amplify rounding, on any device
    "rome": [*_MOMENTS, "method.ridge=1e-3"],
    "memit": [*_MOMENTS, "method.ridge=1e-3"],
    "alphaedit": _MOMENTS,
    "ultraedit": [],
    "ft_l": ["method.n_steps=3"],
    "ft_m": ["method.n_steps=3", "method.engine=sequential"],
    "unke": ["method.block.n_steps=2", "method.value.n_steps=2"],
}


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded = load_model("embedded:tiny", dtype="float32", device="cpu")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def edits() -> list[EditCase]:
    return Facts(stream_seed=1).cases(3)


def _editor(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | PromptEncoder, overrides: Sequence[str]
) -> Editor[Any]:
    method = run_config(["model=tiny", *overrides]).method
    editor: Editor[Any] = method.editor_class()(model, tokenizer, method, seed=42)
    return editor


def _outcome(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditCase],
    overrides: Sequence[str],
) -> Outcome:
    """Edit, evaluate in both ways, go on from a saved state, and detach."""
    encoder = PromptEncoder(tokenizer)
    editor = _editor(model, encoder, overrides)
    records = editor.edit(edits[:2])
    probes = probes_of(edits[:1])
    editor.routes([probe.prompt for probe in probes])
    greedy, forced = (
        TokenMatchEvaluator(model=model, encoder=encoder, batch_size=8, protocol=protocol_of(name, "generate"))
        for name in ("greedy", "teacher_forced")
    )
    predictions = greedy.predict(probes), forced.predict(probes)
    editor.load_state_dict(editor.state_dict())
    records += editor.edit(edits[2:])
    editor.detach()
    return records, *predictions


@pytest.mark.parametrize("name", _EDITORS)
def test_an_editor_keeps_its_tensors_on_the_models_device(
    name: str,
    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    edits: list[EditCase],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def overrides() -> list[str]:
        folder = tmp_path_factory.mktemp("statistics")
        cache = [f"method.statistics.folder={folder}"] if _EDITORS[name][:1] == _MOMENTS[:1] else []
        return [f"method={name.partition(',')[0]}", *_EDITORS[name], *cache]

    near = _outcome(copy.deepcopy(pair[0]), pair[1], edits, overrides())
    with _far_device():
        far = _outcome(_moved(pair[0]), pair[1], edits, overrides())
    assert far[1:] == near[1:], "the model predicts alike"
    for ours, theirs in zip(far[0], near[0], strict=True):
        assert (ours.action, ours.entry, ours.steps) == (theirs.action, theirs.entry, theirs.steps)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3, nan_ok=True)


def test_the_host_waits_once_for_each_step_of_value_training(
    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase], edits: list[EditCase]
) -> None:
    def waits(n_steps: int) -> int:
        with _far_device():
            editor = _editor(_moved(pair[0]), pair[1], ["method=horen", f"method.n_steps={n_steps}"])
            editor.edit(edits)
            editor.detach()
        return len(_waits)

    assert waits(3) - waits(2) == 1


@pytest.mark.parametrize(
    "mixture",
    [
        lambda far: far + torch.ones(3),
        lambda far: torch.ones(3)[far > 0],
        lambda far: far.index_put((torch.tensor([0]),), torch.ones(1)),
        lambda far: torch.rand(3, device=far.device, generator=torch.Generator()),
    ],
    ids=["sum", "index", "put", "generator"],
)
def test_a_mixture_of_devices_is_found(mixture: Callable[[Tensor], Tensor]) -> None:
    with _far_device(), pytest.raises(RuntimeError, match="expected"):
        mixture(torch.arange(3.0, device=_FAR))


def test_what_cuda_allows_is_allowed() -> None:
    with _far_device():
        far = torch.arange(3.0, device=_FAR)
        kept = far[torch.tensor([2, 0])] * torch.tensor(2.0)
        kept.copy_(kept.cpu() + 1)
    assert kept.device == _FAR
    assert kept.tolist() == [5.0, 1.0]
