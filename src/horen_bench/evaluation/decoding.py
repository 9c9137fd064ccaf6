"""Greedy decoding of many prompts at once, and how long it takes.

The reference is plain: each prompt alone, without a cache, the whole sequence run again for each token. Faster ways are
wrong on some architectures: Mamba takes no attention mask behind the prompt, RWKV takes none at all, RecurrentGemma
keeps its state in its modules. So each model is decoded in the fastest of `WAYS` that agrees with the reference.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.models.calls import run, takes
from horen_bench.models.memory import is_out_of_memory
from horen_bench.models.padding import grouped, length_class, pads_safely, same_logits, trial_row
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import PromptEncoder, announced_prompt, pad

# What is timed, on every model alike; ours.
_TIMED_PROBES, _TIMED_TOKENS = 20, 8

# The next token of each of some rows, given by their numbers and their logits `(b, V)`.
Pick = Callable[[list[int], Tensor], list[int]]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode.

    Attributes:
        padded: rows of any length share a batch; else rows of one length.
        cached: run each new token on a cache; else the whole sequence again.
        masked_steps: pass the attention mask behind the prompt too, which recurrent models do not take.
        drawback: what is slow about it, and why it was taken all the same; "" where there is nothing to say.
    """

    padded: bool
    cached: bool
    masked_steps: bool = False
    drawback: str = ""


# Fastest first.
WAYS = (
    Way(padded=True, cached=True, masked_steps=True),
    Way(padded=True, cached=True),
    Way(padded=False, cached=True, drawback="only prompts of one length at once, since padding changes its logits"),
    Way(padded=False, cached=False, drawback="the whole text for each token, since its cache cannot be relied on"),
)

_found: WeakKeyDictionary[PreTrainedModel, Way] = WeakKeyDictionary()


