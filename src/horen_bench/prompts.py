"""The one place that turns text into token ids: spaces, special tokens, padding, where the prompt ends.

Rules (`template: none`, those of the published code made explicit):

- a prompt is encoded with the tokenizer's default special tokens in front (BOS where it adds one), no chat template;
- a target follows its prompt after one space; its ids are those that it has in the whole text, since SentencePiece
  begins a text of its own otherwise than a word within;
- nothing is appended, not even the EOS that some tokenizers end every text with: the prompt goes on;
- the text of a special token is that token in a prompt, where people write templates by hand, and plain text in a
  target, which is to be written and compared letter by letter;
- padding is known by position (the attention mask), never by id, because `pad` often equals `eos`.

Under `template: model`, in editing and evaluation alike,

- a prompt is one user turn in the model's own chat template, up to where the answer begins; its special tokens are
  all that there are (no second BOS);
- a target follows without a space, and EOS, which ends a chat model's turn, is appended where a target is learnt;
- a template that reads the clock is shown the date of the configuration, so that a prompt is the same every day.

Where the prompt ends
    Memory editors act at the last prompt token. A forward pass whose sequences hold more than the
    prompt (teacher forcing, generation without a KV cache) is run inside `announced_prompt(mask)`;
    without an announcement everything that the attention mask keeps is the prompt.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from horen_bench.errors import UserError, reason_of

Side = Literal["left", "right"]
Template = Literal["none", "model"]

TEMPLATE_DATE = "2026-01-01"  # what a chat template takes for today, unless told otherwise

_TRIAL = "The river through Brightwater is called"
_LEAD = "\n"  # merges with no word behind it
_OTHER_TEMPLATE = "write template=none, or mend its chat_template.jinja"

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# Scoped to the `with` block and to the thread that opens it: two models never see each other's prompts.
_announced: ContextVar[Tensor | None] = ContextVar("announced_prompt", default=None)


@dataclass(frozen=True, slots=True)
class EncodedEdit:
    """A prompt and its target as token ids.

    Attributes:
        prompt: ids of the prompt alone, special tokens included.
        target: ids of the target as it follows the prompt.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole training sequence."""
        return self.prompt + self.target


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences: `input_ids` and `attention_mask`, int64 `(B, T)`; the mask is 1 on real tokens."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Positions counted over real tokens only, `(B, T)`; padding gets 0."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


class PromptEncoder:
    """Text in, token ids out, for one tokenizer and one template.

    Args:
        tokenizer: of the model; it stays as it is.
        template: `none`: bare prompts; `model`: every prompt is one user turn of the tokenizer's chat template.
        date: what a chat template takes for today, ISO 8601.

    Raises:
        UserError: `template="model"`, and the tokenizer has no chat template, or one that fails or leaves the
            prompt out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template = "none", date: str = TEMPLATE_DATE
    ) -> None:
        if template == "model" and not tokenizer.chat_template:
            raise UserError(
                "template=model: the tokenizer of this model brings no chat template; write template=none, or choose a "
                "model that was trained to chat"
            )
        self.tokenizer = tokenizer
        self.template = template
        self._today = datetime.fromisoformat(date)
        if self._chats and _TRIAL not in self._as_turn(_TRIAL):
            raise UserError(
                "template=model: the chat template of this model leaves the prompt out, so that all prompts would be "
                f"the same; {_OTHER_TEMPLATE}"
            )

    @classmethod
    def of(cls, given: "PreTrainedTokenizerBase | PromptEncoder") -> "PromptEncoder":
        """An encoder of bare prompts for a tokenizer; an encoder itself."""
        return given if isinstance(given, PromptEncoder) else cls(given)

    @property
    def pad_id(self) -> int:
        """The id that fills padding: the tokenizer's pad token, else its EOS, else 0 (masked anyway)."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    @property
    def _chats(self) -> bool:
        return self.template == "model"

    @property
    def _joint(self) -> str:
        """What stands between a prompt and its target."""
        return "" if self._chats else " "

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt: default special tokens in front, or the whole chat template around it."""
        return self._ids(self._beginnings(texts), special=not self._chats)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text for itself, default special tokens in front, never in a chat template."""
        return self._ids(texts, special=True)

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it follows some prompt, no special tokens.

        They are read off behind a line break: at the beginning of a text SentencePiece would put a word boundary more.
        """
        following = [self._joint + text for text in texts]
        (lead,) = self._ids([_LEAD], special=False)
        behind = self._ids([_LEAD + text for text in following], special=False, literal=True)
        alone = self._ids(following, special=False, literal=True)
        return [row[len(lead) :] if row[: len(lead)] == lead else bare for row, bare in zip(behind, alone, strict=True)]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone, no leading space, no special tokens: for comparing decoded text."""
        return self._ids(texts, special=False, literal=True)

    def edit(self, prompt: str, target: str, *, closed: bool = True) -> EncodedEdit:
        """`edits` of one pair."""
        return self.edits([(prompt, target)], closed=closed)[0]

    def edits(self, pairs: Sequence[tuple[str, str]], *, closed: bool = True) -> list[EncodedEdit]:
        """Encode `prompt + " " + target` so that the first ids are exactly those of the prompt alone.

        Where the tokenizer merges across the border (a prompt that ends in a space), or would take a part of the target
        for a special token, prompt and target are encoded apart and joined, so that a key read from the prompt alone is
        the key that was written. A blank target has no ids.

        Args:
            pairs: prompts, and what is to follow each.
            closed: end the target of a chat with EOS, as it is learnt; evaluation leaves that out.
        """
        beginnings = self._beginnings([prompt for prompt, _ in pairs])
        wholes = [start + self._joint + target for start, (_, target) in zip(beginnings, pairs, strict=True)]
        prompts, joint = (self._ids(texts, special=not self._chats) for texts in (beginnings, wholes))
        return [
            EncodedEdit(tuple(prompt), tuple(self._behind(prompt, whole, target, closed)))
            for prompt, whole, (_, target) in zip(prompts, joint, pairs, strict=True)
        ]

    def located(self, texts: Sequence[str], ends: Sequence[int]) -> list[tuple[list[int], int]]:
        """Token ids of each bare prompt, and which of them holds the last character before an end.

        Counted in the whole text, where a token may reach over the end; of several tokens that share a character, the
        last.

        Args:
            texts: the prompts.
            ends: number of characters up to the end, one per text.

        Returns:
            Ids and position of each; the position is -1 where no token begins before the end.

        Raises:
            UserError: the tokenizer does not say which characters its tokens hold, or prompts stand in a template.
        """
        if self._chats or not self.tokenizer.is_fast:
            why = "under template=model" if self._chats else "without a tokenizer.json"
            raise UserError(
                f"the place of a subject's last token is not known {why}; write template=none, take a model whose "
                "folder has a tokenizer.json, or choose a method that needs no subject"
            )
        encoded = self._encoded(texts, special=True, return_offsets_mapping=True)
        return [
            (ids, max((i for i, (first, last) in enumerate(spans) if first < min(last, end)), default=-1))
            for ids, spans, end in zip(self._rows(encoded, special=True), encoded["offset_mapping"], ends, strict=True)
        ]

    def unreadable(self, target: str) -> str | None:
        """Why a target can be neither learnt nor compared with this tokenizer; None where nothing is against it."""
        (ids,) = self.continuations([target])
        lost = self.tokenizer.convert_ids_to_tokens([token for token in ids if token in self._special])
        if not lost:
            return None
        return f"the tokenizer reads a part of the target as {lost[0]}, so that it could be neither learnt nor compared"

    def _behind(self, prompt: list[int], whole: list[int], target: str, closed: bool) -> list[int]:
        """Ids of a target behind those of its prompt."""
        if not target.strip():
            return []
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not self._special.isdisjoint(ids):
            (ids,) = self.continuations([target])
        eos = self.tokenizer.eos_token_id
        return [*ids, int(eos)] if self._chats and closed and eos is not None else ids

    def _beginnings(self, prompts: Sequence[str]) -> list[str]:
        """The texts that end where answers begin."""
        return [self._as_turn(prompt) for prompt in prompts] if self._chats else list(prompts)

    def _as_turn(self, prompt: str) -> str:
        """The prompt as one user turn, up to where the answer begins.

        Raises:
            UserError: the template fails.
        """
        messages = [{"role": "user", "content": prompt}]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return str(self._chat_template.render(**self.tokenizer.special_tokens_map, **given))
        except Exception as error:  # a template is a program, which can fail in any way
            reason = reason_of(error, with_kind=True)
            raise UserError(
                f"template=model: the chat template of this model fails for the prompt {prompt[:60]!r} ({reason}); "
                f"{_OTHER_TEMPLATE}"
            ) from error

    @cached_property
    def _chat_template(self) -> Any:
        """The chat template as `apply_chat_template` compiles it, but for its clock, which that lets nobody set."""
        text = self.tokenizer.get_chat_template()
        environment = _compile_jinja_template(text).environment
        return environment.from_string(text, globals={"strftime_now": self._strftime_now})

    def _strftime_now(self, form: str) -> str:
        """What a template is told of the date: midnight of the configured day, in English whatever the locale."""
        day, month = _DAYS[self._today.weekday()], _MONTHS[self._today.month - 1]
        names = {"%A": day, "%a": day[:3], "%B": month, "%b": month[:3], "%h": month[:3], "%p": "AM"}
        return self._today.strftime(re.sub("%.", lambda field: names.get(field[0], field[0]), form))

    def _ids(self, texts: Sequence[str], *, special: bool, literal: bool = False) -> list[list[int]]:
        return self._rows(self._encoded(texts, special, literal), special) if texts else []

    def _encoded(self, texts: Sequence[str], special: bool, literal: bool = False, **more: bool) -> BatchEncoding:
        """The tokenizer's answer; `literal` takes the text of a special token for text."""
        encoded: BatchEncoding = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            split_special_tokens=literal or self.tokenizer.split_special_tokens,
            return_attention_mask=False,
            **more,
        )
        return encoded

    @cached_property
    def _n_appended(self) -> int:
        """How many special tokens the tokenizer puts behind every text."""
        text, row = (list(self._encoded([_TRIAL], special)["input_ids"][0]) for special in (False, True))
        n_special = len(row) - len(text)
        return next((n_special - i for i in range(n_special + 1) if row[i : i + len(text)] == text), 0)

    @cached_property
    def _special(self) -> frozenset[int]:
        """The ids that are left out of decoded text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset([*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)])

    def _rows(self, encoded: BatchEncoding, special: bool) -> list[list[int]]:
        appended = self._n_appended if special else 0
        return [list(map(int, row[: len(row) - appended])) for row in encoded["input_ids"]]


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: Side = "left", device: torch.device | None = None) -> Batch:
    """Pad token id rows to one length.

    Raises:
        ValueError: there is no row, or a row is empty.
    """
    if not rows or not all(rows):
        raise ValueError("every row of a batch needs at least one token")
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        input_ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return Batch(input_ids.to(device), mask.to(device))


def move_padding_left(input_ids: Tensor, attention_mask: Tensor) -> Batch:
    """Rotate each row so that its trailing padding stands in front; `(B, T)` both.

    `generate()` continues after the last column, so a row padded on the right would be continued from a
    padding token.
    """
    width = input_ids.shape[1]
    attention_mask = attention_mask.long()
    trailing = attention_mask.flip(dims=[1]).argmax(dim=1, keepdim=True)
    source = (torch.arange(width, device=input_ids.device) - trailing) % width
    return Batch(input_ids.gather(1, source), attention_mask.gather(1, source))


@contextmanager
def announced_prompt(mask: Tensor) -> Iterator[None]:
    """Within the block, forward passes treat the columns where `mask` is true as the prompt.

    Args:
        mask: bool `(B, W)`; columns past `W` are not prompt, and when a forward pass holds a multiple of
            `B` rows (beams, several samples) each row of the mask stands for that many in a row.
    """
    token = _announced.set(mask.bool())
    try:
        yield
    finally:
        _announced.reset(token)


def prompt_mask(shape: tuple[int, int], attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which positions of a forward pass over whole sequences are prompt, bool `(B, T)`.

    The announced prompt if there is one, else everything that a `(B, T)` attention mask keeps, else all.

    Raises:
        ValueError: the announced prompt does not fit the number of rows.
    """
    announced = _announced.get()
    if announced is not None:
        return _fit(announced.to(device), shape)
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape == shape:
        return attention_mask.bool().to(device)
    return torch.ones(shape, dtype=torch.bool, device=device)


def last_prompt_positions(mask: Tensor) -> Tensor:
    """Column of the last true entry of each row of a bool `(B, T)` mask, int64 `(B,)`."""
    width = mask.shape[1]
    return width - 1 - mask.flip(dims=[1]).int().argmax(dim=1)


def _fit(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, width = shape
    if rows % mask.shape[0]:
        raise ValueError(f"a prompt announced for {mask.shape[0]} rows does not fit a batch of {rows} rows")
    mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)[:, :width]
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
