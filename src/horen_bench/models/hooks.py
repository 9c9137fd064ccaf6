"""Reading and changing a model from the side: every hook of the package that is gone when its block ends.

What stays on a model while an editor is at work is in `prompt_hook.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from horen_bench.errors import UserError

Change = Callable[[Tensor], Tensor | None]


def first_tensor(output: Any) -> Tensor:
    """A module's output where that is a tensor, else the head of the tuple that it is."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def with_first_tensor(output: Any, new: Tensor) -> Any:
    """A module's output with `new` in place of its `first_tensor`."""
    return (new, *output[1:]) if isinstance(output, tuple) else new


def as_sequences(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """What a module reads or gives as `(B, T, m)`; some models hand over all tokens in one row, `(B * T, m)`.

    Args:
        tensor: of one forward pass.
        shape: `(B, T)` of the tokens that the model reads.

    Raises:
        UserError: there are not as many tokens.
    """
    if tensor.dim() == 3 and tensor.shape[:2] == (*shape,):
        return tensor
    if tensor.dim() == 2 and len(tensor) == shape[0] * shape[1]:
        return tensor.reshape(*shape, -1)
    raise UserError(
        f"the module that was named gets {tuple(tensor.shape[:-1])} vectors for {shape[0]} sequences of {shape[1]} "
        "tokens, as the expert of a router does; name one that gets every token, such as the attention's output "
        "projection"
    )


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each module's input of the last forward pass, by its key.

    The input is the first positional argument, or `hidden_states` where a layer is called by keyword.
    """
    inputs: dict[str, Tensor] = {}

    def reader(key: str) -> Any:
        def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[key] = args[0] if args else kwargs["hidden_states"]

        return read

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(reader(key), with_kwargs=True))
        yield inputs


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each module's output of the last forward pass, by its key; of a tuple its head.

    It is a copy, without gradient: some layers (Falcon's) add to their modules' outputs in place.
    """
    outputs: dict[str, Tensor] = {}

    def reader(key: str) -> Any:
        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[key] = first_tensor(output).detach().clone()

        return read

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(reader(key)))
        yield outputs


@contextmanager
def patched_output(module: nn.Module, change: Change) -> Iterator[None]:
    """Within the block a module's output, tensor or head of a tuple, is what `change` makes of it; None: as it is."""

    def patch(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = change(first_tensor(output))
        if new is None:
            return None
        return with_first_tensor(output, new)

    with module.register_forward_hook(patch):
        yield


class _Stop(Exception):  # noqa: N818 - no error, it ends a forward pass early
    """All that a forward pass was run for is known."""


@contextmanager
def ending_at(module: nn.Module) -> Iterator[None]:
    """A forward pass, the last statement of the block, ends when `module` has run: what lies above adds nothing."""

    def stop(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _Stop

    with module.register_forward_hook(stop), suppress(_Stop):
        yield


@contextmanager
def ending_before(module: nn.Module) -> Iterator[None]:
    """A forward pass, the last statement of the block, ends when `module` is about to run."""

    def stop(_module: nn.Module, _args: Any) -> None:
        raise _Stop

    with module.register_forward_pre_hook(stop), suppress(_Stop):
        yield


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block these frozen parameters have gradients, and nothing below: a backward pass ends there."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