@torch.no_grad()
def greedy_decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n_tokens: Sequence[int],
    pad_id: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Argmax continuations of token id prompts, batched with a cache where the model is right that way.

    A row leaves the batch when it has its tokens or ends in one of `stop`, so how long it is decoded depends on the
    row alone, and rows of one batch do not influence each other. Without `stop` EOS is a token like any other.

    Args:
        model: the model.
        prompts: `B` rows of token ids.
        n_tokens: new tokens per row, at least 1 each.
        pad_id: fills the padding.
        stop: ids that end a row.

    Returns:
        For row `i` its new ids: `n_tokens[i]` of them, or fewer and a stop id last.

    Raises:
        UserError: see `way_of`.
    """
    return _Decoder(model, way_of(model), pad_id, _most_likely, frozenset(stop)).decode(prompts, n_tokens)


@torch.no_grad()
def way_of(model: PreTrainedModel) -> Way:
    """The fastest way to decode that agrees with the reference on this model; tried on the first call.

    Raises:
        UserError: the model cannot be run on token ids alone, is not causal, or even the slowest way does not agree.
    """
    if model not in _found:
        safe, reference = pads_safely(model), _trial(model, WAYS[-1], alone=True)
        way = next((way for way in WAYS if (safe or not way.padded) and _agrees(model, way, reference)), None)
        if way is None:
            raise UserError(
                f"{type(model).__name__} does not give the same logits for a prompt alone and among others of its "
                "length, so no score would mean anything; call model.eval(), or choose a model without random layers"
            )
        _check_causal(model)
        _found[model] = way
    return _found[model]


def decoding_drawbacks(model: PreTrainedModel) -> list[str]:
    """A sentence where a model was decoded in a slow way, and why."""
    way = _found.get(model)
    if way is None or not way.drawback:
        return []
    return [f"{type(model).__name__} was run on {way.drawback}; that is slow and changes no score"]


def _check_causal(model: PreTrainedModel) -> None:
    """See that what stands behind a token does not change its logits.

    Raises:
        UserError: it does.
    """
    whole = trial_row(model, 0, 6)
    start = whole[:3]
    batches = [pad([row], 0, device=model.device) for row in (whole, start)]
    with announced_prompt(batches[1].attention_mask):
        of_whole, of_start = (run(model, batch).logits[0, : len(start)] for batch in batches)
    if not same_logits(model, of_whole, of_start):
        raise UserError(
            f"{type(model).__name__} looks at the text behind a token, where the answer stands that it is to predict; "
            "choose a decoder-only causal language model, or set is_decoder in its config.json"
        )


def _agrees(model: PreTrainedModel, way: Way, reference: Tensor) -> bool:
    try:
        return same_logits(model, _trial(model, way), reference)
    except UserError:
        raise
    except Exception as error:  # each architecture fails in its own way
        if is_out_of_memory(error):
            raise
        return False


def _trial(model: PreTrainedModel, way: Way, *, alone: bool = False) -> Tensor:
    """Logits `(6, V)` of each step of three rows of two lengths, which leave the batch one by one.

    They go on with given tokens: where two logits are nearly equal, rounding decides which is larger.

    Args:
        model: the model.
        way: how it is decoded.
        alone: each row for itself.
    """
    prompts, n_tokens = [trial_row(model, 0, 6), trial_row(model, 1, 3), trial_row(model, 2, 3)], [2, 1, 3]
    steps: list[list[Tensor]] = [[], [], []]

    def given(rows: list[int], logits: Tensor) -> list[int]:
        for row, of_row in zip(rows, logits, strict=True):
            steps[row].append(of_row)
        return [trial_row(model, 3 + row, len(steps[row]))[-1] for row in rows]

    _Decoder(model, way, 0, given).decode(prompts, n_tokens, alone=alone)
    return torch.stack([logits for of_row in steps for logits in of_row])


def _most_likely(_rows: list[int], logits: Tensor) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Decodes prompts in a given way.

    Attributes:
        model: the model.
        way: how.
        pad_id: fills the padding.
        pick: chooses tokens.
        stop: ids that end a row.
    """

    model: PreTrainedModel
    way: Way
    pad_id: int
    pick: Pick
    stop: frozenset[int] = frozenset()

    def decode(
        self, prompts: Sequence[Sequence[int]], n_tokens: Sequence[int], *, alone: bool = False
    ) -> list[list[int]]:
        """The new tokens of each prompt, decoded among others or each alone."""
        rows: list[list[int]] = [[] for _ in prompts]
        keys = list(map(self._key, map(len, prompts), n_tokens))
        for batch in grouped(range(len(prompts)) if alone else keys):
            cached, *_ = keys[batch[0]]
            self._go_on(self._passes([prompts[row] for row in batch], cached=cached), batch, n_tokens, rows)
        return rows

    def _go_on(self, passes: "_Passes", going: list[int], n_tokens: Sequence[int], rows: list[list[int]]) -> None:
        """Add to rows of a batch until each is done."""
        while True:
            for row, token in zip(going, self.pick(going, passes.logits()), strict=True):
                rows[row].append(token)
            kept = [i for i, row in enumerate(going) if not self._is_done(rows[row], n_tokens[row])]
            if not kept:
                return
            going = [going[i] for i in kept]
            passes.go_on(kept, [rows[row][-1] for row in going])

    def _is_done(self, row: list[int], n_tokens: int) -> bool:
        return len(row) == n_tokens or row[-1] in self.stop

    def _key(self, length: int, n_tokens: int) -> tuple[bool, int, int]:
        """Whether a row is decoded on a cache, and what the rows of its batch must share with it.

        Where it grows into another class of length, what it cached was rotated by other factors.
        """
        at_first = length_class(self.model, length)
        cached = self.way.cached and length_class(self.model, length + n_tokens - 1) == at_first
        return cached, at_first, 0 if cached and self.way.padded else length

    def _passes(self, prompts: Sequence[Sequence[int]], *, cached: bool) -> "_Passes":
        if cached:
            return _CachedPasses(self.model, prompts, self.pad_id, masked_steps=self.way.masked_steps)
        return _WholePasses(self.model, prompts)


