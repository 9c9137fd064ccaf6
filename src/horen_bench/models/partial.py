"""The decoder layers above one point, run on cached states: what every optimiser of values needs.

A value written at the last prompt token of layer `l` leaves everything below `l`, and every earlier position, as it
is. So one pass through the whole model, without gradients, gives all that training needs: the hidden states that enter
the upper layers from the last prompt token on, and the upper layers' keys and values of the tokens before it. A
training step then runs `|y|` positions through the layers above `l` and the head, not the whole sequence through the
whole model.

Shapes: `B` edits; `P` prompt and `Y` target tokens of the longest; `d` hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from horen_bench.models.architecture import decoder_layer_index
from horen_bench.models.hooks import inputs_of, outputs_of, patched_output
from horen_bench.models.memory import is_out_of_memory
from horen_bench.prompts import EncodedEdit

_NO_TARGET = -100
_TOKENS_GUESS = 16  # positions of one edit that a step works on, for the guess of a batch size


class NotSupportedError(Exception):
    """The model does not have the usual decoder layout, so that the plain path must be taken."""


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

    Raises:
        NotSupportedError: the module is in no numbered layer, the model is not laid out as `decoder.layers` with a
            head, or a check on a short sequence shows that running its upper layers alone gives other logits.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        layer = decoder_layer_index(path)
        if layer is None:
            raise NotSupportedError(f"{path} is in no numbered layer")
        self._model = model
        self._module = model.get_submodule(path)
        try:
            self._decoder: Any = model.get_decoder()
            self._head: Any = model.get_output_embeddings()
            self._layers: nn.ModuleList = self._decoder.layers
            self._n_layers = len(self._layers)
            self._head.weight  # noqa: B018 - asks whether there is one
        except AttributeError as error:
            raise NotSupportedError(f"{type(model).__name__} has no decoder.layers with a head") from error
        self._layer = layer
        # Where the module's output is the last thing that its layer adds, the layer itself need not run again.
        self.module_ends_layer = self._module_ends_layer()
        self._first = layer + 1 if self.module_ends_layer else layer
        self._upper = self._upper_decoder()
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
        return int(_TOKENS_GUESS * per_token * self._head.weight.element_size() // 2)

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
        with outputs_of({"": self._module}) as module_out, inputs_of({"": self._boundary()}) as entering:
            self._decoder(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, cache=cache, use_cache=True
            )
        prefix = [(layer.keys[:, :, :past], layer.values[:, :, :past]) for layer in cache.layers[self._first :]]
        hidden, output = entering[""][:, past:], module_out[""][:, past]
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
        logits: Tensor = self._head(self._run(states, added)[positions])
        return logits.float()

    def _run(self, states: UpperStates, added: Tensor) -> Tensor:
        """Final hidden states `(B, Y, d)`."""
        mask = torch.cat([states.prefix_mask, states.targets != _NO_TARGET], dim=1)
        below = [_Prefix(None, states.prefix_mask.shape[1]) for _ in range(self._first)]
        cache = _cache([*below, *(_Prefix(pair, states.prefix_mask.shape[1]) for pair in states.prefix)])
        arguments = {
            "attention_mask": mask.long(),
            "position_ids": states.position_ids,
            "cache": cache,
            "use_cache": True,
        }
        if self.module_ends_layer:
            return _hidden_of(self._upper(inputs_embeds=_with_first(states.hidden, added), **arguments))
        with patched_output(self._module, lambda output: _with_first(output, added)):
            return _hidden_of(self._upper(inputs_embeds=states.hidden, **arguments))

    def _boundary(self) -> nn.Module:
        """The module whose input enters the upper layers: the first of them, or the norm behind the last layer."""
        if self._first < self._n_layers:
            return self._layers[self._first]
        norm: nn.Module | None = getattr(self._decoder, "norm", None)
        if norm is None:
            raise NotSupportedError(f"{type(self._decoder).__name__} has no norm behind its last layer")
        return norm

    def _upper_decoder(self) -> Any:
        """The decoder with its lower layers left out; every module is shared."""
        upper = copy.copy(self._decoder)
        upper._modules = {**self._decoder._modules, "layers": nn.ModuleList(self._layers[self._first :])}
        upper.config = copy.deepcopy(self._decoder.config)
        upper.config.num_hidden_layers = self._n_layers - self._first
        if getattr(upper.config, "layer_types", None):
            upper.config.layer_types = upper.config.layer_types[self._first :]
        for name in ("forward", "_hf_hook", "_old_forward"):  # accelerate's, bound to the whole decoder
            upper.__dict__.pop(name, None)
        return upper

    @torch.no_grad()
    def _module_ends_layer(self) -> bool:
        """Whether a change of the module's output is the same change of its layer's output."""
        ids = torch.arange(1, 5, device=self._model.device)[None] % self._model.config.get_text_config().vocab_size
        watched = {"module": self._module, "layer": self._layers[self._layer]}
        with outputs_of(watched) as before:
            self._decoder(input_ids=ids, use_cache=False)
        output = before["module"]
        change = torch.linspace(-1, 1, output.shape[-1], device=output.device) * output.std()
        with patched_output(self._module, lambda out: _with_first(out, change[None])), outputs_of(watched) as after:
            self._decoder(input_ids=ids, use_cache=False)
        difference = (after["layer"] - before["layer"])[:, 0].float()
        return bool(_close(difference, change.float()[None].to(difference.device), output.dtype))

    @torch.no_grad()
    def _check(self) -> None:
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = tuple(token % vocabulary for token in range(1, 9))
        edits = [EncodedEdit(ids[:5], ids[5:]), EncodedEdit(ids[:2], ids[2:4])]
        try:
            states = self.prepare(edits)
            ours = self._head(self._run(states, torch.zeros_like(states.module_output)))
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise NotSupportedError(f"{type(self._decoder).__name__}: {error}") from error
        for row, edit in enumerate(edits):
            tokens = torch.tensor([edit.ids[:-1]], device=self._model.device)
            whole = self._head(_hidden_of(self._decoder(input_ids=tokens, use_cache=False)))
            n = len(edit.target)
            if not _close(ours[row, :n], whole[0, -n:], whole.dtype):
                raise NotSupportedError(
                    f"{type(self._decoder).__name__} gives other logits from its upper layers alone"
                )


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

    def layers(self) -> LayersT | None:
        """The layers, or None: the whole model must run."""
        if not self._tried:
            self._tried = True
            try:
                self._layers = self._make()
            except NotSupportedError as reason:
                self.give_up(str(reason))
        return self._layers

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
