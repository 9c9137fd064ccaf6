"""The hook through which memory editors act: put in, taken out, nothing left behind.

The module tree stays as it is: the hook changes what a module returns, so the model keeps its state dict,
its class and its `save_pretrained`, and removing the hook gives the base model back bit for bit.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from horen_bench.models.hooks import ending_at
from horen_bench.prompts import Batch, announced_prompt, move_padding_left, prompt_mask

Respond = Callable[[Tensor, Tensor, Tensor], Tensor | None]
ReadingT = TypeVar("ReadingT")


class PromptHook:
    """Lets `respond` change a module's output on prompts, and only there.

    A root-level forward pre-hook finds which positions of the pass are prompt (`prompts.prompt_mask`); a
    forward hook on the module hands them over. Decode steps on a filled KV cache pass through: they see
    what was written at the prompt through the cache. `generate()` is wrapped on this instance so that it
    announces its prompt, which makes decoding without a cache and rows padded on the right come out the
    same.

    Args:
        model: the language model.
        module: the module to hook, a part of `model`, with input `(B, T, m)` and output `(B, T, d)`.
        respond: called with the module's input `(B, T, m)`, its output `(B, T, d)` and the prompt mask,
            bool `(B, T)`; returns the new output, or None to leave it alone.
        decode_steps: let it act on the one token of a decode step too, as if that were a prompt.

    Raises:
        ValueError: the model carries such a hook already.
    """

    def __init__(
        self, model: PreTrainedModel, module: nn.Module, respond: Respond, *, decode_steps: bool = False
    ) -> None:
        if "generate" in vars(model):
            raise ValueError("this model already carries a memory editor; detach that one first")
        self._respond = respond
        self._model = model
        self._module = module
        self._decode_steps = decode_steps
        self._signature = inspect.signature(model.forward)
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            module.register_forward_hook(self._after_module),
        ]
        setattr(model, "generate", _announcing(model))  # noqa: B010 - an instance attribute, removed below

    @contextmanager
    def responding(self, respond: Respond) -> Iterator[None]:
        """Within the block `respond` acts in place of the hook's own."""
        usual, self._respond = self._respond, respond
        try:
            yield
        finally:
            self._respond = usual

    @torch.no_grad()
    def read(self, batches: Iterable[Batch], reader: Callable[[Tensor, Tensor, Tensor], ReadingT]) -> list[ReadingT]:
        """What `reader` makes of the module's input, its own output and the prompt mask, batch by batch.

        The layers above the module do not run.
        """
        readings: list[ReadingT] = []
        with self.responding(lambda *tensors: readings.append(reader(*tensors))):
            for batch in batches:
                with ending_at(self._module):
                    self._model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        return readings

    def remove(self) -> None:
        """Take every hook out; calling it twice is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model.__dict__.pop("generate", None)

    def _before_model(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = self._signature.bind_partial(*args, **kwargs).arguments
        passed |= passed.get("kwargs", {})
        tokens = passed.get("input_ids")
        if tokens is None:
            tokens = passed["inputs_embeds"][..., 0]
        shape = (tokens.shape[0], tokens.shape[1])
        self._mask = None
        if cached_length(passed) == 0:
            self._mask = prompt_mask(shape, passed.get("attention_mask"), tokens.device)
        elif self._decode_steps and shape[1] == 1:
            self._mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)

    def _after_model(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._mask = None

    def _after_module(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._mask is None:
            return None
        return self._respond(args[0], output, self._mask.to(output.device))


def cached_length(passed: Mapping[str, Any]) -> int:
    """Number of positions that a forward pass finds in its KV cache, whatever the argument is called."""
    caches = (value for value in passed.values() if isinstance(value, Cache))
    return max((int(cache.get_seq_length()) for cache in caches), default=0)


def _announcing(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's own `generate`, run inside `announced_prompt` on rows padded on the left."""
    plain: Callable[..., Any] = getattr(type(model), "generate").__get__(model)  # noqa: B009 - its type is not declared

    @functools.wraps(plain)
    def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        tokens = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if tokens is None or cached_length(kwargs) > 0:
            return plain(tokens, *args, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        mask = _inferred_mask(model, tokens, kwargs) if mask is None else mask
        left = move_padding_left(tokens, mask)
        with announced_prompt(left.attention_mask):
            output = plain(left.input_ids, *args, attention_mask=left.attention_mask, **kwargs)
        return _with_own_prompts(tokens, output)

    return generate


def _inferred_mask(model: PreTrainedModel, tokens: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """What `generate` itself assumes without a mask: pad ids are padding unless pad is also EOS."""
    config: Any = settings.get("generation_config") or model.generation_config
    pad: int | None = settings.get("pad_token_id", config.pad_token_id)
    eos = settings.get("eos_token_id", config.eos_token_id)
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(tokens)
    return (tokens != pad).long()


def _with_own_prompts(prompts: Tensor, output: Any) -> Any:
    """Put the caller's prompt rows, padded as they were, back in front of the generated tokens."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = sequences.shape[0] // prompts.shape[0]
    own = prompts.repeat_interleave(copies, dim=0)
    restored = torch.cat([own, sequences[:, prompts.shape[1] :]], dim=1)
    if isinstance(output, Tensor):
        return restored
    output.sequences = restored
    return output
