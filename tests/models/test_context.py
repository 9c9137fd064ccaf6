from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.models.context import ContextLimit, named
from horen_bench.prompts import PromptEncoder

PROMPT, TARGET = "Who founded Brightwater?", "Lucan Vey"


def test_a_pair_fits_up_to_the_last_position(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = PromptEncoder(golden_tokenizer)
    n_prompt, n_both = len(encoder.prompts([PROMPT])[0]), len(encoder.edit(PROMPT, TARGET).ids)
    assert [ContextLimit(encoder, n).holds(PROMPT, TARGET) for n in (n_both - 1, n_both)] == [False, True]
    assert [ContextLimit(encoder, n).holds(PROMPT, None) for n in (n_prompt, n_prompt + 1)] == [False, True]
    assert ContextLimit(encoder, None).holds("word " * 10_000, TARGET)
    case = EditCase("a", PROMPT, TARGET)
    assert ContextLimit(encoder, n_both).refusal(case) is None
    record = ContextLimit(encoder, n_both - 1).refusal(case)
    assert record is not None
    assert (record.action, record.too_long, f"{n_both} tokens" in str(record.problem)) == ("failed", True, True)


def test_each_pair_is_tokenised_once(
    golden_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pairs = PromptEncoder(golden_tokenizer), []
    edit = encoder.edit

    def counting(prompt: str, target: str, **settings: Any) -> Any:
        pairs.append((prompt, target))
        return edit(prompt, target, **settings)

    monkeypatch.setattr(encoder, "edit", counting)
    limit = ContextLimit(encoder, 5)
    for _ in range(3):
        limit.holds(PROMPT, TARGET)
        limit.refusal(EditCase("a", PROMPT, TARGET))
    assert pairs == [(PROMPT, TARGET)]


def test_a_few_ids_are_named() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([*"abcdefg"]) == "a, b, c, d, e, ..."