class _Passes(Protocol):
    """Forward passes over a batch of rows that grow by a token each."""

    def logits(self) -> Tensor:
        """Logits `(b, V)` of the next token of each row."""

    def go_on(self, kept: list[int], tokens: list[int]) -> None:
        """Keep some of the rows, and add a token to each of them."""


class _CachedPasses:
    """Passes over the newest token of each row, on a cache of those before; rows are padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, *, masked_steps: bool
    ) -> None:
        if not takes(model, "cache"):
            raise TypeError(f"{type(model).__name__} takes no cache")
        batch = pad(prompts, pad_id, device=model.device)
        self._model, self._masked_steps = model, masked_steps
        self._tokens, self._mask, self._positions = batch.input_ids, batch.attention_mask, batch.position_ids
        settings: dict[str, Any] = {"cache": DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
        self._settings = {name: value for name, value in settings.items() if takes(model, name)}
        self._has_positions = takes(model, "position_ids")
        self._is_step = False

    def logits(self) -> Tensor:
        arguments = dict(self._settings)
        if self._masked_steps or not self._is_step:
            arguments["attention_mask"] = self._mask
        if self._has_positions:
            arguments["position_ids"] = self._positions
        logits: Tensor = self._model(input_ids=self._tokens, **arguments).logits[:, -1]
        return logits

    def go_on(self, kept: list[int], tokens: list[int]) -> None:
        if len(kept) < len(self._tokens):
            rows = torch.tensor(kept, device=self._tokens.device)
            self._settings["cache"].reorder_cache(rows)  # which, unlike `batch_select_indices`, every kind of layer has
            self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._tokens = self._tokens.new_tensor(tokens)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(kept), 1))], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._is_step = True


class _WholePasses:
    """Passes over whole rows of one length, without a cache; what is decoded is no part of the prompt."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._rows = [list(prompt) for prompt in prompts]
        self._n_prompt = len(prompts[0])

    def logits(self) -> Tensor:
        batch = pad(self._rows, 0, device=self._model.device)
        with announced_prompt(batch.attention_mask[:, : self._n_prompt]):
            logits: Tensor = run(self._model, batch).logits[:, -1]
        return logits

    def go_on(self, kept: list[int], tokens: list[int]) -> None:
        self._rows = [[*self._rows[row], token] for row, token in zip(kept, tokens, strict=True)]


def stop_ids(model: PreTrainedModel, encoder: PromptEncoder) -> frozenset[int]:
    """The tokens that end what a model says: the tokenizer's EOS, and all that its `generation_config` names.

    Gemma's `<end_of_turn>` and GPT-OSS's `<|call|>` are in the latter alone.
    """
    of_model: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    named = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(token for token in (encoder.tokenizer.eos_token_id, *named) if token is not None)


@torch.no_grad()
def inference_ms(model: PreTrainedModel, encoder: PromptEncoder, probes: Sequence[CaseProbe]) -> float:
    """Milliseconds that a model takes for one probe, decoding greedily without a batch; NaN without a probe.

    Every method is timed by this: the first `_TIMED_PROBES`, the tokens of each answer, at most `_TIMED_TOKENS`.
    """
    probes = probes[:_TIMED_PROBES]
    if not probes:
        return float("nan")
    prompts = encoder.prompts([probe.prompt for probe in probes])
    lengths = [min(len(ids), _TIMED_TOKENS) for ids in encoder.continuations([probe.answer for probe in probes])]
    greedy_decode(model, prompts[:1], lengths[:1], encoder.pad_id)  # the first call sets things up
    seconds = Stopwatch()
    for prompt, n_tokens in zip(prompts, lengths, strict=True):
        greedy_decode(model, [prompt], [n_tokens], encoder.pad_id)
    return 1000 * seconds.elapsed() / len(probes)
