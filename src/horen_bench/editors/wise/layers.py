"""The pass with side weights, in two ways: on the whole model, and on the layers above the module alone.

Below the module nothing depends on the side weight, so its input, its own output, and the residual that its layer adds
it to are computed once per edit, and so is what the decoder hands to each layer (mask, rotary embedding). Above,
only the positions that predict a label matter behind the last attention. Edits of different shards go through side by
side, each through a side weight of its own: one batched product, and one pass of all rows through what is above.
Shapes: `S` edits of `R` rows; `T` tokens of the longest; `B = S * (R - 1)` edit rows, without the columns where all of
them are padding.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.editors.wise.training import Activation, Forward, SidePass, distances
from horen_bench.models.calls import takes
from horen_bench.models.hooks import as_sequences, ending_at, first_tensor, inputs_of, outputs_of, patched_output
from horen_bench.models.partial import NotSupportedError, UpperLayers, refusing
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import Batch


def plain_pass(
    model: PreTrainedModel, hook: PromptHook, rows: TrainingRows, bias: Tensor | None, activation: Activation
) -> Forward:
    """The whole model on all rows of one edit at every step: the path that the fast one is compared with."""

    def forward(weights: Tensor) -> SidePass:
        moved: list[Tensor] = []

        def respond(inputs: Tensor, outputs: Tensor, _mask: Tensor) -> Tensor:
            side = F.linear(inputs, weights[0], bias)
            moved.append(distances(side, activation(outputs), activation))
            return side.clone()  # a decoder may add to it in place, and the distances need it as it is

        with hook.responding(respond):
            done = model(**_arguments_of(rows, model), output_hidden_states=True)
        hidden = done.hidden_states[-1][:-1][rows.predicting]
        return SidePass(done.logits[:-1][rows.predicting], hidden, moved[0].mean(dim=1)[None], done.logits)

    return forward


def _arguments_of(rows: TrainingRows, model: nn.Module) -> dict[str, Any]:
    """What a model or its decoder is called with for an edit's rows.

    Positions count columns, as published: attention that sees distances alone does not notice. Where positions have a
    table of embeddings, beside that of the tokens, they count real tokens, as wherever the model is asked.
    """
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    batch = Batch(rows.input_ids, rows.attention_mask)
    placed = {"position_ids": batch.position_ids} if len(tables) > 1 and takes(model, "position_ids") else {}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False, **placed}


@dataclass(frozen=True, slots=True)
class _Above:
    """What the upper layers need of an edit beside the module's outputs.

    Attributes:
        entering: `(B, T, d)`, their input where the module gives nothing.
        calls: what the decoder hands to each layer beside hidden states, positional and keyword arguments.
        predicting: bool `(B, T)`, the positions that count.
        places: int64 `(n,)`, the same as indices into `B * T`.
    """

    entering: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    predicting: Tensor
    places: Tensor


class SideLayers(UpperLayers):
    """The layers above a module, run on whole sequences of which every token has another module output.

    Args:
        model: the whole model; its modules are shared, nothing is copied.
        path: dotted path of the module whose output will be changed.

    Raises:
        NotSupportedError: as `UpperLayers`, or a check on a short batch shows that its upper layers, one by one, give
            other hidden states.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        super().__init__(model, path)
        self._tokenwise: list[nn.Module] = []
        self._check_layers()
        self._tokenwise = self._tokenwise_modules()

    def side_pass(self, edits: Sequence[TrainingRows], bias: Tensor | None, activation: Activation) -> Forward:
        """The pass on some edits' rows; what does not depend on the side weights is computed here, once."""
        width, n_edits, n_rows = max(rows.input_ids.shape[1] for rows in edits), len(edits), edits[0].input_ids.shape[0]
        below = [self._below(rows) for rows in edits]
        inputs, main, entering = (torch.stack([_widened(states[i], width) for states in below]) for i in range(3))
        activated = activation(main)
        missing = [width - rows.input_ids.shape[1] for rows in edits]  # padding columns that an edit alone has not
        mask = torch.cat(
            [F.pad(rows.attention_mask[:-1], (lack, 0)) for rows, lack in zip(edits, missing, strict=True)]
        )
        predicting = torch.cat([F.pad(rows.predicting, (lack, 0)) for rows, lack in zip(edits, missing, strict=True)])
        columns = torch.arange(width, device=mask.device) - torch.tensor(missing, device=mask.device)[:, None]
        positions = columns.clamp(min=0).repeat_interleave(n_rows - 1, dim=0)
        padding = int((mask.bool() | predicting).any(dim=0).int().argmax())  # columns that no edit row needs
        above = self._prepared(
            entering[:, :-1, padding:].flatten(0, 1), mask[:, padding:], positions[:, padding:], predicting[:, padding:]
        )

        def forward(weights: Tensor) -> SidePass:
            side = inputs.view(n_edits, n_rows * width, -1) @ weights.transpose(1, 2)
            side = (side if bias is None else side + bias).view(main.shape)
            hidden = self._through(above, side[:, :-1, padding:].flatten(0, 1))
            moved = distances(side, activated, activation)
            means = [rows[:, lack:].mean(dim=1) for rows, lack in zip(moved, missing, strict=True)]
            return SidePass(self._logits(hidden), hidden, torch.stack(means))

        return forward

    @torch.no_grad()
    def _below(self, rows: TrainingRows) -> tuple[Tensor, Tensor, Tensor]:
        """The module's input and output, and what enters the layers above where the module gives nothing."""
        module, shape = self._module, rows.input_ids.shape
        with (
            inputs_of({"": module}) as inputs,
            outputs_of({"": module}) as outputs,
            patched_output(module, lambda output: torch.zeros_like(output) if self.module_ends_layer else None),
            self._entering() as entering,
            ending_at(self._layers[self._layer]),
        ):
            self._decoder(**_arguments_of(rows, self._model))
        return as_sequences(inputs[""], shape), as_sequences(outputs[""], shape), entering[""]

    @torch.no_grad()
    def _prepared(self, entering: Tensor, mask: Tensor, positions: Tensor, predicting: Tensor) -> _Above:
        """Run the upper decoder once and keep what it hands to each layer."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

        with ExitStack() as hooks:
            for layer in self._layers_above():
                hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            self._decoded(entering, use_cache=False, **self._arguments(mask, positions))
        return _Above(entering, calls, predicting, predicting.flatten().nonzero()[:, 0])

    def _through(self, above: _Above, side: Tensor) -> Tensor:
        """Final hidden states at the predicting positions, `(n, d)`, with module outputs `(B, T, d)`."""
        hidden = above.entering + side if self.module_ends_layer else above.entering
        with ExitStack() as hooks:
            for module in self._tokenwise:
                hooks.enter_context(_only_at(module, above))
            if not self.module_ends_layer:
                hooks.enter_context(patched_output(self._module, lambda output: side.reshape(output.shape)))
            for layer, (args, kwargs) in zip(self._layers_above(), above.calls, strict=True):
                hidden = first_tensor(layer(hidden, *args, **kwargs))
        return self._behind_layers(hidden.flatten(0, 1)[above.places])

    def _behind_layers(self, hidden: Tensor) -> Tensor:
        """What the decoder makes of `(n, d)` from its last layer: each state a sequence of its own."""
        decoder = self._entered(self._n_layers, hidden[:, None])
        unread = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        final: Tensor = decoder(input_ids=unread, use_cache=False).last_hidden_state[:, 0]
        return final

    def _layers_above(self) -> Sequence[nn.Module]:
        return list(self._layers[self._first :])

    @torch.no_grad()
    def _check_layers(self) -> None:
        """Compare with the upper decoder as a whole."""
        with refusing(self._decoder):
            above, mask, positions = self._example()
            ours = self._through(above, torch.zeros_like(above.entering))
            with nullcontext() if self.module_ends_layer else patched_output(self._module, torch.zeros_like):
                whole, cut = (
                    self._decoded(
                        above.entering[:, n:], use_cache=False, **self._arguments(mask[:, n:], positions[:, n:])
                    )
                    for n in (0, 1)
                )
        if not _near(ours, whole[above.predicting]):
            raise NotSupportedError(f"{type(self._decoder).__name__} does more than run one layer after the other")
        # Labels may be predicted from padding (`TrainingRows`), so columns of padding may go only where it sees none.
        if not _near(cut[0, 0], whole[0, 1]):
            raise NotSupportedError(f"in {type(self._decoder).__name__} padding sees how much of it there is")

    @torch.no_grad()
    def _tokenwise_modules(self) -> list[nn.Module]:
        """Modules of the last layer that need run on predicting tokens only; none where that changes those tokens."""
        if self._first >= self._n_layers:
            return []
        last = self._layers[-1]
        owners = [(getattr(last, "self_attn", None), "q_proj"), (getattr(last, "self_attn", None), "o_proj")]
        parts = [getattr(owner, name, None) for owner, name in [*owners, (last, "mlp")]]
        modules = [part for part in parts if part is not None and self._module not in set(part.modules())]
        above, _, _ = self._example()
        zeros = torch.zeros_like(above.entering)
        whole = self._through(above, zeros)
        self._tokenwise = modules
        with suppress(NotSupportedError), refusing(self._decoder):
            return modules if _near(self._through(above, zeros), whole) else []
        return []

    def _example(self) -> tuple[_Above, Tensor, Tensor]:
        """A small batch of made-up states, its mask and positions."""
        weight = next(self._module.parameters())
        width = self._model.config.get_text_config().hidden_size
        states = torch.linspace(-1, 1, 12 * width, device=weight.device).mul(40).sin().to(weight.dtype)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], device=weight.device)
        predicting = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]], device=weight.device).bool()
        positions = torch.arange(6, device=weight.device)[None]
        return self._prepared(states.view(2, 6, width), mask, positions, predicting), mask, positions


@contextmanager
def _only_at(module: nn.Module, above: _Above) -> Iterator[None]:
    """Within the block the module runs on the predicting tokens alone, and gives 0 for all others."""
    shape = above.predicting.shape

    def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[None, above.places], *args[1:])

    def spread(some: Tensor) -> Tensor:
        whole = some.new_zeros(shape.numel(), some.shape[-1]).index_copy(0, above.places, some.flatten(0, -2))
        return whole.view(*shape, -1)

    with module.register_forward_pre_hook(select), patched_output(module, spread):
        yield


def _near(ours: Tensor, reference: Tensor) -> bool:
    """Equal up to the rounding of their dtype."""
    scale = reference.float().abs().max().clamp(min=1e-6)
    return bool((ours.float() - reference.float()).abs().max() <= 50 * torch.finfo(ours.dtype).eps * scale)


def _widened(states: Tensor, width: int) -> Tensor:
    """States `(R, T, ...)` with zeros to their left, up to `width` tokens."""
    return F.pad(states, (0, 0, width - states.shape[1], 0))
