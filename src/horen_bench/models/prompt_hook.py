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
from transformers.cache_utils import CacheLayerMixin

from horen_bench.models.calls import run
from horen_bench.models.hooks import as_sequences, ending_at, first_tensor, with_first_tensor
from horen_bench.prompts import Batch, announced_prompt, move_padding_left, prompt_mask

Respond = Callable[[Tensor, Tensor, Tensor], Tensor | None]
ReadingT = TypeVar("ReadingT")


class PromptHook:
    """Lets `respond` change a module's output on prompts, and only there.

    A root-level forward pre-hook finds which positions of the pass are prompt (`prompts.prompt_mask`); a
    forward hook on the module hands them over. Decode steps on a filled cache pass through: they see
    what was written at the prompt through the cache. `generate()` is replaced on this instance by one that
    announces its prompt, which makes decoding without a cache and rows padded on the right come out the
    same. All that is put on the model is a method of this object, so a deep copy of the model has a copy
    of the hook, and goes its own way.

    Args:
        model: the language model.
        module: the module to hook, a part of `model`, with input `(B, T, m)` and output `(B, T, d)`, or the
            same flattened to `(B * T, ·)`; of an output that is a tuple, its head.
        respond: called with the module's input `(B, T, m)`, its output `(B, T, d)` and the prompt mask,
            bool `(B, T)`; returns the new output, or None to leave it alone.
        decode_steps: let it act on the one token of a decode step too, as if that were a prompt.

    Raises:
        ValueError: the model carries such a hook already.
        UserError: in a forward pass, where the module gets other tokens than the model.
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
            module.register_forward_hook(self._after_module, with_kwargs=True),
        ]
        setattr(model, "generate", self._generate)  # noqa: B010 - an instance attribute, removed below

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
                    run(self._model, batch)
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
        if not goes_on(passed):
            self._mask = prompt_mask(shape, passed.get("attention_mask"), tokens.device)
        elif self._decode_steps and shape[1] == 1:
            self._mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)

    def _after_model(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._mask = None

    def _after_module(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._mask is None:
            return None
        own, given = first_tensor(output), next(iter((*args, *kwargs.values())))
        inputs, outputs = (as_sequences(tensor, self._mask.shape) for tensor in (given, own))
        new = self._respond(inputs, outputs, self._mask.to(own.device))
        return None if new is None else with_first_tensor(output, new.reshape(own.shape))

    def _generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, run inside `announced_prompt` on rows padded on the left."""
        plain = functools.partial(getattr(type(self._model), "generate"), self._model)  # noqa: B009 - untyped
        tokens = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if tokens is None or goes_on(kwargs):
            return plain(tokens, *args, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        mask = _inferred_mask(self._model, tokens, kwargs) if mask is None else mask
        left = move_padding_left(tokens, mask)
        with announced_prompt(left.attention_mask):
            output = plain(left.input_ids, *args, attention_mask=left.attention_mask, **kwargs)
        return _with_own_prompts(tokens, output)


def goes_on(passed: Mapping[str, Any]) -> bool:
    """Whether a forward pass goes on from tokens that an earlier one saw: in a filled cache, or in RWKV's `state`."""
    caches = (value for value in passed.values() if isinstance(value, Cache))
    return passed.get("state") is not None or any(map(_is_filled, caches))


def _is_filled(cache: Cache) -> bool:
    """Attention layers count their tokens; where all layers are recurrent (Mamba), they know whether there were any."""
    if not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return int(cache.get_seq_length()) > 0
    return bool(cache.has_previous_state())


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
