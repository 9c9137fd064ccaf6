"""Long answers: written to their end, whatever stands beside them in the batch, and judged as texts."""

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import build, composed
from horen_bench.config.settings import resolved
from horen_bench.evaluation import Answer, Question, TextExaminer, TextJudge, greedy_decode
from horen_bench.metrics.similarity import Similarity
from horen_bench.prompts import encode_prompts, with_chat_template

EOS = 0


class SameFirstWord(Similarity):
    """1 where both texts begin with the same word; counts what it is asked."""

    name = "first_word"

    def __init__(self) -> None:
        super().__init__("none", "cpu", 1)
        self.asked: list[tuple[str, str]] = []

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        pairs = list(zip(predictions, references, strict=True))
        self.asked += pairs
        return [float(said.split()[:1] == wanted.split()[:1]) for said, wanted in pairs]

    def loaded(self, folder: str) -> Any:
        raise NotImplementedError


def examiner(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 12, batch_size: int = 64
) -> TextExaminer:
    return TextExaminer(
        model=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        judge=TextJudge([SameFirstWord()]),
        max_new_tokens=max_new_tokens,
    )


def asked(prompt: str, answer: str = "the fair", family: str = "rel") -> Question:
    return Question(0, family, "base" if family == "loc" else "answer", prompt, answer)


def stopping_early(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """A token that some of the greedy continuations say and others do not, to stand for EOS."""
    rows = greedy_decode(model, encode_prompts(tokenizer, prompts), [12] * len(prompts), EOS)
    counts = {token: sum(token in row for row in rows) for row in rows for token in row}
    return next(token for token, count in counts.items() if 0 < count < len(rows))


PROMPTS = [
    "Who founded Brightwater?",
    "nq question: where is the museum of clocks",
    "The bridge",
    "Lucan Vey",
    "Who built the old tower of Grenholm?",
]


@torch.no_grad()
def test_a_row_that_stops_leaves_the_batch_and_the_others_go_on_as_if_alone(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = stopping_early(golden_model, golden_tokenizer, PROMPTS)
    rows = encode_prompts(golden_tokenizer, PROMPTS)
    alone = [greedy_decode(golden_model, [row], [12], EOS, (stop,))[0] for row in rows]
    assert len({len(row) for row in alone}) > 1
    assert greedy_decode(golden_model, rows, [12] * len(rows), EOS, (stop,)) == alone
    for row, whole in zip(alone, greedy_decode(golden_model, rows, [12] * len(rows), EOS), strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_an_answer_ends_before_eos_and_no_later_than_asked(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = stopping_early(golden_model, golden_tokenizer, PROMPTS)
    golden_tokenizer.eos_token = golden_tokenizer.convert_ids_to_tokens(stop)
    questions = [asked(prompt) for prompt in PROMPTS]
    answers = examiner(golden_model, golden_tokenizer).ask(questions)
    assert all(stop not in answer.ids and len(answer.ids) <= 12 for answer in answers)
    assert len({len(answer.ids) for answer in answers}) > 1
    assert examiner(golden_model, golden_tokenizer, batch_size=2).ask(questions) == answers
    shorter = examiner(golden_model, golden_tokenizer, max_new_tokens=3).ask(questions)
    assert [answer.ids[:3] for answer in answers] == [answer.ids for answer in shorter]


def test_writing_stops_at_the_end_of_the_context(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden_tokenizer.eos_token = "q"  # never said here
    prompts = ["The bridge", "The bridge" + " by the river" * 2, "The bridge" + " by the river" * 20]
    lengths = [len(row) for row in encode_prompts(golden_tokenizer, prompts)]
    cast(Any, golden_model.config).max_position_embeddings = lengths[1] + 1
    answers = examiner(golden_model, golden_tokenizer, 512).ask([asked(prompt) for prompt in prompts])
    assert [len(answer.ids) for answer in answers] == [lengths[1] + 1 - lengths[0], 1, 0]


def said(tokenizer: PreTrainedTokenizerBase, text: str) -> Answer:
    return Answer(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), ())


def test_answers_are_judged_against_the_given_text_and_locality_against_the_base_answer(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    one = examiner(golden_model, golden_tokenizer)
    questions = [asked("Q", "the old fair"), asked("L", "anything", "loc")]
    answers = [said(golden_tokenizer, " the fair "), said(golden_tokenizer, "a bridge")]
    base = [said(golden_tokenizer, "x"), said(golden_tokenizer, "a bridge of stone")]
    first, second = one.scores(questions, answers, base)
    assert one.text(answers[0]) == "the fair"
    assert first["rouge1_recall"] == pytest.approx(2 / 3)  # the, fair of the, old, fair
    assert first["rouge1_precision"] == 1.0
    assert first["bleu1_bp"] == pytest.approx(math.exp(1 - 3 / 2))
    assert (first["length"], first["first_word"]) == (2.0, 1.0)
    assert second["rouge1_recall"] == pytest.approx(2 / 4)  # a, bridge of a, bridge, of, stone
    assert one.scores([], [], []) == []


def test_a_pair_is_judged_once_however_often_it_comes_back() -> None:
    similarity = SameFirstWord()
    judge = TextJudge([similarity])
    first = judge([("a b", "a c"), ("a b", "a c"), ("x", "a c")])
    assert judge([("x", "a c"), ("a b", "a c")]) == [first[2], first[0]]
    assert similarity.asked == [("a b", "a c"), ("x", "a c")]


def test_longest_answers_are_part_of_the_name_of_the_base_answers(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    names = [examiner(golden_model, golden_tokenizer, n).cache_name for n in (128, 512)]
    assert names == ["text-128", "text-512"]


def test_an_edit_under_a_chat_template_is_said_back_to_its_question_and_ends(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Editing, routing and asking see one and the same prompt, and the end is learnt with the answer."""
    golden_tokenizer.chat_template = (
        "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %}: {% endif %}"
    )
    chat = with_chat_template(golden_tokenizer)
    settings = resolved(composed(["method=horen", "model=tiny"]))["method"]
    one = examiner(golden_model, chat)
    question = asked("Who founded Brightwater?", "Lucan.")
    assert one.text(one.ask([question])[0]) != "Lucan."
    editor = build(settings, "method", model=golden_model, tokenizer=chat, seed=0)
    editor.edit([EditCase("a", question.prompt, question.answer)])
    (route,) = editor.routes([question.prompt])
    assert route.matched
    assert route.score == pytest.approx(1.0, abs=1e-4)
    (answer,) = one.ask([question])
    assert one.text(answer) == "Lucan."
    assert len(answer.ids) < 12
