"""The page as text: what its tables, notes and embedded values hold."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from horen_bench.report import StoredRun, page, read, report
from horen_bench.report.__main__ import main
from horen_bench.report.contents import contents
from horen_bench.report.runs import variants
from horen_bench.results.atomic import write_text
from horen_bench.results.store import RunStore


def embedded(text: str) -> Any:
    """The values that the page's script reads."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    return json.loads(data[1])


def named(runs: list[StoredRun]) -> list[tuple[StoredRun, str]]:
    return list(zip(runs, variants(runs), strict=True))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells below a heading, line breaks as spaces."""
    part = text.partition(f"<h3>{heading}</h3>")[2].partition("</table>")[0]
    part = part.replace("<br><small>", " ").replace("</small>", "")
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in part.split("<tr>")[1:]]
    assert rows
    return rows


def test_tables_keep_protocols_apart_and_show_what_is_missing(runs: list[StoredRun]) -> None:
    greedy, release = (table(report(runs), f"Facts, protocol {name}") for name in ("greedy", "release"))
    columns = ["Model", "Method", "Variant", "N", "Seed", "Items", "Rel", "Gen", "Loc", "OP", "ms/edit", "eval s"]
    assert greedy[0] == columns
    first = ["Tiny", "GRACE", "", "10", "1", "10", "0.900 0.775–0.900", "0.250 0.125–0.250", "--"]
    assert greedy[1] == [*first, "0.750 0.625–0.750", "10.0", "2.0"]
    assert [row[1:4] for row in greedy[1:]] == [
        ["GRACE", "", "10"],
        ["HoReN", "seed=1", "10"],
        ["HoReN", "seed=2", "10"],
        ["GRACE", "", "30"],
        ["HoReN", "seed=1", "30"],
        ["HoReN", "seed=2", "30"],
    ]
    assert [row[1] for row in release[1:]] == ["GRACE", "HoReN", "GRACE", "HoReN"]
    assert {row[-3][:5] for row in release[1:]} == {"0.500"}


def test_texts_of_cases_and_warnings_cannot_become_markup(runs: list[StoredRun]) -> None:
    text = report(runs)
    assert text.count("<script") == 2, "the values and the page's own script"
    assert "<img" not in text
    assert "<b>" not in text
    assert "the &lt;b&gt;fan&lt;/b&gt; was loud" in text
    assert "</script><script>document.title" in embedded(text)["runs"][0]["cases"]["greedy"]["rows"][0]["prompt"]


def test_only_the_pages_own_script_may_run(runs: list[StoredRun]) -> None:
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', report(runs))
    assert policy
    assert "default-src 'none'; script-src 'sha256-" in policy[1]


def test_notes_name_their_run(runs: list[StoredRun]) -> None:
    notes = report(runs).split('id="notes-title"')[1]
    assert "<li>GRACE on Tiny, Facts, greedy: the &lt;b&gt;" in notes
    assert "<li>HoReN on Tiny, Facts (seed=2), greedy: the &lt;b&gt;" in notes


def test_a_run_without_a_checkpoint_is_named(runs: list[StoredRun]) -> None:
    unfinished = replace(runs[0], rows=runs[0].rows.head(0), cases=pd.DataFrame())
    assert "<li>GRACE on Tiny, Facts: no checkpoint is stored.</li>" in report([unfinished, runs[1]])
    assert "No run has reached a checkpoint yet." in report([unfinished])


def test_a_failed_run_says_why(tmp_path: Path, runs: list[StoredRun]) -> None:
    failed = replace(runs[0], failure="the <disk> is full")
    assert "<li>GRACE on Tiny, Facts: the last attempt failed: the &lt;disk&gt; is full</li>" in report(
        [failed, runs[1]]
    )
    RunStore(tmp_path / "runs" / "tiny-horen-facts-abc").record_failure("no weights")
    assert "<li>tiny-horen-facts-abc: the last attempt failed: no weights</li>" in report(read([tmp_path]))


def test_the_same_runs_give_the_same_page(runs: list[StoredRun]) -> None:
    assert report(runs) == report(runs)


def test_curves_carry_value_and_interval_and_none_for_a_gap(runs: list[StoredRun]) -> None:
    curve = contents(named(runs), 0)["runs"][0]["curves"]["greedy"]
    assert curve["n"] == [10, 30]
    assert curve["scores"]["gen"] == [[0.25, 0.125, 0.25]] * 2
    assert curve["scores"]["loc"] == [[None, None, None], [1, 0.875, 1]]
    assert curve["scores"]["edits_per_second"] == [[100, None, None]] * 2
    assert "peak_memory_bytes" not in curve["scores"]


def test_sample_is_spread_over_the_stream_and_says_of_how_many(runs: list[StoredRun]) -> None:
    cases = contents(named(runs), 4)["runs"][0]["cases"]["greedy"]
    assert (cases["n"], cases["total"]) == (30, 30)
    assert [row["position"] for row in cases["rows"]] == [0, 10, 19, 29]


def test_a_case_shows_what_was_done_predicted_and_routed(runs: list[StoredRun]) -> None:
    row = contents(named(runs), 30)["runs"][0]["cases"]["greedy"]["rows"][4]
    assert row["edit"] == "inserted, entry 4, 12 steps, loss 0.0061"
    assert row["families"] == [
        ["Rel", 1, 0, {}, [["answer 4", 4, 0.97, True]]],
        ["Loc", 1, 1, {}, [["blue", None, None, None], ["red", None, None, None]]],
    ]


def test_text_scores_have_curves_and_stand_beside_their_predictions(runs: list[StoredRun]) -> None:
    named = {"rel_rougeL_recall": 0.5, "rel_rougeL_recall_low": 0.25, "rel_rougeL_recall_high": 0.75}
    rows = runs[2].rows.drop(columns=["rel", "gen", "loc", "op"]).assign(protocol="text", **named)
    rows = rows[[name for name in rows.columns if not name.startswith(("rel_low", "gen", "loc", "op"))]]
    cases = runs[2].cases.drop(columns=["rel", "rel_base"])
    cases = cases.assign(protocol="text", rel_rougeL_recall=0.5, rel_rougeL_recall_base=0.1, target="long " * 200)
    text_run = replace(runs[2], rows=rows, cases=cases)
    shown = contents([(text_run, "")], 1)
    assert shown["scores"][0] == {
        "name": "rel_rougeL_recall",
        "label": "Original, ROUGE-L",
        "group": "text scores",
    }
    assert shown["runs"][0]["curves"]["text"]["scores"]["rel_rougeL_recall"] == [[0.5, 0.25, 0.75]] * 2
    case = shown["runs"][0]["cases"]["text"]["rows"][0]
    assert case["families"][0][:4] == ["Original", None, None, {"ROUGE-L": 0.5}]
    assert len(case["target"]) == 401
    assert case["target"].endswith("…")
    assert table(report([text_run]), "Facts, protocol text")[1][5:7] == ["0.500 0.250–0.750", "10.0"]


def test_cases_are_cut_until_the_page_is_small_enough(runs: list[StoredRun], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, bare = len(report(runs).encode()), len(page._page("", "", named(runs), 0).encode())
    monkeypatch.setattr(page, "MOST_BYTES", (whole + bare) // 2)
    cut = report(runs)
    assert len(cut.encode()) <= (whole + bare) // 2
    assert "At most 10 cases of each run and protocol" in " ".join(cut.split())
    assert [len(run["cases"]["greedy"]["rows"]) for run in embedded(cut)["runs"]] == [10, 10, 10]


def test_variants_name_the_settings_that_differ_and_no_others(runs: list[StoredRun]) -> None:
    def changed(run: StoredRun, name: str, **settings: object) -> StoredRun:
        return replace(run, name=name, config={**run.config, "method": {**run.config["method"], **settings}})

    two = [runs[0], runs[1], changed(runs[1], "tiny-horen-facts-b", n_steps=5, extra={"steps": 3})]
    assert variants(two) == ["", "n_steps=50", "n_steps=5, extra.steps=3"]
    most = [runs[1], changed(runs[1], "tiny-horen-facts-b", n_steps=5), changed(runs[1], "tiny-horen-facts-c", beta=2)]
    assert variants(most) == ["", "n_steps=5", "beta=2"], "what most have goes without saying"
    assert variants([runs[0], replace(runs[0], name="tiny-grace-facts-abc")]) == ["0000000001", "abc"]


# --- From the store to the file ------------------------------------------------------------------------

Store = Callable[[Path, StoredRun], None]


@pytest.fixture
def store() -> Store:
    def write(results: Path, run: StoredRun) -> None:
        directory = RunStore(results / "runs" / run.name)
        write_text(directory.path / "config.yaml", json.dumps(run.config))  # JSON is YAML
        for row in run.rows.to_dict("records"):
            of_row = run.cases[run.cases["protocol"] == row["protocol"]].assign(n=row["n"])
            directory.add_checkpoint({str(key): value for key, value in row.items()}, of_row)

    return write


def test_page_is_made_of_stored_runs(
    tmp_path: Path, runs: list[StoredRun], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, run in zip(("a", "b", "b"), reversed(runs), strict=True):
        store(tmp_path / folder, run)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = tmp_path / "a" / "report.html"
    assert capsys.readouterr().out == f"{out}\n"
    shown = embedded(out.read_text(encoding="utf-8"))["runs"]
    assert [(run["method"], run["variant"]) for run in shown] == [
        ("GRACE", ""),
        ("HoReN", "seed=1"),
        ("HoReN", "seed=2"),
    ]
    assert {cases["n"] for run in shown for cases in run["cases"].values()} == {30}, "the last checkpoint alone"
    first = out.read_bytes()
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert out.read_bytes() == first


def test_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def damage_config(run: Path) -> None:
    (run / "config.yaml").write_text("{")


def damage_rows(run: Path) -> None:
    (run / "checkpoints.csv").write_text("")


def damage_cases(run: Path) -> None:
    for part in (run / "cases.parquet").iterdir():
        part.write_bytes(b"PAR1")


def lose_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def empty_config(run: Path) -> None:
    (run / "config.yaml").write_text("model: 7\n")


@pytest.mark.parametrize("damage", [damage_config, damage_rows, damage_cases, lose_config, empty_config])
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(
    tmp_path: Path,
    runs: list[StoredRun],
    store: Store,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    store(tmp_path, runs[0])
    store(tmp_path, runs[1])
    damage(tmp_path / "runs" / runs[0].name)
    assert main([str(tmp_path)]) == 2
    assert re.search(rf"^error: .*{runs[0].name} cannot be read \(.*\); move it away", capsys.readouterr().err)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{runs[0].name} cannot be read (" in text
    shown = [run for run in embedded(text)["runs"] if run["curves"]]
    assert [run["method"] for run in shown] == ["HoReN"]


def test_reading_changes_nothing(tmp_path: Path, runs: list[StoredRun], store: Store) -> None:
    store(tmp_path, runs[0])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (run,) = read([tmp_path])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    pd.testing.assert_frame_equal(run.rows, runs[0].rows, check_dtype=False)
