from datetime import datetime, tzinfo
from typing import Any, Self, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from horen_bench.errors import UserError
from horen_bench.prompts import (
    PromptEncoder,
    Side,
    announced_prompt,
    last_prompt_positions,
    move_padding_left,
    pad,
    prompt_mask,
)

CPU = torch.device("cpu")
PROMPT, TARGET = "Who founded Brightwater?", "Lucan Vey"


def mask_of(n_rows: int, width: int, attention_mask: Tensor | None = None) -> list[list[int]]:
    """The prompt mask of a forward pass over `(n_rows, width)` tokens."""
    return prompt_mask((n_rows, width), attention_mask, CPU).int().tolist()


# --- Text to ids ---------------------------------------------------------------------------------------


def test_an_edit_is_prompt_space_target_with_the_ids_of_the_prompt_alone_in_front(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    edit = PromptEncoder(golden_tokenizer).edit(PROMPT, TARGET)
    assert list(edit.prompt) == golden_tokenizer(PROMPT)["input_ids"]
    assert list(edit.ids) == golden_tokenizer(f"{PROMPT} {TARGET}")["input_ids"]
    assert golden_tokenizer.decode(list(edit.target)) == " Lucan Vey"


def test_bos_opens_the_prompt_where_the_tokenizer_adds_one_and_the_target_never(
    golden_tokenizer: PreTrainedTokenizerBase, bosless_tokenizer: PreTrainedTokenizerBase
) -> None:
    with_bos, without = (PromptEncoder(t).edit(PROMPT, TARGET) for t in (golden_tokenizer, bosless_tokenizer))
    assert with_bos.prompt == (golden_tokenizer.bos_token_id, *without.prompt)
    assert with_bos.target == without.target
    assert golden_tokenizer.bos_token_id not in with_bos.target


def test_no_eos_is_appended(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    assert golden_tokenizer.eos_token_id not in PromptEncoder(golden_tokenizer).edit(PROMPT, TARGET).ids


@pytest.mark.parametrize("prompt", ["Who founded ", "Who founded  ", "Who found", "", "1927\n"])
@pytest.mark.parametrize("target", ["Lucan Vey", "1927", "ed by", "?"])
@pytest.mark.parametrize("name", ["golden_tokenizer", "bosless_tokenizer"])
def test_the_border_never_moves_the_ids_of_the_prompt(
    name: str, prompt: str, target: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    edit = PromptEncoder(tokenizer).edit(prompt, target)
    assert list(edit.prompt) == PromptEncoder(tokenizer).prompts([prompt])[0]
    assert tokenizer.decode(list(edit.ids), skip_special_tokens=True) == f"{prompt} {target}"


def test_where_the_tokenizer_would_merge_over_the_border_both_sides_are_encoded_apart(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    # "Who founded " ends in a lone space (222), which the joint text merges with the one before the target.
    golden_tokenizer.add_tokens(["  Lucan"])
    joint = golden_tokenizer("Who founded  Lucan")["input_ids"]
    assert joint[-2] != 222
    edit = PromptEncoder(golden_tokenizer).edit("Who founded ", "Lucan")
    assert edit.prompt[-1] == 222
    assert list(edit.target) == PromptEncoder(golden_tokenizer).continuations(["Lucan"])[0]


@pytest.mark.parametrize("name", ["golden_tokenizer", "bosless_tokenizer"])
def test_an_empty_target_has_no_tokens(name: str, request: pytest.FixtureRequest) -> None:
    assert PromptEncoder(request.getfixturevalue(name)).edit(PROMPT, "").target == ()


def test_continuations_carry_the_leading_space_that_plain_texts_lack(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    # From tokens.json: " Ostrander Motors" starts with 298, "Ostrander Motors" with 48.
    assert PromptEncoder(golden_tokenizer).continuations(["Ostrander Motors"])[0][0] == 298
    assert PromptEncoder(golden_tokenizer).plain(["Ostrander Motors"])[0][0] == 48


def test_no_texts_give_no_rows(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = PromptEncoder(golden_tokenizer)
    assert encoder.prompts([]) == encoder.texts([]) == encoder.continuations([]) == encoder.plain([]) == []


# --- Padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions"),
    [
        ("left", [[5, 6, 7], [9, 9, 0]], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]]),
        ("right", [[5, 6, 7], [0, 9, 9]], [[1, 1, 1], [1, 0, 0]], [[0, 1, 2], [0, 0, 0]]),
    ],
)
def test_padding_is_known_by_place_even_where_a_real_token_has_the_id_of_padding(
    side: Side, ids: list[list[int]], mask: list[list[int]], positions: list[list[int]]
) -> None:
    # Padded with 9; the lone 0 is real.
    batch = pad([[5, 6, 7], [0]], 9, side)
    assert batch.input_ids.tolist() == ids
    assert batch.attention_mask.tolist() == mask
    assert batch.position_ids.tolist() == positions
    same_id = pad([[5, 6, 7], [0]], 0, side)
    assert same_id.attention_mask.tolist() == mask


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_a_batch_without_rows_or_with_an_empty_row_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError) as caught:
        pad(rows, 0)
    assert str(caught.value) == "every row of a batch needs at least one token"


def test_padding_falls_back_from_the_pad_token_to_eos_to_zero(
    bosless_tokenizer: PreTrainedTokenizerBase,
) -> None:
    bosless_tokenizer.eos_token = "z"
    z = bosless_tokenizer.convert_tokens_to_ids("z")
    assert z != 0
    assert PromptEncoder(bosless_tokenizer).pad_id == z
    bosless_tokenizer.pad_token = "y"
    assert PromptEncoder(bosless_tokenizer).pad_id == bosless_tokenizer.convert_tokens_to_ids("y")
    bosless_tokenizer.pad_token = bosless_tokenizer.eos_token = None
    assert PromptEncoder(bosless_tokenizer).pad_id == 0


def test_trailing_padding_moves_to_the_front_and_leading_padding_stays() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 7, 8], [0, 7, 8, 0], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]])
    moved = move_padding_left(ids, mask)
    assert moved.input_ids.tolist() == [[0, 0, 5, 6], [0, 0, 7, 8], [0, 0, 7, 8], [1, 2, 3, 4]]
    assert moved.attention_mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


