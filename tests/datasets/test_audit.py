"""Which locality probes another edit touches, and the counts over a stream, all worked out by hand."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.audit import (
    Composition,
    Touched,
    composition,
    contradicting_paraphrases,
    dominating_mention,
    most_mentioned,
    paraphrase_warnings,
    touched_probes,
)
from horen_bench.datasets.facts import Facts
from horen_bench.datasets.zsre import Zsre


def edit(prompt: str, *probes: tuple[str, str], subject: str | None = None, paraphrase: str | None = None) -> EditCase:
    return EditCase(
        id=prompt,
        prompt=prompt,
        target="t",
        subject=subject,
        paraphrases=(Probe(paraphrase, "t"),) if paraphrase else (),
        locality=tuple(Probe(*probe) for probe in probes),
    )


def by(cases: Sequence[EditCase]) -> list[tuple[int, str, int]]:
    """Case, prompt of the probe, and the edit that touches it."""
    return [(each.case, each.probe.prompt, each.by) for each in touched_probes(cases)]


# --- The two ways ------------------------------------------------------------------------------------------


def test_a_probe_that_is_the_prompt_of_another_edit_is_touched() -> None:
    cases = [edit("A", ("B", "b"), ("C", "c")), edit("B")]
    assert touched_probes(cases) == [Touched(case=0, probe=Probe("B", "b"), by=1)]


def test_a_probe_that_is_a_paraphrase_of_another_edit_is_touched() -> None:
    assert by([edit("A", ("B2", "b")), edit("B", paraphrase="B2")]) == [(0, "B2", 1)]


@pytest.mark.parametrize("probe", ["b", "B?", "B "])
def test_a_prompt_must_be_the_same_to_the_letter(probe: str) -> None:
    assert by([edit("A", (probe, "b")), edit("B")]) == []


@pytest.mark.parametrize(
    "probe",
    [
        "Where is New York?",
        "New York",
        "what became of new york",
        "NEW YORK's mayor?",
        "Is (New-York) big?",
        "where is new  york today",
    ],
)
def test_a_probe_that_mentions_the_subject_of_another_edit_in_any_case_is_touched(probe: str) -> None:
    assert by([edit("A", (probe, "x")), edit("B", subject="New York")]) == [(0, probe, 1)]


@pytest.mark.parametrize("probe", ["Where are New Yorkers?", "Renew York?", "New and York", "York New", "Newyork"])
def test_part_of_a_word_or_the_words_apart_are_no_mention(probe: str) -> None:
    assert by([edit("A", (probe, "x")), edit("B", subject="New York")]) == []


def test_subjects_of_every_length_are_looked_up() -> None:
    subjects = ["Rome", "New York", "Holy Roman Empire"]
    cases = [edit(f"E{i}", subject=subject) for i, subject in enumerate(subjects)]
    probes = [("is it Rome", "x"), ("the New York of", "x"), ("Holy Roman Empire", "x"), ("Holy Empire", "x")]
    assert by([*cases, edit("P", *probes)]) == [
        (3, "is it Rome", 0),
        (3, "the New York of", 1),
        (3, "Holy Roman Empire", 2),
    ]


@pytest.mark.parametrize("answer", ["New York", "new york."])
def test_a_probe_whose_answer_alone_is_the_subject_of_another_edit_is_not_touched(answer: str) -> None:
    assert by([edit("A", ("P", answer)), edit("B", subject="New York")]) == []


def test_what_touches_a_probe_is_told() -> None:
    mention, prompt = edit("X", subject="New York"), edit("is new york big")
    probe = Probe("is new york big", "x")
    assert touched_probes([edit("A", (probe.prompt, "x")), mention, prompt]) == [Touched(0, probe, 1, "New York")]
    assert touched_probes([edit("A", (probe.prompt, "x")), prompt, mention]) == [Touched(0, probe, 1, None)]


# --- Subjects that are ordinary words ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "probe", "touched"),
    [
        ("In", "In which country is Lipa?", False),  # begins the sentence
        ("In", "Which town in Peru is it?", False),  # not as the edit writes it
        ("In", "Lipa is a town. In which country?", False),  # begins the second sentence
        ("In", "Who is the owner of In?", True),
        ("It", "Who wrote It?", True),
        ("It", "Who wrote it?", False),
        ("It", "Who wrote IT?", False),
        ("in", "Which town is in Peru?", False),  # without a capital nothing tells it from the word
        ("And Then There Were", "who wrote and then there were none", False),
        ("And Then There Were", "Who wrote And Then There Were None?", True),
        ("In Rome", "in rome", True),  # one word that is not ordinary makes a name
        ("1984", "who wrote 1984", True),
    ],
)
def test_a_subject_of_function_words_is_mentioned_only_as_a_title(subject: str, probe: str, touched: bool) -> None:
    assert by([edit("A", (probe, "x")), edit("B", subject=subject)]) == ([(0, probe, 1)] if touched else [])


@pytest.mark.parametrize(
    ("texts", "touched"),
    [
        (["Who sings the song?", "Which song is it?"], False),
        (["Who sings the song?", "Which one is it?"], True),  # a single case may have a name in lower case
        (["Who sings the Song?", "Which SONG is it?"], True),
        (["who sings songs", "which songs"], True),
    ],
)
def test_a_word_that_two_cases_have_in_lower_case_is_ordinary(texts: list[str], touched: bool) -> None:
    others = [edit(text) for text in texts]
    probe = ("What is the song about?", "x")
    expected = [(0, probe[0], 3)] if touched else []
    assert by([edit("A", probe), *others, edit("Q", subject="Song")]) == expected


def test_paraphrases_say_too_what_is_ordinary_and_a_subject_does_not_of_itself() -> None:
    titles = [edit("Who wrote love?", subject="love"), edit("Who filmed love?", subject="love")]
    probe = ("is love blind", "x")
    assert by([edit("A", probe), *titles]) == [(0, probe[0], 1)]
    words = [edit("P", paraphrase="do they love?"), edit("Q", paraphrase="whom does he love?")]
    assert by([edit("A", probe), *titles, *words]) == []


def test_the_cause_of_most_touches_is_named() -> None:
    probes = [(f"is Rome {i} old", "x") for i in range(3)]
    touched = touched_probes([edit("A", *probes, ("B", "b"), ("of Lima", "x")), edit("B", subject="Rome"),
                              edit("C", subject="Lima")])  # fmt: skip
    assert most_mentioned(touched) == [("Rome", 3), ("Lima", 1)]
    assert dominating_mention(touched) == " (3 of them because they mention 'Rome')"
    assert dominating_mention(touched[3:]) == ""  # one probe dominates nothing
    assert dominating_mention([]) == ""


@pytest.mark.parametrize(("n_others", "dominates"), [(8, True), (9, False)])
def test_a_fifth_of_the_touches_dominates(n_others: int, dominates: bool) -> None:
    touch = Touched(0, Probe("P", "p"), 1)
    touched = [Touched(0, Probe("P", "p"), 1, "Rome")] * 2 + [touch] * n_others
    assert bool(dominating_mention(touched)) is dominates


def test_letters_are_compared_whatever_their_case_in_every_script() -> None:
    cases = [edit("A", ("wo liegt die STRASSE?", "x"), ("где МОСКВА", "x")), edit("B", subject="Straße")]
    assert by([*cases, edit("C", subject="Москва")]) == [(0, "wo liegt die STRASSE?", 1), (0, "где МОСКВА", 2)]


@pytest.mark.parametrize("subject", [None, "", "?!"])
def test_a_subject_without_words_touches_nothing(subject: str | None) -> None:
    assert by([edit("A", ("?!", "?!")), edit("B", subject=subject)]) == []


# --- Which edit --------------------------------------------------------------------------------------------


def test_a_probes_own_edit_does_not_count() -> None:
    assert by([edit("A", ("A", "S"), ("A2", "x"), ("of S", "x"), subject="S", paraphrase="A2"), edit("B")]) == []


def test_another_edit_of_the_same_subject_counts_for_both() -> None:
    cases = [edit("A", ("of S", "x"), subject="S"), edit("B", ("by S", "x"), subject="s")]
    assert by(cases) == [(0, "of S", 1), (1, "by S", 0)]


def test_the_first_other_edit_is_named_whichever_way_it_touches() -> None:
    mention, prompt = edit("Y", subject="Rome"), edit("of Rome")
    probe = edit("P", ("of Rome", "Lima"))
    assert by([mention, prompt, probe]) == [(2, "of Rome", 0)]
    assert by([prompt, mention, probe]) == [(2, "of Rome", 0)]
    assert by([probe, mention, prompt]) == [(0, "of Rome", 1)]


def test_among_many_edits_of_one_subject_the_first_other_one_is_named() -> None:
    cases = [edit(f"E{i}", ("of S", "x"), subject="S") for i in range(5)]
    assert [each.by for each in touched_probes(cases)] == [1, 0, 0, 0, 0]


def test_probes_of_other_families_are_not_audited() -> None:
    hard = EditCase(
        "a", "A", "t", hard_locality={"same_subject": (Probe("B", "b"),)}, extras={"mhop": (Probe("B", ""),)}
    )
    assert by([hard, edit("B")]) == []


def test_a_touch_depends_on_the_prefix_of_the_stream() -> None:
    cases = [edit("A", ("B", "b")), edit("C"), edit("B")]
    assert by(cases[:2]) == []
    assert by(cases) == [(0, "B", 2)]


def test_an_empty_stream_has_no_touched_probe() -> None:
    assert touched_probes([]) == []


# --- Size --------------------------------------------------------------------------------------------------


def test_twenty_thousand_edits_are_audited_at_once() -> None:
    n = 20_000
    cases = [
        edit(f"Who is Person{i} Of Lima?", (f"where is person{i + 1} of lima" if i % 10 == 0 else f"q{i}", "x"),
             subject=f"Person{i} of Lima")
        for i in range(n)
    ]  # fmt: skip
    touched = touched_probes(cases)
    assert [(each.case, each.by) for each in touched] == [(i, i + 1) for i in range(0, n, 10)]


@pytest.mark.parametrize(
    "case",
    [
        lambda i: edit(f"E{i}", ("of S", "x"), subject="S"),
        lambda i: edit(f"E{i}", ("P", "S"), subject="S"),
        lambda i: edit("P", ("P", "x")),
        lambda i: edit(f"E{i} of S{i}", (f"of S{i + 1}", "x"), subject=f"S{i}"),
    ],
    ids=["one subject", "one answer", "one prompt", "all different"],
)
def test_work_grows_with_the_stream_and_not_with_its_square(case: Callable[[int], EditCase]) -> None:
    def calls(n: int) -> int:
        """Function calls and generator steps that an audit of n cases takes."""
        counted = 0

        def count(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        cases = [case(i) for i in range(n)]
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            touched_probes(cases)
        finally:
            sys.setprofile(before)
        return counted

    assert calls(400) < 2.2 * calls(200)


# --- Composition -------------------------------------------------------------------------------------------


def test_a_stream_is_counted_by_hand() -> None:
    cases = [
        EditCase("0", "Who is Ana?", "x", "Ana", (Probe("Ana?", "x"),), (Probe("L", "l"), Probe("is Bo here", "l"))),
        EditCase(
            "1",
            "Who is Bo?",
            "x",
            "Bo",
            (Probe("Who is Bo?", "x"), Probe("Bo?", "x")),
            extras={"mhop": (Probe("M", "m"),)},
        ),
        EditCase("2", "Who is Ana?", "y", "Ana", hard_locality={"same_subject": (Probe("H", "h"), Probe("I", "i"))}),
        EditCase("3", "Who is Ana?", "x", None, extras={"mhop": ()}),
        EditCase("4", "Who is Bo?", "x", "Cy", (Probe("Bo?", "x"),), (Probe("L", "l"),)),
        EditCase("5", "Who is Bo?", "x", "Bo"),
    ]
    assert composition(cases) == Composition(
        n=6,
        coverage={"subject": 5, "paraphrases": 3, "locality": 2, "same_subject": 1, "mhop": 1},
        probes={"subject": 5, "paraphrases": 4, "locality": 3, "same_subject": 2, "mhop": 1},
        conflicts=3,  # 0, 2, 3
        duplicates=3,  # 3 repeats 0; 4 and 5 repeat 1
        same_paraphrase=1,  # 1
        contradicting=0,
        subject_outside=1,  # 4
        touched=1,  # "is Bo here", by 1
    )


def test_families_are_listed_in_the_order_in_which_they_appear() -> None:
    cases = [EditCase("0", "A", "x", extras={"mhop": ()}), EditCase("1", "B", "x", extras={"personas": ()})]
    assert list(composition(cases).coverage) == ["subject", "paraphrases", "locality", "mhop", "personas"]


def test_an_empty_stream_is_counted_too() -> None:
    assert composition([]) == Composition(0, {}, {}, 0, 0, 0, 0, 0, 0)


# --- Paraphrases that contradict ---------------------------------------------------------------------------


def told(prompt: str, target: str, *paraphrases: str) -> EditCase:
    return EditCase(prompt, prompt, target, paraphrases=tuple(Probe(text, target) for text in paraphrases))


def test_paraphrases_given_different_targets_are_counted_by_text() -> None:
    cases = [
        told("A", "x", "Q:", "A2"),
        told("B", "y", "Q:"),
        told("C", "x", "Q:", "B"),  # a paraphrase, and the prompt of another case with another target
        told("D", "z", "D2"),
        told("E", "z", "D2", "E"),  # the same target twice is no contradiction
        told("A", "y"),  # contradicts a prompt, not a paraphrase
    ]
    assert contradicting_paraphrases(cases) == {"Q:": 3, "B": 1}
    assert composition(cases).contradicting == 4
    (sentence,) = paraphrase_warnings(cases)
    assert all(fact in sentence for fact in ("N=6: 4 paraphrases", "'Q:' (3)", "Gen"))


def test_a_stream_without_contradictions_has_no_warning_of_them() -> None:
    assert paraphrase_warnings([told("A", "x", "A2"), told("B", "y", "B2")]) == []
    assert paraphrase_warnings([]) == []


# --- Streams that are at hand ------------------------------------------------------------------------------


def test_no_locality_probe_of_the_embedded_facts_is_touched() -> None:
    counts = composition(Facts(stream_seed=1).cases(2000))
    assert (counts.conflicts, counts.duplicates, counts.same_paraphrase) == (0, 0, 0)
    assert (counts.subject_outside, counts.touched, counts.contradicting) == (0, 0, 0)


def test_the_published_head_is_clean(real_records: Path) -> None:
    options: dict[str, Any] = {"strip_nq_prefix": False, "append_question_mark": False, "conflicts": "keep"}
    path = str(real_records / "zsre_mend_eval_head.json")
    dataset = Zsre(path=path, train_path=None, target="answers", locality_source="record", **options)
    counts = composition(dataset.cases(16))
    assert counts.coverage == {"subject": 16, "paraphrases": 16, "locality": 16}
    assert (counts.conflicts, counts.touched) == (0, 0)


@pytest.mark.parametrize(
    ("name", "touched", "contradicting"),
    [("wikibigedit/wikibigedit_3k", 25, 27), ("counterfact/counterfact_3k", 222, 0)],
)
def test_the_rule_on_real_records_finds_what_the_audit_says(
    name: str, touched: int, contradicting: int, real_records: Path
) -> None:
    records = json.loads((real_records / f"{name}.json").read_text(encoding="utf-8"))
    cases = [
        EditCase(
            id=str(i),
            prompt=record["prompt"],
            target=record["target_new"],
            subject=record["subject"],
            paraphrases=(Probe(record["rephrase_prompt"], record["target_new"]),),
            locality=(Probe(record["locality_prompt"], str(record["locality_ground_truth"])),),
        )
        for i, record in enumerate(records)
    ]
    counts = composition(cases)
    assert (counts.n, counts.touched, counts.contradicting) == (3000, touched, contradicting)
    if name.startswith("wikibigedit"):
        mentioned = dict(most_mentioned(touched_probes(cases)))
        assert (mentioned["In"], mentioned["From"]) == (1, 1)  # titles with more words: "In the Summer"
