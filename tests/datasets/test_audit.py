"""Which locality probes another edit touches, and the counts over a stream, all worked out by hand."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.audit import Composition, Touched, composition, touched_probes
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
    return [(one.case, one.probe.prompt, one.by) for one in touched_probes(cases)]


# --- The three ways ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("answer", "touched"), [("New York", True), ("new york.", True), ("New York City", False)])
def test_a_probe_whose_answer_is_the_subject_of_another_edit_is_touched(answer: str, touched: bool) -> None:
    assert by([edit("A", ("P", answer)), edit("B", subject="New York")]) == ([(0, "P", 1)] if touched else [])


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
    answer, mention, prompt = edit("X", subject="Lima"), edit("Y", subject="Rome"), edit("of Rome")
    probe = edit("P", ("of Rome", "Lima"))
    assert by([answer, mention, prompt, probe]) == [(3, "of Rome", 0)]
    assert by([prompt, mention, answer, probe]) == [(3, "of Rome", 0)]
    assert by([probe, mention, prompt, answer]) == [(0, "of Rome", 1)]


def test_among_many_edits_of_one_subject_the_first_other_one_is_named() -> None:
    cases = [edit(f"E{i}", ("of S", "x"), subject="S") for i in range(5)]
    assert [one.by for one in touched_probes(cases)] == [1, 0, 0, 0, 0]


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
    assert [(one.case, one.by) for one in touched] == [(i, i + 1) for i in range(0, n, 10)]


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
        subject_outside=1,  # 4
        touched=1,  # "is Bo here", by 1
    )


def test_families_are_listed_in_the_order_in_which_they_appear() -> None:
    cases = [EditCase("0", "A", "x", extras={"mhop": ()}), EditCase("1", "B", "x", extras={"personas": ()})]
    assert list(composition(cases).coverage) == ["subject", "paraphrases", "locality", "mhop", "personas"]


def test_an_empty_stream_is_counted_too() -> None:
    assert composition([]) == Composition(0, {}, {}, 0, 0, 0, 0, 0)


# --- Streams that are at hand ------------------------------------------------------------------------------


def test_no_locality_probe_of_the_embedded_facts_is_touched() -> None:
    counts = composition(Facts(stream_seed=1).cases(2000))
    assert (counts.conflicts, counts.duplicates, counts.same_paraphrase) == (0, 0, 0)
    assert (counts.subject_outside, counts.touched) == (0, 0)


def test_the_published_head_is_clean(real_records: Path) -> None:
    options: dict[str, Any] = {"strip_nq_prefix": False, "append_question_mark": False, "conflicts": "keep"}
    path = str(real_records / "zsre_mend_eval_head.json")
    dataset = Zsre(path=path, train_path=None, target="answers", locality_source="record", **options)
    counts = composition(dataset.cases(16))
    assert counts.coverage == {"subject": 16, "paraphrases": 16, "locality": 16}
    assert (counts.conflicts, counts.touched) == (0, 0)