def test_padding_moves_under_a_bool_mask_too() -> None:
    moved = move_padding_left(torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]]))
    assert moved.input_ids.tolist() == [[0, 5, 6]]


# --- Where the prompt ends -----------------------------------------------------------------------------


def test_without_announcement_the_prompt_is_what_the_attention_mask_keeps() -> None:
    assert mask_of(2, 3) == [[1, 1, 1], [1, 1, 1]]
    assert mask_of(2, 3, torch.tensor([[0, 1, 1], [1, 1, 0]])) == [[0, 1, 1], [1, 1, 0]]


def test_a_mask_that_is_not_one_entry_per_token_says_nothing_about_the_prompt() -> None:
    assert mask_of(1, 2, torch.tensor([[0, 1, 1]])) == [[1, 1]]
    assert mask_of(1, 2, torch.zeros(1, 1, 2, 2)) == [[1, 1]]


def test_the_announced_prompt_goes_before_the_attention_mask() -> None:
    with announced_prompt(torch.tensor([[0, 1, 0]])):
        assert mask_of(1, 3, torch.tensor([[1, 1, 1]])) == [[0, 1, 0]]
    assert mask_of(1, 3, torch.tensor([[1, 1, 1]])) == [[1, 1, 1]]


def test_columns_past_the_announced_prompt_are_no_prompt_and_columns_too_many_are_cut() -> None:
    with announced_prompt(torch.tensor([[0, 1, 1]])):
        assert mask_of(1, 5) == [[0, 1, 1, 0, 0]]
        assert mask_of(1, 2) == [[0, 1]]


def test_each_announced_row_stands_for_its_beams_in_a_row() -> None:
    with announced_prompt(torch.tensor([[0, 1], [1, 1]])):
        assert mask_of(6, 3) == [[0, 1, 0]] * 3 + [[1, 1, 0]] * 3


def test_an_announcement_for_another_number_of_rows_is_refused() -> None:
    with announced_prompt(torch.ones(2, 2)), pytest.raises(ValueError) as caught:
        mask_of(3, 2)
    assert str(caught.value) == "a prompt announced for 2 rows does not fit a batch of 3 rows"


def test_an_inner_announcement_holds_until_its_block_ends_however_it_ends() -> None:
    with announced_prompt(torch.tensor([[1, 0]])):
        with announced_prompt(torch.tensor([[0, 1]])):
            assert mask_of(1, 2) == [[0, 1]]
        assert mask_of(1, 2) == [[1, 0]]
        with pytest.raises(KeyError), announced_prompt(torch.tensor([[0, 0]])):
            raise KeyError
        assert mask_of(1, 2) == [[1, 0]]
    assert mask_of(1, 2) == [[1, 1]]


def test_the_last_prompt_position_is_found_on_either_side_of_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert last_prompt_positions(mask).tolist() == [3, 1, 1, 3]


# --- Chat templates ------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat(golden_tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    golden_tokenizer.chat_template = TEMPLATE
    return PromptEncoder(golden_tokenizer, "model")


