"""The decoder layers above one point, run on cached states: what every optimiser of values needs.

A value written at the last prompt token of layer `l` leaves everything below `l`, and every earlier position, as it
is. So one pass through the whole model, without gradients, gives all that training needs: the hidden states that enter
the upper layers from the last prompt token on, and the upper layers' keys and values of the tokens before it. A
training step then runs `|y|` positions through the layers above `l` and the head, not the whole sequence through the
whole model.

No architecture is named here. The model's own code runs, with stubs in the place of parts: below `l` stubs hand on what
they get, at `l` one hands up the cached states, and for the logits one stands for the whole decoder. So whatever an
architecture does beside its layers (positions added to embeddings, a norm at the end, logits scaled or capped) is done
as it does it, and a check on short rows decides whether the outcome is what the whole model says.

Shapes: `B` edits; `P` prompt and `Y` target tokens of the longest; `d` hidden size.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index, n_decoder_layers
from horen_bench.models.calls import takes
from horen_bench.models.hooks import as_sequences, inputs_of, outputs_of, patched_output
from horen_bench.models.memory import is_out_of_memory
from horen_bench.prompts import EncodedEdit

_NO_TARGET = -100
_TOKENS_GUESS = 16  # positions of one edit that a step works on, for the guess of a batch size


class NotSupportedError(Exception):
    """The model does not have the usual decoder layout, so that the plain path must be taken."""


@contextmanager
def refusing(decoder: nn.Module) -> Iterator[None]:
    """Within the block, what an architecture raises becomes a `NotSupportedError`; memory that ran out does not."""
    try:
        yield
    except NotSupportedError:
        raise
    except Exception as error:  # each architecture raises what it likes
        if is_out_of_memory(error):
            raise
        reason = " ".join((str(error) if isinstance(error, UserError) else repr(error)).split())[:300]
        raise NotSupportedError(f"{type(decoder).__name__} cannot run its upper layers alone ({reason})") from error


@dataclass(slots=True)
class UpperStates:
    """What the layers from `first` on need of `B` edits.

    Attributes:
        hidden: `(B, Y, d)`, their input from the last prompt token on; right-padded.
        prefix: keys and values of the tokens before it, `(B, heads, P - 1, head size)` each, for every upper layer;
            left-padded.
        prefix_mask: bool `(B, P - 1)`.
        position_ids: int64 `(B, Y)`.
        targets: int64 `(B, Y)`; the token that each position must predict, -100 on padding.
        module_output: `(B, d)`, output of the wrapped module at the last prompt token.
    """

    hidden: Tensor
    prefix: list[tuple[Tensor, Tensor]]
    prefix_mask: Tensor
    position_ids: Tensor
    targets: Tensor
    module_output: Tensor
    _places: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each position that must predict a token, int64 `(N,)` each, row by row.

        Found once: their number has to be read from the device, and the host waits for it.
        """
        if self._places is None:
            rows, columns = (self.targets != _NO_TARGET).nonzero(as_tuple=True)
            self._places = rows, columns
        return self._places

    def select(self, rows: Tensor) -> "UpperStates":
        """The states of some edits, int64 `(R,)`, without padding that none of them needs."""
        targets, prefix_mask = self.targets[rows], self.prefix_mask[rows]
        width = int((targets != _NO_TARGET).sum(dim=1).max())
        start = prefix_mask.shape[1] - int(prefix_mask.sum(dim=1).max())
        return UpperStates(
            self.hidden[rows, :width],
            [(keys[rows, :, start:], values[rows, :, start:]) for keys, values in self.prefix],
            prefix_mask[:, start:],
            self.position_ids[rows, :width],
            targets[:, :width],
            self.module_output[rows],
        )

    def joined(self, other: "UpperStates") -> "UpperStates":
        """These edits and then the others, padded to a common width."""
        width = max(self.hidden.shape[1], other.hidden.shape[1])
        past = max(self.prefix_mask.shape[1], other.prefix_mask.shape[1])
        a, b = self._padded(width, past), other._padded(width, past)
        prefix = [
            (torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1]]))
            for ours, theirs in zip(a.prefix, b.prefix, strict=True)
        ]
        return UpperStates(
            torch.cat([a.hidden, b.hidden]),
            prefix,
            torch.cat([a.prefix_mask, b.prefix_mask]),
            torch.cat([a.position_ids, b.position_ids]),
            torch.cat([a.targets, b.targets]),
            torch.cat([a.module_output, b.module_output]),
        )

    def _padded(self, width: int, past: int) -> "UpperStates":
        right, left = width - self.hidden.shape[1], past - self.prefix_mask.shape[1]
        return UpperStates(
            F.pad(self.hidden, (0, 0, 0, right)),
            [(F.pad(k, (0, 0, left, 0)), F.pad(v, (0, 0, left, 0))) for k, v in self.prefix],
            F.pad(self.prefix_mask, (left, 0)),
            F.pad(self.position_ids, (0, right)),
            F.pad(self.targets, (0, right), value=_NO_TARGET),
            self.module_output,
        )


