"""`python -m horen_bench.datasets`: list, fetch, inspect, and what it says to a wrong call."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from horen_bench.datasets import __main__ as command
from horen_bench.datasets import sources
from horen_bench.datasets.sources import Source
from horen_bench.paths import resource

Run = Callable[..., tuple[int, str, str]]

WITHOUT_TORCH = """
import sys
from horen_bench.datasets.__main__ import main
assert main(["list"]) == 0
assert main(["inspect", "facts", "-n", "5"]) == 0
assert "torch" not in sys.modules, "torch was imported"
"""

RECORDS: list[dict[str, Any]] = [
    {"update": "Who is Ana?", "ans": "a", "subject": "Ana", "loc": "Where is Bo?", "loc_ans": "x", "rephrase": "Ana?"},
    {"update": "Who is Bo?", "ans": "b", "subject": "Bo", "personas": "Bo, mate?", "rephrase": "Who is Bo?"},
    {"update": "Who is Ana?", "ans": "c", "subject": "Ana", "loc": "Where is Eve?", "loc_ans": "x"},
    {"update": "Who is Ana?", "ans": "a", "subject": "Cy"},
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; exit code, output with single spaces, and complaints."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*words: str) -> tuple[int, str, str]:
        code = command.main(words)
        out, err = capsys.readouterr()
        return code, re.sub(r"[ \t│┃]+", " ", out), err

    return call


# --- inspect -----------------------------------------------------------------------------------------------


def test_inspect_prints_coverage_conflicts_and_touched_probes(run: Run, written: Callable[..., Path]) -> None:
    code, out, err = run("inspect", "wikibigedit", "-n", "4", f"dataset.path={written(RECORDS)}")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    for expected in (
        "4 cases",
        "subject 4 100.0% 4",
        "paraphrases 2 50.0% 2",
        "locality 2 50.0% 2",
        "personas 1 25.0% 1",
        "3 cases whose prompt another case gives another target",
        "1 cases that repeat an earlier prompt and target",
        "1 cases with a paraphrase equal to the prompt",
        "1 cases whose subject is not in the prompt",
        "0 paraphrases that are given different targets; they cannot all be right",
        "1 of 2 locality probes touched by another edit (50.0%); locality=clean leaves them out",
        "e.g. 'Where is Bo?', by the edit 'Who is Bo?'",
    ):
        assert expected in lines, expected
    assert "note: this WikiBigEdit stream begins with 'Who is Ana?' and not as the one behind" in out


def test_inspect_counts_contradicting_paraphrases_and_what_most_probes_mention(
    run: Run, written: Callable[..., Path]
) -> None:
    def record(i: int, **more: str) -> dict[str, str]:
        return {"update": f"Who is Person{i}?", "ans": f"a{i}", "rephrase": "Reformulated Question:", **more}

    probes = [record(i, loc=f"Is Lima {i} big?", loc_ans="x") for i in range(3)]
    path = written(
        [*probes, {"update": "Where is Lima?", "ans": "Peru", "subject": "Lima", "rephrase": "Lima is where?"}]
    )
    _, out, _ = run("inspect", "wikibigedit", "-n", "4", "--show", "0", f"dataset.path={path}")
    for fact in (
        "3 paraphrases that are given different targets",
        "'Reformulated Question:', 3 times",
        "3 of 3 locality probes touched",
        "3 probes mention 'Lima'",
    ):
        assert fact in out


def test_inspect_counts_the_first_n_cases_alone(run: Run, written: Callable[..., Path]) -> None:
    _, out, _ = run("inspect", "wikibigedit", "-n", "2", f"dataset.path={written(RECORDS)}")
    assert " 2 cases \n" in out
    assert " 0 cases whose prompt another case gives another target" in out


@pytest.mark.parametrize(("show", "n_shown"), [("0", 0), ("1", 1), ("9", 4)])
def test_inspect_shows_as_many_records_as_wanted(
    show: str, n_shown: int, run: Run, written: Callable[..., Path]
) -> None:
    path = written(RECORDS)
    _, out, _ = run("inspect", "wikibigedit", "-n", "4", "--show", show, f"dataset.path={path}")
    assert out.count("EditCase(") == n_shown


def test_inspect_takes_settings_anywhere_behind_the_dataset(run: Run, written: Callable[..., Path]) -> None:
    path = written([{"question": "Q", "answer": "old"}, {"question": "Q", "answer": "new"}])
    _, out, _ = run("inspect", "unke", f"dataset.path={path}", "-n", "1", "dataset.conflicts=drop_earlier")
    assert "target='new'" in out
    assert "target='old'" not in out


def test_inspect_needs_no_locality(run: Run, written: Callable[..., Path]) -> None:
    code, out, _ = run("inspect", "unke", "-n", "1", f"dataset.path={written([{'question': 'Q', 'answer': 'A'}])}")
    assert code == 0
    assert " 0 of 0 locality probes touched by another edit; locality=clean leaves them out" in out


def test_inspect_prints_markup_in_the_data_as_it_is(run: Run, written: Callable[..., Path]) -> None:
    records = [{**RECORDS[0], "loc": "Where is [bold]Bo[/]?"}, RECORDS[1]]
    code, out, _ = run("inspect", "wikibigedit", "-n", "2", "--show", "0", f"dataset.path={written(records)}")
    assert code == 0
    assert "e.g. 'Where is [bold]Bo[/]?', by the edit 'Who is Bo?'" in out


def test_inspect_counts_the_tokens_of_a_models_tokenizer(run: Run, written: Callable[..., Path]) -> None:
    prompts = ["Who?", *(f"Who is the mother of the {i}th man in the town?" for i in range(8)), "Who " * 40]
    records = [{"question": prompt, "answer": "a politician"} for prompt in prompts]
    _, out, _ = run("inspect", "unke", "-n", "10", "--model", "tiny", f"dataset.path={written(records)}")
    tokenizer = Tokenizer.from_file(str(resource("data") / "tiny" / "tokenizer.json"))
    lengths = sorted(len(tokenizer.encode(prompt.strip()).ids) for prompt in prompts)
    target = len(tokenizer.encode(" a politician", add_special_tokens=False).ids)
    assert lengths[0] < lengths[5] < lengths[9]
    lines = [line.strip() for line in out.splitlines()]
    assert "token lengths, embedded:tiny" in lines
    assert f"prompt {lengths[5]} {lengths[9]} {lengths[9]} {lengths[9]}" in lines
    assert f"target {target} {target} {target} {target}" in lines


def test_inspect_reads_the_published_records(run: Run, real_records: Path) -> None:
    path = real_records / "unke_final_data_v2.json"
    code, out, _ = run("inspect", "unke", "-n", "1000", "--show", "0", f"dataset.path={path}")
    assert code == 0
    assert " sub_question 1000 100.0% 4729 " in out


# --- list and fetch ----------------------------------------------------------------------------------------


def test_list_shows_every_file_with_its_source(run: Run) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    for several in sources.manifest().values():
        for source in several:
            assert source.file in out
            assert source.origin in out
    assert "fa18c971b4c4" in out
    assert "4d558bbf5619cef889bf9dd2351367d16e31c2f4" in out


def test_list_cuts_nothing_in_a_pipe_or_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert command.main(["list"]) == 0
    words = capsys.readouterr().out.split()
    for several in sources.manifest().values():
        for source in several:
            assert source.file in words
            assert (source.url or source.hub or "no") in words


@pytest.mark.parametrize(
    ("where", "can_change"),
    [
        ({"url": "https://host/main/a.json"}, True),
        ({"url": f"https://host/{'4d' * 20}/a.json"}, False),
        ({"url": "https://host/main/a.json", "sha256": "0" * 64}, False),
        ({"url": "https://host/main/a.json", "git_blob": "0" * 40}, False),
        ({"hub": "a/b", "hub_file": "a.json"}, True),
        ({"hub": "a/b", "hub_file": "a.json", "revision": "4d" * 20}, False),
    ],
)
def test_list_says_whether_a_file_can_change_at_its_source(
    where: dict[str, Any], can_change: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "manifest", lambda: {"mine": [Source("mine/a.json", **where)]})
    assert ("may change" in run("list")[1]) is can_change


def test_a_fetch_that_is_stopped_ends_in_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fetch", stopped)
    code, out, err = run("fetch", "zsre", "--data-dir", str(tmp_path))
    assert (code, out) == (130, "")
    assert "the same command goes on" in err
    assert err.count("\n") == 1


def test_fetch_puts_files_below_the_data_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "manifest", lambda: {"zsre": [Source("zsre/a.json", url="http://127.0.0.1/")]})
    (tmp_path / "zsre").mkdir()
    (tmp_path / "zsre/a.json").write_text('[{"a": 1}]')
    code, out, err = run("fetch", "zsre", "--data-dir", str(tmp_path))
    assert (code, out, err) == (0, f"{tmp_path / 'zsre/a.json'} is there already\n", "")


def test_what_needs_no_model_does_not_wait_for_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- Wrong calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["inspect", "zrse"],
            "dataset=zrse: there is no such dataset; write one of counterfact, facts, mquake, passages, records, unke, "
            "wikibigedit, wikiupdate, zsre, zsre_50k",
        ),
        (
            ["inspect", "zsre", "dataset.colour=red"],
            "dataset.colour: there is no such setting; python -m horen_bench --help lists them all",
        ),
        (
            ["inspect", "zsre", "data_dir=nowhere"],
            "nowhere/zsre/zsre_edit_data.json does not exist; run python -m horen_bench.datasets fetch zsre, or name "
            "your file with dataset.path=",
        ),
        (["inspect", "zsre", "dataset.target=pred"], "dataset.target must be 'answers' or 'alt', got 'pred'"),
        (
            ["inspect", "zsre", "dataset.path=null"],
            "dataset.path must be text, got null",
        ),
        (
            ["inspect", "facts", "-n", "700001"],
            "n=700001 is more than facts stream 1 holds; write n=700000 or less",
        ),
        (
            ["inspect", "zsre_50k", "dataset.paths=a.json"],
            "dataset.paths must be a list such as [...], got 'a.json'",
        ),
        (
            ["fetch", "zrse"],
            "zrse is not in the manifest; it has zsre, zsre_mend, wikibigedit, wikibigedit_merged, unke, counterfact, "
            "mquake, wikiupdate, alpaca",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(words: list[str], sentence: str, run: Run) -> None:
    assert run(*words) == (2, "", f"error: {sentence}\n")


def test_an_unknown_model_is_one_sentence_that_lists_those_there_are(run: Run) -> None:
    code, out, err = run("inspect", "facts", "--model", "gpt5")
    assert (code, out) == (2, "")
    assert err.startswith("error: model=gpt5: there is no such model; write one of deepseek_llama_8b, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("setting", ["dataset.target=[", "dataset.path=${nowhere}", "dataset=[zsre]"])
def test_a_setting_that_cannot_be_read_is_one_line_without_a_traceback(setting: str, run: Run) -> None:
    code, out, err = run("inspect", "zsre", setting)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["inspect", "facts", "stray"], "unrecognized arguments: stray"),
        (["inspect", "facts", "a=1", "two", "words"], "unrecognized arguments: two words"),
        (["fetch", "zsre", "dataset.path=x"], "unrecognized arguments: dataset.path=x"),
        (["list", "zsre"], "unrecognized arguments: zsre"),
        (["inspect", "facts", "-n", "0"], "argument -n: a whole number of at least 1 is needed, got '0'"),
        (["inspect", "facts", "-n", "-5"], "argument -n: a whole number of at least 1 is needed, got '-5'"),
        (["inspect", "facts", "-n", "many"], "argument -n: a whole number of at least 1 is needed, got 'many'"),
        (["inspect", "facts", "--show", "-1"], "argument --show: a whole number of at least 0 is needed, got '-1'"),
        ([], "the following arguments are required: command"),
        (["inspect"], "the following arguments are required: dataset"),
        (["show"], "invalid choice: 'show'"),
    ],
)
def test_a_call_of_the_wrong_form_is_told_the_form(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: python -m horen_bench.datasets")
    assert complaint in err