def test_a_chat_prompt_is_one_turn_of_the_template_with_one_bos(chat: PromptEncoder) -> None:
    (ids,) = chat.prompts([PROMPT])
    assert chat.tokenizer.decode(ids) == f"{chat.tokenizer.bos_token}[user]{PROMPT}[assistant]"
    assert ids.count(int(cast(Any, chat.tokenizer.bos_token_id))) == 1
    message = [{"role": "user", "content": PROMPT}]
    assert chat.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False) == ids


def test_a_chat_target_follows_without_a_space_and_ends_with_eos(chat: PromptEncoder) -> None:
    edit = chat.edit(PROMPT, TARGET)
    assert list(edit.prompt) == chat.prompts([PROMPT])[0]
    assert chat.tokenizer.decode(list(edit.target)) == f"{TARGET}{chat.tokenizer.eos_token}"
    assert [*edit.target[:-1]] == chat.continuations([TARGET])[0] == chat.plain([TARGET])[0]
    assert chat.edit(PROMPT, " ").target == ()


def test_an_evaluated_chat_target_leaves_eos_out(chat: PromptEncoder) -> None:
    assert chat.edit(PROMPT, TARGET, closed=False).target == chat.edit(PROMPT, TARGET).target[:-1]


def test_texts_for_themselves_stay_outside_the_template(chat: PromptEncoder) -> None:
    assert chat.tokenizer.decode(chat.texts([PROMPT])[0]) == f"{chat.tokenizer.bos_token}{PROMPT}"


def test_only_an_encoder_of_the_template_chats(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = PromptEncoder(golden_tokenizer).edit(PROMPT, TARGET)
    golden_tokenizer.chat_template = TEMPLATE
    PromptEncoder(golden_tokenizer, "model")
    assert PromptEncoder(golden_tokenizer).edit(PROMPT, TARGET) == plain
    assert PromptEncoder(golden_tokenizer).edit(PROMPT, TARGET, closed=False) == plain


class _AnotherDay(datetime):
    """A clock that stands elsewhere."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(1999, 12, 31, 23, 59, tzinfo=tz)


def test_a_template_that_reads_the_clock_is_told_the_configured_date_on_every_day(
    golden_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden_tokenizer.chat_template = "Today: {{ strftime_now('%A %d %B %Y %b %H:%M %p 100%%') }}\n" + TEMPLATE
    chat = PromptEncoder(golden_tokenizer, "model", "2026-03-08")
    today = chat.prompts([PROMPT])
    assert "Today: Sunday 08 March 2026 Mar 00:00 AM 100%\n" in str(golden_tokenizer.decode(today[0]))
    monkeypatch.setattr(chat_template_utils, "datetime", _AnotherDay)
    message = [{"role": "user", "content": PROMPT}]
    assert "Friday 31 December 1999" in str(golden_tokenizer.apply_chat_template(message, tokenize=False))
    assert PromptEncoder(golden_tokenizer, "model", "2026-03-08").prompts([PROMPT]) == today
    assert PromptEncoder(golden_tokenizer, "model", "2026-03-09").prompts([PROMPT]) != today


def test_a_chat_target_that_holds_a_special_token_is_written_out(chat: PromptEncoder) -> None:
    edit = chat.edit(PROMPT, "yes <|endoftext|> no", closed=False)
    assert list(edit.prompt) == chat.prompts([PROMPT])[0]
    assert chat.tokenizer.decode(list(edit.target), skip_special_tokens=True) == "yes <|endoftext|> no"


def test_a_tokenizer_without_a_template_is_refused(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError) as caught:
        PromptEncoder(golden_tokenizer, "model")
    assert str(caught.value) == (
        "template=model: the tokenizer of this model brings no chat template; write template=none, or choose a model "
        "that was trained to chat"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only system turns') }}", "TemplateError: only system turns"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
    ],
)
def test_a_template_that_fails_is_refused_before_it_is_used(
    template: str, reason: str, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden_tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"^template=model: the chat template of this model fails") as caught:
        PromptEncoder(golden_tokenizer, "model")
    assert f"({reason}" in str(caught.value)
    assert "write template=none, or mend" in str(caught.value)


@pytest.mark.parametrize("template", ["the same for all", "{{ messages[0]['content'][:10] }}", " "])
def test_a_template_that_leaves_the_prompt_out_is_refused(
    template: str, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden_tokenizer.chat_template = template
    with pytest.raises(UserError, match="leaves the prompt out"):
        PromptEncoder(golden_tokenizer, "model")


def test_a_template_that_fails_for_some_prompts_names_the_prompt(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    golden_tokenizer.chat_template = "{% if '?' in messages[0]['content'] %}{{ 1 / 0 }}{% endif %}" + TEMPLATE
    with pytest.raises(UserError, match=r"fails for the prompt 'Who founded Brightwater\?' \(ZeroDivisionError"):
        PromptEncoder(golden_tokenizer, "model").prompts([PROMPT])
