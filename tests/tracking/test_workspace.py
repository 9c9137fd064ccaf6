"""The W&B workspace, checked in what the real library would send."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces import interface, internal

from horen_bench.errors import UserError
from horen_bench.tracking import workspace
from horen_bench.tracking.__main__ import main


@pytest.fixture
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials anywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def built(**filters: list[str]) -> dict[str, Any]:
    section: dict[str, Any] = workspace.specification(workspace.build("edits", "lab", **filters))["spec"]["section"]
    return section


def panels(name: str) -> list[dict[str, Any]]:
    sections = built()["panelBankConfig"]["sections"]
    (section,) = (one for one in sections if one["name"] == name)
    found: list[dict[str, Any]] = section["panels"]
    return found


@pytest.mark.parametrize("protocol", ["greedy", "release", "teacher_forced"])
def test_each_protocol_draws_its_four_scores_against_edits(protocol: str) -> None:
    drawn = [panel["config"] for panel in panels(protocol)]
    assert [config["metrics"] for config in drawn] == [[f"{protocol}/{score}"] for score in ("rel", "gen", "loc", "op")]
    assert {config["xAxis"] for config in drawn} == {"edits"}
    assert {(config["yAxisMin"], config["yAxisMax"]) for config in drawn} == {(0.0, 1.0)}


def test_text_scores_and_costs_have_their_sections() -> None:
    text = [panel["config"]["metrics"][0] for panel in panels("text")]
    assert len(text) == 18
    assert {"text/rel_rouge1_recall", "text/gen_bert_score", "text/sub_question_bleu1_bp"} <= set(text)
    costs = [panel["config"] for panel in panels("cost")]
    assert [config["metrics"][0] for config in costs][:2] == ["cost/edits_per_second", "cost/edit_seconds"]
    assert all("yAxisMax" not in config for config in costs)


def test_cases_are_shown_as_the_table_that_runs_leave_in_their_summary() -> None:
    (table,) = panels("cases")
    assert table["viewType"] == "Weave"
    assert table["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] == "cases"


def test_runs_are_grouped_so_that_no_line_averages_over_models_or_datasets() -> None:
    (runs,) = built()["runSets"]
    keys = ["model.value.name", "dataset.value.name", "method.value.name"]
    assert runs["grouping"] == [{"section": "config", "name": key} for key in keys]
    assert runs["filters"]["filters"] == []
    assert built()["settings"]["xAxis"] == "edits"


def test_model_and_dataset_filter_the_runs() -> None:
    (runs,) = built(models=["tiny", "qwen25_7b"], datasets=["facts"])["runSets"]
    found = [(one["key"]["name"], one["op"], one["value"]) for one in runs["filters"]["filters"]]
    assert found == [
        ("model.value.name", "IN", ["tiny", "qwen25_7b"]),
        ("dataset.value.name", "IN", ["facts"]),
    ]


def test_a_name_that_would_break_out_of_its_filter_is_refused() -> None:
    with pytest.raises(UserError, match="tiny' or 1 is no name of a model or dataset"):
        workspace.build("edits", "lab", models=["tiny' or 1"])


def test_specification_survives_the_librarys_own_reading() -> None:
    first = workspace.build("edits", "lab", models=["tiny"])
    again = ws.Workspace._from_model(first._to_model())
    assert [section.name for section in again.sections] == [section.name for section in first.sections]
    assert again._spec["spec"]["section"]["runSets"] == first._spec["spec"]["section"]["runSets"]


def test_specification_is_written_without_login(
    tmp_path: Path, _nobody: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spec.json"
    assert main(["workspace", "--dry-run", "--out", str(out), "--entity", "lab", "--dataset", "facts"]) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["entity"], written["project"], written["displayName"]) == ("lab", "horen-bench", "Sequential edits")


@pytest.mark.parametrize("entity", [[], ["--entity", "lab"]])
def test_saving_without_login_is_refused(_nobody: None, entity: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspace", *entity]) == 2
    assert re.match(r"error: W&B is not logged in: run `wandb login`, or use --out", capsys.readouterr().err)


def test_saved_workspace_goes_to_the_logged_in_users_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The server is played: it takes the view and names it.
    sent: list[Any] = []

    def upsert(view: Any) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": "view-1"}}}

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.ai")
    assert main(["workspace", "--project", "edits"]) == 0
    (view,) = sent
    assert (view.entity, view.project) == ("me", "edits")
    address = f"https://wandb.ai/me/edits?nw={view.name.removeprefix('nw-').removesuffix('-v')}"
    assert capsys.readouterr().out.strip() == address


def test_server_that_refuses_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(internal, "upsert_view2", refuse)
    assert main(["workspace", "--entity", "lab"]) == 2
    assert capsys.readouterr().err == (
        "error: W&B did not save the workspace in project horen-bench (ConnectionError: no route); a project exists "
        "from its first tracked run on, and --out spec.json needs no W&B.\n"
    )
