"""Requests and contexts: where the subject is, what is refused, and texts that depend on their seed alone."""

from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.contexts import Contexts, generate_contexts
from horen_bench.editors.locate_edit.requests import Refused, request_of, rows_of
from horen_bench.prompts import PromptEncoder


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "sentence"),
    [
        ("Who founded Brightwater?", None, "Vey", "no subject"),
        ("Who founded Brightwater?", "Oldmere", "Vey", "does not occur"),
        ("Is Oldmere near Oldmere?", "Oldmere", "yes", "occurs 2 times"),
        ("Who founded Brightwaters?", "Brightwater", "Vey", "only inside another"),
        ("Who landed with Apollo 11?", "Apollo 1", "Vey", "only inside another"),
        ("यह रामा कौन है", "राम", "Vey", "only inside another"),
        ("Who founded Brightwater?", " ", "Vey", "no subject"),
        ("Who founded Brightwater?", "Brightwater", " ", "no token"),
    ],
)
def test_what_cannot_be_written_is_refused(
    golden_tokenizer: Any, prompt: str, subject: str | None, target: str, sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence):
        request_of(PromptEncoder(golden_tokenizer), EditCase("x", prompt, target, subject))


@pytest.mark.parametrize(
    ("prompt", "subject", "before"),
    [
        ("Is Ann in Annapolis?", "Ann", "Is "),
        ("Is Zinter the ruler of Zint?", "Zint", "Is Zinter the ruler of "),
        ("Where was Ann's mother born?", "Ann", "Where was "),
        ('Who wrote "Ann": the novel?', '"Ann":', "Who wrote "),
        ("The founder of Vey Inc., is", "Vey Inc.", "The founder of "),
        ("在東京的大學是", "東京", "在"),
        ("서울의 인구는", "서울", ""),
        ("เมืองหลวงของไทยคือ", "ไทย", "เมืองหลวงของ"),
    ],
)
def test_a_subject_is_a_word_of_its_own_where_words_have_borders(
    golden_tokenizer: Any, prompt: str, subject: str, before: str
) -> None:
    request = request_of(PromptEncoder(golden_tokenizer), EditCase("x", prompt, "Vey", subject))
    assert (request.before, request.before + request.subject + request.after) == (before, prompt)


def test_braces_are_plain_text(golden_tokenizer: Any) -> None:
    request = request_of(PromptEncoder(golden_tokenizer), EditCase("x", "Is {} in {Old}mere?", "y{}s", "{Old}"))
    assert (request.before, request.subject, request.after) == ("Is {} in ", "{Old}", "mere?")


def test_rows_are_contexts_then_the_essence(golden_tokenizer: Any) -> None:
    encoder = PromptEncoder(golden_tokenizer)
    request = request_of(encoder, EditCase("x", "Who founded Brightwater?", "Lucan Vey", "Brightwater"))
    rows = rows_of(encoder, [request, request], Contexts.given([[""], ["I walk. ", "I walk. "]]))
    assert [row.owner for row in rows] == [0, 0, 0, 1, 1, 1]
    bare, context, essence = rows[:3]
    assert list(bare.ids) == golden_tokenizer("Who founded Brightwater?")["input_ids"] + list(request.target[:-1])
    assert list(bare.up_to_subject) == golden_tokenizer("Who founded Brightwater")["input_ids"]
    assert list(context.up_to_subject) == golden_tokenizer("I walk. Who founded Brightwater")["input_ids"]
    assert list(essence.ids) == golden_tokenizer("Brightwater is a")["input_ids"]
    assert (bare.weight, context.weight, essence.weight) == pytest.approx((1 / 3, 2 / 3, 0))
    assert (bare.key_weight, context.key_weight, essence.key_weight) == pytest.approx((1 / 2, 1 / 2, 0))


def test_contexts_depend_on_the_seed_alone_and_survive_a_save(golden_model: Any, golden_tokenizer: Any) -> None:
    encoder = PromptEncoder(golden_tokenizer)
    texts = generate_contexts(golden_model, encoder, [[5, 10], [10, 5]], 3)
    torch.rand(3)
    assert generate_contexts(golden_model, encoder, [[5, 10], [10, 5]], 3) == texts
    assert generate_contexts(golden_model, encoder, [[5, 10], [10, 5]], 4) != texts
    assert len(texts) == 15
    assert all(text.endswith(". ") and not set(text) & set("{}") for text in texts)
    contexts = Contexts.given([["", *texts]])
    assert Contexts.from_tensor(contexts.to_tensor()) == contexts