class UpperLayers:
    """The layers of a decoder above the output of one module.

    Args:
        model: the whole model; its modules are shared, nothing is copied.
        path: dotted path of the module whose output at the last prompt token will be changed.

    Attributes:
        module_ends_layer: whether the module's output is the last thing that its layer adds, so that the layer itself
            need not run again.
        longest: tokens of the longest edit that may be prepared together with others; `math.inf` for most models.

    Raises:
        NotSupportedError: the module is in no numbered layer, the layers cannot run on cached keys and values, or a
            check on short rows shows that they give other logits or losses than the whole model.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        layer = decoder_layer_index(path)
        if layer is None:
            raise NotSupportedError(f"{path} is in no numbered layer")
        self._model = model
        self._module = model.get_submodule(path)
        # The decoder holds the list of layers; below the head it is the base, or lies in it (OPT, models that see).
        list_path = f"{path}.".partition(f".{layer}.")[0]
        decoder_path, _, self._list_name = list_path.rpartition(".")
        self._base, *self._inner = decoder_path.split(".")
        self._decoder: Any = model.get_submodule(decoder_path)
        self._layers: Any = model.get_submodule(list_path)
        self._layer, self._n_layers = layer, n_decoder_layers(model)
        if not takes(self._decoder, "cache"):
            raise NotSupportedError(f"{type(self._decoder).__name__} keeps no cache of keys and values")
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
            raise NotSupportedError(f"{type(self._decoder).__name__} has layers that keep a running state")
        self.longest = _even_positions(model)
        with refusing(self._decoder):
            self.module_ends_layer = self._module_ends_layer()
            self._first = layer + 1 if self.module_ends_layer else layer
            self._check()

    @property
    def device(self) -> torch.device:
        """Where the wrapped module's output is."""
        return next(self._module.parameters()).device

    def bytes_of_weights(self) -> int:
        """The memory of the model's parameters; shared ones count once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def bytes_per_edit(self) -> int:
        """A generous guess of the memory of one edit in training: states, activations of a step, logits."""
        config = self._model.config.get_text_config()
        per_token = 40 * config.hidden_size * (1 + self._n_layers - self._first) + 12 * config.vocab_size
        return int(_TOKENS_GUESS * per_token * self._model.dtype.itemsize // 2)

    @torch.no_grad()
    def prepare(self, edits: Sequence[EncodedEdit]) -> UpperStates:
        """Run the whole model once over the edits and keep what the upper layers need.

        Hooks of an editor are silent here: they act on calls of the model, and this calls its decoder.
        """
        device = self._model.device
        past = max(len(edit.prompt) for edit in edits) - 1
        new = max(len(edit.target) for edit in edits)
        # Filled on the CPU and moved as a whole: the host waits for the device at every copy.
        ids = torch.zeros((len(edits), past + new), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        targets = torch.full((len(edits), new), _NO_TARGET)
        for i, edit in enumerate(edits):
            start, length = past + 1 - len(edit.prompt), len(edit.ids) - 1
            ids[i, start : start + length] = torch.tensor(edit.ids[:-1])
            mask[i, start : start + length] = True
            targets[i, : len(edit.target)] = torch.tensor(edit.target)
        ids, mask, targets = ids.to(device), mask.to(device), targets.to(device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = _cache([_Recorder(keep=i >= self._first) for i in range(self._n_layers)])
        with outputs_of({"": self._module}) as module_out, self._entering() as entering:
            self._decoder(input_ids=ids, cache=cache, use_cache=True, **self._arguments(mask, positions))
        prefix = [(layer.keys[:, :, :past], layer.values[:, :, :past]) for layer in cache.layers[self._first :]]
        hidden, output = entering[""][:, past:], as_sequences(module_out[""], ids.shape)[:, past]
        return UpperStates(hidden, prefix, mask[:, :past], positions[:, past:], targets, output)

    def losses(self, states: UpperStates, added: Tensor) -> Tensor:
        """Mean token cross-entropy (nats) of each edit's target, float32 `(B,)`.

        Args:
            states: of `prepare`.
            added: float32 `(B, d)`, what is added to the module's output at the last prompt token.
        """
        places = states.places()
        logits = self.logits(states, added, places)
        per_token = F.cross_entropy(logits, states.targets[places].to(logits.device), reduction="none")
        counts = (states.targets != _NO_TARGET).sum(dim=1).to(per_token.device)
        # Segments are summed in one order; an `index_add` on a GPU takes any, and two runs would differ.
        sums: Tensor = torch.segment_reduce(per_token, "sum", lengths=counts, unsafe=True)
        return sums / counts

    def logits(self, states: UpperStates, added: Tensor, positions: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Logits `(N, V)`, float32, at `N` positions, row by row.

        Args:
            states: of `prepare`.
            added: float32 `(B, d)`, what is added to the module's output at the last prompt token.
            positions: bool `(B, Y)`, true at the `N` of them; or their rows and columns, int64 `(N,)` each.
        """
        return self._logits(self._run(states, added)[positions]).float()

    def _run(self, states: UpperStates, added: Tensor) -> Tensor:
        """Final hidden states `(B, Y, d)`."""
        mask = torch.cat([states.prefix_mask, states.targets != _NO_TARGET], dim=1)
        past = states.prefix_mask.shape[1]
        cache = _cache([_Prefix(pair, past) for pair in [*[None] * self._first, *states.prefix]])
        arguments = {"cache": cache, "use_cache": True, **self._arguments(mask, states.position_ids)}
        if self.module_ends_layer:
            return self._decoded(_with_first(states.hidden, added), **arguments)
        shape = states.hidden.shape[:2]
        with patched_output(
            self._module, lambda output: _with_first(as_sequences(output, shape), added).view_as(output)
        ):
            return self._decoded(states.hidden, **arguments)

    # --- The model's own code with stubs in the place of parts ----------------------------------------------

    def _decoded(self, entering: Tensor, **arguments: Any) -> Tensor:
        """Final hidden states `(B, T, d)` of the decoder whose upper layers are entered by `(B, T, d)`."""
        return _hidden_of(self._entered(self._first, entering)(inputs_embeds=entering, **arguments))

    def _entered(self, first: int, entering: Tensor) -> Any:
        """The decoder, entered at layer `first` by `(B, T, d)`: whatever comes from below, its embeddings too, is lost.

        The layers below hand up these states; the lowest layer has none below, and takes them itself.
        """
        lowest: nn.Module = self._layers[0]
        below = _Stub(lambda *_, **__: (entering,) if self._in_tuples else entering)
        enter = _Stub(lambda hidden_states, *args, **kwargs: lowest(entering, *args, **kwargs))
        layers = copy.copy(self._layers)
        layers._modules = {**self._layers._modules, **({str(i): below for i in range(first)} or {"0": enter})}
        return _with_part(self._decoder, self._list_name, layers)

    def _logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of final hidden states `(N, d)`: logits `(N, V)`."""
        decoded = self._output_class(last_hidden_state=hidden[None])
        stub = _Stub(lambda *_, **__: decoded)
        for name in self._inner:
            stub.add_module(name, stub)  # some heads call the base, others the decoder in it
        model = _with_part(self._model, self._base, stub)
        unread = torch.zeros(hidden.shape[:1], dtype=torch.long, device=hidden.device)[None]
        # Not called but forwarded: hooks on the model, an editor's too, are for passes through all of it.
        logits: Tensor = model.forward(input_ids=unread, use_cache=False).logits[0]
        return logits

    def _arguments(self, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Mask and positions as the decoder takes them."""
        placed = {"position_ids": positions} if takes(self._decoder, "position_ids") else {}
        return {"attention_mask": mask.long(), **placed}

    def _entering(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Within the block, what enters the upper layers."""
        watch = outputs_of if self.module_ends_layer else inputs_of
        return watch({"": self._layers[self._layer]})

    # --- Whether that is what the model says -----------------------------------------------------------------

    @torch.no_grad()
    def _module_ends_layer(self) -> bool:
        """Whether a change of the module's output is the same change of its layer's output."""
        ids = torch.arange(1, 5, device=self._model.device)[None] % self._model.config.get_text_config().vocab_size
        watched = {"module": self._module, "layer": self._layers[self._layer]}
        kinds: list[bool] = []
        watch_kind = watched["layer"].register_forward_hook(lambda *call: kinds.append(isinstance(call[-1], tuple)))
        with watch_kind, outputs_of(watched) as before:
            self._output_class = type(self._model.get_submodule(self._base)(input_ids=ids, use_cache=False))
        self._in_tuples = kinds[0]
        output = as_sequences(before["module"], ids.shape)
        change = torch.linspace(-1, 1, output.shape[-1], device=output.device) * output.std()
        with _added_at(self._module, 0, change), outputs_of(watched) as after:
            self._decoder(input_ids=ids, use_cache=False)
        difference = (after["layer"] - before["layer"])[:, 0].float()
        return bool(_close(difference, change.float()[None].to(difference.device), output.dtype))

    @torch.no_grad()
    def _check(self) -> None:
        """Compare logits and losses of two padded rows, changed at the module, with those of the whole model."""
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = tuple(token % vocabulary for token in range(1, 9))
        edits = [EncodedEdit(ids[:5], ids[5:]), EncodedEdit(ids[:2], ids[2:4])]
        states = self.prepare(edits)
        output = states.module_output.float()
        added = torch.linspace(-1, 1, output.shape[1], device=output.device) * output.std(dim=1, keepdim=True)
        losses, logits = self.losses(states, added), self.logits(states, added, states.places())
        parts = torch.split(logits, [len(edit.target) for edit in edits])
        for edit, change, loss, part in zip(edits, added, losses, parts, strict=True):
            whole = self._whole_logits(edit, change)
            expected = F.cross_entropy(whole.float(), torch.tensor(edit.target, device=whole.device))
            ours, theirs = torch.cat([part.flatten(), loss[None]]), torch.cat([whole.float().flatten(), expected[None]])
            if not _close(ours.cpu(), theirs.cpu(), whole.dtype):
                raise NotSupportedError(f"{type(self._decoder).__name__} says other things by its upper layers alone")

    def _whole_logits(self, edit: EncodedEdit, change: Tensor) -> Tensor:
        """The model's own logits `(Y, V)` for a target, with `change` `(d,)` at the last prompt token."""
        tokens = torch.tensor([edit.ids[:-1]], device=self._model.device)
        with _added_at(self._module, len(edit.prompt) - 1, change):
            logits: Tensor = self._model.forward(input_ids=tokens, use_cache=False).logits[0, -len(edit.target) :]
        return logits


LayersT = TypeVar("LayersT", bound=UpperLayers)


class FastPath(Generic[LayersT]):
    """The upper layers, made when first needed; where the model does not fit, the reason, for `warnings`.

    Args:
        make: makes the layers, or raises `NotSupportedError`.
        instead: what is done without them, as the beginning of a sentence.
        wanted: False takes the plain path without a word.
    """

    def __init__(self, make: Callable[[], LayersT], instead: str, *, wanted: bool = True) -> None:
        self._make = make
        self._instead = instead
        self._layers: LayersT | None = None
        self._tried = not wanted
        self._reason: str | None = None

    def layers(self, longest: int = 0) -> LayersT | None:
        """The layers, or None: the whole model must run.

        Args:
            longest: tokens of the longest edit at hand.
        """
        if not self._tried:
            self._tried = True
            try:
                self._layers = self._make()
            except NotSupportedError as reason:
                self.give_up(str(reason))
        if self._layers is None or longest <= self._layers.longest:
            return self._layers
        self._reason = (
            f"an edit of {longest} tokens is past the {self._layers.longest} up to which a row leaves the rotary "
            f"embeddings of its batch alone"
        )
        return None

    def give_up(self, reason: str) -> None:
        """Take the plain path from now on, and say why."""
        self._tried, self._layers, self._reason = True, None, reason

    def warnings(self) -> list[str]:
        """That the plain path was taken where the fast one was wanted, and why."""
        return [f"{self._instead}: {self._reason}"] if self._reason else []


class _Recorder(CacheLayerMixin):
    """A layer of a cache that remembers the keys and values it is given once."""

    is_sliding = False

    def __init__(self, *, keep: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keep = keep

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._keep:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to set up."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Prefix(CacheLayerMixin):
    """A layer of a cache that stands for a fixed past: new tokens see it, but are not added to it."""

    is_sliding = False

    def __init__(self, pair: tuple[Tensor, Tensor] | None, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pair = pair
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._pair is None:
            return key_states, value_states
        keys, values = self._pair
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to set up."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


def _cache(layers: list[Any]) -> Any:
    return Cache(layers=layers)


class _Stub(nn.Module):
    """In the place of a part of a model: gives what `answer` makes of a call."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)


def _with_part(whole: nn.Module, path: str, part: nn.Module) -> Any:
    """A shallow copy of a module with another part at `path`; all else is shared."""
    name, _, rest = path.partition(".")
    twin = copy.copy(whole)
    twin._modules = {**whole._modules, name: _with_part(whole.get_submodule(name), rest, part) if rest else part}
    for bound in ("forward", "_hf_hook", "_old_forward"):  # accelerate's, bound to the original
        twin.__dict__.pop(bound, None)
    return twin


def _even_positions(model: PreTrainedModel) -> float:
    """Tokens up to which a position's rotary embedding does not depend on the longest row of the batch."""
    config: Any = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rotary, *rotary.values())
        if isinstance(kind, Mapping) and kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=math.inf)


@contextmanager
def _added_at(module: nn.Module, token: int, change: Tensor) -> Iterator[None]:
    """Within the block a module's output for one sequence has `change` `(d,)` added at a token, in float32."""

    def add(output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-1])
        changed = (rows[token].float() + change.to(rows.device)).to(rows.dtype)
        return torch.cat([rows[:token], changed[None], rows[token + 1 :]]).view_as(output)

    with patched_output(module, add):
        yield


def _with_first(states: Tensor, added: Tensor) -> Tensor:
    """States `(B, Y, d)` with `added` `(B, d)` on the first position, summed in float32."""
    first = (states[:, 0].float() + added.to(states.device)).to(states.dtype)
    return torch.cat([first[:, None], states[:, 1:]], dim=1)


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of the model's dtype."""
    scale = b.float().abs().max().clamp(min=1e-6)
    return bool((a.float() - b.float()).abs().max() <= 50 * torch.finfo(dtype).eps * scale)
