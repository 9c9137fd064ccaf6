"""Reading and changing a model from the side: every hook of the package that is gone when its block ends.

What stays on a model while an editor is at work is in `prompt_hook.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor | None]


def first_tensor(output: Any) -> Tensor:
    """A module's output where that is a tensor, else the head of the tuple that it is."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


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
    """Within the block, each module's output of the last forward pass, by its key; of a tuple its head."""
    outputs: dict[str, Tensor] = {}

    def reader(key: str) -> Any:
        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[key] = first_tensor(output)

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
        return (new, *output[1:]) if isinstance(output, tuple) else new

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
