"""Scores of long answers, against hand-worked numbers and the package that the release takes ROUGE from."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge

from horen_bench.metrics.text_scores import Standard, bleu1_bp, n_words, rouge1, rouge2, rougeL, word_scores

# Few words, so that texts overlap; periods and white space in odd places, as in real output.
TEXTS = st.lists(st.sampled_from(["a", "b", "c", "the", "The", ".", ". ", " ", "  ", "\n", "d."]), max_size=14).map(
    lambda parts: " ".join(parts) if len(parts) % 2 else "".join(parts)
)


@given(prediction=TEXTS, reference=TEXTS)
def test_rouge_is_that_of_the_package_which_the_release_uses(prediction: str, reference: str) -> None:
    if not reference.replace(".", ""):
        assert rouge1(prediction, reference).recall == rougeL(prediction, reference).recall == 0.0  # there it raises
        return
    published = prediction if " " in prediction else prediction + " "
    (expected,) = Rouge().get_scores(published, reference)
    for name, found in (
        ("rouge-1", rouge1(prediction, reference)),
        ("rouge-2", rouge2(prediction, reference)),
        ("rouge-l", rougeL(prediction, reference)),
    ):
        assert tuple(found) == pytest.approx((expected[name]["r"], expected[name]["p"])), name


def test_a_long_answer_needs_no_recursion() -> None:
    words = " ".join(f"w{i}" for i in range(1500))
    assert rougeL(words, words) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "unigrams", "bigrams", "subsequence"),
    [
        # Words count once: {the, cat} of {the, cat, sat} and of {the, cat}.
        ("the the cat", "the cat sat", (2 / 3, 1.0), (1 / 2, 1 / 2), (2 / 3, 1.0)),
        # Case counts, periods do not: "sat" alone is common.
        ("The Cat sat.", "the cat sat.", (1 / 3, 1 / 3), (0.0, 0.0), (1 / 3, 1 / 3)),
        # Pairs cross the end of a sentence, subsequences do not: (a b)(b c) of (a b)(b c)(c d).
        ("a b c", "a b. c d.", (3 / 4, 1.0), (2 / 3, 1.0), (3 / 4, 1.0)),
        # Union over sentences of the reference: "b a" gives b or a to "a b", and nothing else.
        ("b a", "a b", (1.0, 1.0), (0.0, 0.0), (1 / 2, 1 / 2)),
        ("", "a b", (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ("a", "a", (1.0, 1.0), (0.0, 0.0), (1.0, 1.0)),  # no pair in the reference: 0, not a division by zero
    ],
)
def test_overlaps_worked_out_by_hand(
    prediction: str,
    reference: str,
    unigrams: tuple[float, float],
    bigrams: tuple[float, float],
    subsequence: tuple[float, float],
) -> None:
    found = (rouge1(prediction, reference), rouge2(prediction, reference), rougeL(prediction, reference))
    for score, expected in zip(found, (unigrams, bigrams, subsequence), strict=True):
        assert score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a a a", "a b", 1 / 3),  # clipped: the reference has one a; longer, so no penalty
        ("a b", "a b c d", math.exp(1 - 4 / 2)),  # all right, but half as long
        ("a x", "a b", 1 / 2),  # as long: exp(0) = 1
        ("x", "a", 0.0),
        ("", "a", 0.0),
        ("a", " ", 0.0),
    ],
)
def test_bleu_of_single_words_with_its_brevity_penalty(prediction: str, reference: str, expected: float) -> None:
    assert bleu1_bp(prediction, reference) == pytest.approx(expected)


def test_rambling_raises_recall_and_shows_in_precision_and_length() -> None:
    reference = "the mayor was born in Corvel"
    short, long = reference, reference + " and so on and on and on"
    assert rouge1(long, reference).recall == rouge1(short, reference).recall == 1.0
    assert rouge1(long, reference).precision == pytest.approx(6 / 9)
    assert (n_words(short), n_words(long)) == (6, 13)


def test_the_standard_scores_are_those_of_their_packages() -> None:
    found: dict[str, Any] = Standard()("The Cat sat.", "the cat sat.")
    assert found["rouge_score_rouge1_f1"] == found["rouge_score_rougeL_recall"] == 1.0  # case does not count there
    assert Standard()("a b c d e", "a b c d e")["sacrebleu"] == pytest.approx(100.0)
    assert Standard()("", "a b")["sacrebleu"] == 0.0
    half = Standard()("a b x y", "a b")
    assert half["rouge_score_rouge1_recall"] == 1.0
    assert half["rouge_score_rouge1_f1"] == pytest.approx(2 / 3)  # precision 1/2


def test_every_score_has_its_name() -> None:
    assert list(word_scores("a", "a", Standard())) == [
        "bleu1_bp",
        "rouge1_recall",
        "rouge2_recall",
        "rougeL_recall",
        "rouge1_precision",
        "rouge2_precision",
        "rougeL_precision",
        "sacrebleu",
        "rouge_score_rouge1_f1",
        "rouge_score_rouge1_recall",
        "rouge_score_rouge2_f1",
        "rouge_score_rouge2_recall",
        "rouge_score_rougeL_f1",
        "rouge_score_rougeL_recall",
        "length",
    ]
