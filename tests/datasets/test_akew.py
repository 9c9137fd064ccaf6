"""AKEW: the unstructured view of its three files, field by field."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.akew import Akew

Refusal = Callable[[Callable[[], object]], str]

TRIPLETS = [
    {"prompt": "{} was born in", "subject": "Ana", "target": " Lima"},
    {"prompt": "The trade of {} is", "subject": "her father", "target": "joiner"},
]

COUNTERFACT: dict[str, Any] = {
    "case_id": 983,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "prompt_full": "What is the mother tongue of Ana? ",
        "subject": "Ana",
        "target_new": {"str": "Dutch"},
        "target_true": {"str": "Spanish"},
        "fact_new_uns": "Ana speaks Dutch.\nShe learnt it in Köln.",
        "unsfact_triplets_GPT": TRIPLETS,
    },
    "paraphrase_prompts": [" Ana's mother tongue?", "Another wording"],
    "neighborhood_prompts": ["ignored"],
}

MQUAKE: dict[str, Any] = {
    "case_id": 12,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "subject": "Ana {Lima}",
            "question": "Which country is Ana a citizen of?",
            "fact_new_uns": "Ana became a citizen of Peru.",
            "unsfact_triplets_GPT": TRIPLETS,
        },
        {"prompt": "the second rewrite is not used"},
    ],
    "questions": ["ignored"],
}

WIKIUPDATE: dict[str, Any] = {"requested_rewrite": MQUAKE["requested_rewrite"][0], "loc": "ignored"}


def akew(part: Any, path: Path, conflicts: Any = "keep") -> Akew:
    return Akew(name=part, label=part, part=part, path=str(path), conflicts=conflicts)


SUB_QUESTIONS = (Probe("Ana was born in", "Lima"), Probe("The trade of her father is", "joiner"))


def test_counterfact_asks_its_full_prompt_and_the_first_paraphrase(written: Callable[..., Path]) -> None:
    assert akew("counterfact", written([COUNTERFACT])).cases(1) == [
        EditCase(
            id="983",
            prompt="What is the mother tongue of Ana?",
            target="Ana speaks Dutch.\nShe learnt it in Köln.",
            subject="Ana",
            paraphrases=(Probe("Ana's mother tongue?", "Ana speaks Dutch.\nShe learnt it in Köln."),),
            extras={"sub_question": SUB_QUESTIONS},
        )
    ]


def test_mquake_uses_the_first_of_its_rewrites(written: Callable[..., Path]) -> None:
    assert akew("mquake", written([MQUAKE])).cases(1) == [
        EditCase(
            id="12",
            prompt="Ana {Lima} is a citizen of?",
            target="Ana became a citizen of Peru.",
            subject="Ana {Lima}",
            paraphrases=(Probe("Which country is Ana a citizen of?", "Ana became a citizen of Peru."),),
            extras={"sub_question": SUB_QUESTIONS},
        )
    ]


def test_wikiupdate_has_one_rewrite_and_its_ids_are_positions(written: Callable[..., Path]) -> None:
    (of_mquake,) = akew("mquake", written([MQUAKE], "mquake.json")).cases(1)
    cases = akew("wikiupdate", written([WIKIUPDATE, WIKIUPDATE])).cases(2)
    assert [case.id for case in cases] == ["0", "1"]
    assert all(
        (case.prompt, case.target, case.paraphrases) == (of_mquake.prompt, of_mquake.target, of_mquake.paraphrases)
        for case in cases
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("{} is a {noun} of", "Ana", "Ana is a {noun} of?"),
        ("{} and {{}} of {0}", "Ana", "Ana and {Ana} of {0}?"),
        ("{} is in", "{}", "{} is in?"),
        ("no place for it", "Ana", "no place for it?"),
    ],
)
def test_only_empty_braces_are_filled_and_no_others_break_the_prompt(
    prompt: str, subject: str, expected: str, written: Callable[..., Path]
) -> None:
    record = copy.deepcopy(WIKIUPDATE)
    record["requested_rewrite"] |= {"prompt": prompt, "subject": subject}
    (case,) = akew("wikiupdate", written([record])).cases(1)
    assert case.prompt == expected


@pytest.mark.parametrize(("n_triplets", "n_probes"), [(0, 0), (4, 4), (5, 5), (6, 5), (12, 5)])
def test_five_triplets_are_asked_at_most(n_triplets: int, n_probes: int, written: Callable[..., Path]) -> None:
    record = copy.deepcopy(COUNTERFACT)
    record["requested_rewrite"]["unsfact_triplets_GPT"] = [
        {"prompt": f"P{i} {{}}", "subject": "s", "target": f"t{i}"} for i in range(n_triplets)
    ]
    (case,) = akew("counterfact", written([record])).cases(1)
    assert case.extras["sub_question"] == tuple(Probe(f"P{i} s", f"t{i}") for i in range(n_probes))


def test_a_record_without_triplets_or_paraphrases_has_none(written: Callable[..., Path]) -> None:
    record = copy.deepcopy(COUNTERFACT)
    del record["requested_rewrite"]["unsfact_triplets_GPT"], record["paraphrase_prompts"]
    (case,) = akew("counterfact", written([record])).cases(1)
    assert case.paraphrases == ()
    assert case.extras == {"sub_question": ()}


@pytest.mark.parametrize(
    ("part", "record", "changes", "field", "complaint"),
    [
        ("counterfact", COUNTERFACT, {"fact_new_uns": " "}, "fact_new_uns", "a non-empty string, got ' '"),
        ("counterfact", COUNTERFACT, {"prompt_full": None}, "prompt_full", "a non-empty string, got None"),
        ("wikiupdate", WIKIUPDATE, {"question": float("nan")}, "question", "a non-empty string, got nan"),
        ("wikiupdate", WIKIUPDATE, {"subject": ""}, "subject", "a non-empty string, got ''"),
        (
            "wikiupdate",
            WIKIUPDATE,
            {"unsfact_triplets_GPT": [TRIPLETS[0], "x"]},
            "unsfact_triplets_GPT",
            f"a list with an object at 1, got {[TRIPLETS[0], 'x']!r}"[: 80 + len("a list with an object at 1, got ")],
        ),
        (
            "counterfact",
            COUNTERFACT,
            {"unsfact_triplets_GPT": [{**TRIPLETS[0], "target": ""}]},
            "unsfact_triplets_GPT[0].target",
            "a non-empty string, got ''",
        ),
    ],
)
def test_a_nested_field_that_is_not_of_the_schema_is_refused_by_its_path(
    *,
    part: str,
    record: dict[str, Any],
    changes: dict[str, Any],
    field: str,
    complaint: str,
    written: Callable[..., Path],
    refusal: Refusal,
) -> None:
    bad = {**record, "requested_rewrite": {**record["requested_rewrite"], **changes}}
    path = written([record, bad])
    assert refusal(lambda: akew(part, path).cases(2)) == (
        f"{path}: record 1, field 'requested_rewrite.{field}' must be {complaint}"
    )


def test_the_first_rewrite_of_mquake_is_named_by_its_position(written: Callable[..., Path], refusal: Refusal) -> None:
    first = {key: value for key, value in MQUAKE["requested_rewrite"][0].items() if key != "subject"}
    path = written([{**MQUAKE, "requested_rewrite": [first]}])
    assert refusal(lambda: akew("mquake", path).cases(1)) == (
        f"{path}: record 0, field 'requested_rewrite[0].subject' must be a non-empty string, got nothing; its fields "
        "are prompt, question, fact_new_uns, unsfact_triplets_GPT"
    )


@pytest.mark.parametrize(
    ("rewrites", "complaint"),
    [([], "a list with an object at 0, got []"), (None, "a list with an object at 0, got None")],
)
def test_mquake_without_a_rewrite_is_refused(
    rewrites: object, complaint: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([{"requested_rewrite": rewrites}])
    expected = f"{path}: record 0, field 'requested_rewrite' must be {complaint}"
    assert refusal(lambda: akew("mquake", path).cases(1)) == expected


@pytest.mark.parametrize(
    ("part", "record", "complaint"),
    [
        ("mquake", COUNTERFACT, "a list, got {'prompt': 'The mother tongue of {} is', 'prompt_full': "),
        ("counterfact", MQUAKE, "an object, got [{'prompt': '{} is a citizen of', 'subject': 'Ana {Lima}', "),
    ],
)
def test_a_part_does_not_read_the_file_of_another(
    part: str, record: dict[str, Any], complaint: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([record])
    sentence = refusal(lambda: akew(part, path).cases(1))
    assert sentence.startswith(f"{path}: record 0, field 'requested_rewrite' must be {complaint}")


@pytest.mark.parametrize("part", ["counterfact", "mquake", "wikiupdate"])
def test_a_missing_file_says_which_dataset_to_fetch(part: str, tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "none.json"
    assert refusal(lambda: akew(part, path).cases(1)) == (
        f"{path} does not exist; run python -m horen_bench.datasets fetch {part}, or name your file with dataset.path="
    )
