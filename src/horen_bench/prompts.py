"""The one place that turns text into token ids: spaces, special tokens, padding, where the prompt ends.

Rules (`template: none`, those of the published code made explicit):

- a prompt is encoded with the tokenizer's default special tokens (BOS where it adds one), no chat template;
- a target follows its prompt after one space, and no EOS is appended;
- padding is known by position (the attention mask), never by id, because `pad` often equals `eos`.

Under `template: model`, in editing and evaluation alike,

- a prompt is one user turn in the model's own chat template, up to where the answer begins; its special tokens are
  all that there are (no second BOS);
- a target follows without a space, and EOS, which ends a chat model's turn, is appended where a target is learnt.

Where the prompt ends
    Memory editors act at the last prompt token. A forward pass whose sequences hold more than the
    prompt (teacher forcing, generation without a KV cache) is run inside `announced_prompt(mask)`;
    without an announcement everything that the attention mask keeps is the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from horen_bench.errors import UserError

Side = Literal["left", "right"]
Template = Literal["none", "model"]

_TRIAL = "The river through Brightwater is called"
_OTHER_TEMPLATE = "write template=none, or mend its chat_template.jinja"

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

    Raises:
        UserError: `template="model"`, and the tokenizer has no chat template, or one that fails or leaves the
            prompt out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "none") -> None:
        if template == "model" and not tokenizer.chat_template:
            raise UserError(
                "template=model: the tokenizer of this model brings no chat template; write template=none, or choose a "
                "model that was trained to chat"
            )
        self.tokenizer = tokenizer
        self.template = template
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
        """Token ids of each prompt: default special tokens included, or the whole chat template around it."""
        if self._chats:
            return self._ids([self._as_turn(text) for text in texts], special=False)
        return self.texts(texts)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text for itself, default special tokens included, never in a chat template."""
        return self._ids(texts, special=True)

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it follows a prompt, no special tokens.

        Its length is `|y|`, the number of tokens that a prediction is given to decode.
        """
        return self._ids([self._joint + text for text in texts], special=False)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone, no leading space, no special tokens: for comparing decoded text."""
        return self._ids(texts, special=False)

    def edit(self, prompt: str, target: str, *, closed: bool = True) -> EncodedEdit:
        """Encode `prompt + " " + target` so that its first ids are exactly those of the prompt alone.

        Where the tokenizer merges across the border (a prompt that ends in a space), prompt and target are encoded
        apart and joined, so that a key read from the prompt alone is the key that was written. A blank target has no
        ids.

        Args:
            prompt: of the edit.
            target: what is to follow it.
            closed: end the target of a chat with EOS, as it is learnt; evaluation leaves that out.
        """
        prompt_ids = self.prompts([prompt])[0]
        if not target.strip():
            return EncodedEdit(tuple(prompt_ids), ())
        text = (self._as_turn(prompt) if self._chats else prompt) + self._joint + target
        joint = self._ids([text], special=not self._chats)[0]
        if joint[: len(prompt_ids)] == prompt_ids:
            target_ids = joint[len(prompt_ids) :]
        else:
            target_ids = self.continuations([target])[0]
        if self._chats and closed and self.tokenizer.eos_token_id is not None:
            target_ids = [*target_ids, int(self.tokenizer.eos_token_id)]
        return EncodedEdit(tuple(prompt_ids), tuple(target_ids))

    def _as_turn(self, prompt: str) -> str:
        """The prompt as one user turn, up to where the answer begins.

        Raises:
            UserError: the template fails.
        """
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, which can fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"template=model: the chat template of this model fails for the prompt {prompt[:60]!r} ({reason}); "
                f"{_OTHER_TEMPLATE}"
            ) from error

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)
        return [list(map(int, row)) for row in encoded["input_ids"]]


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
