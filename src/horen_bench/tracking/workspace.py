"""The W&B workspace of sequential editing: every score against the number of edits.

Built with `wandb-workspaces` from the names that `WandbTracker` gives: metrics `<protocol>/<score>` and
`cost/<cost>`, the axis `edits`, the table `cases` in a run's summary. Building needs no network, saving does.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from horen_bench.errors import UserError
from horen_bench.results.columns import COSTS, MAIN, TEXT
from horen_bench.tracking.wandb_tracker import CASES, in_one_line

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

NAME = "Sequential edits"
_PROTOCOLS = {"greedy": MAIN, "release": MAIN, "teacher_forced": MAIN, "text": TEXT}
# Nested keys of a run's configuration, written as W&B's own pages write them.
_MODEL, _DATASET, _METHOD = "model.value.name", "dataset.value.name", "method.value.name"
_GUIDE = """\
A line is one method on one model and dataset. Where it stands for several runs (seeds, variants), it is their mean and
the band reaches from the lowest to the highest; open the group on the left to see them one by one. No panel mixes two
protocols.
"""


def build(
    project: str, entity: str = "", *, models: Sequence[str] = (), datasets: Sequence[str] = ()
) -> "ws.Workspace":
    """The workspace: a section per protocol, the costs, the per-case table; runs grouped by what they compare.

    Args:
        project: W&B project of the runs.
        entity: W&B user or team that the project belongs to; empty: known when saving.
        models: names of the models whose runs are shown; none: all.
        datasets: the same for datasets.

    Raises:
        UserError: a name holds a quotation mark, which a filter cannot hold.
    """
    import wandb_workspaces.reports.v2.interface as wr  # noqa: PLC0415
    import wandb_workspaces.workspaces as ws  # noqa: PLC0415

    chosen = {_MODEL: _checked(models), _DATASET: _checked(datasets)}
    curves = [_section(protocol, scores, highest=1.0) for protocol, scores in _PROTOCOLS.items()]
    curves[0].is_open = True
    guide = ws.Section(name="how to read this", panels=[wr.MarkdownPanel(markdown=_GUIDE)], is_open=True)
    table = wr.WeavePanelSummaryTable(table_name=CASES, layout=wr.Layout(w=24, h=16))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[guide, *curves, _section("cost", COSTS), ws.Section(name="cases", panels=[table])],
        settings=ws.WorkspaceSettings(x_axis="edits", x_min=0, max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(key) for key in (_MODEL, _DATASET, _METHOD)],
            filters=ws.And(*(ws.Config(key).isin(names) for key, names in chosen.items() if names)),
            pinned_columns=[*(f"config:{key}" for key in (_MODEL, _DATASET, _METHOD, "seed.value")), "summary:edits"],
        ),
    )


def specification(workspace: "ws.Workspace") -> dict[str, Any]:
    """What `save` sends, as plain values; the library has no public name for it."""
    view: dict[str, Any] = workspace._spec
    return view


def save(workspace: "ws.Workspace") -> str:
    """Save the workspace as a new view of its project; its address.

    Where no entity is named, it is the logged-in user's default.

    Raises:
        UserError: nobody is logged in, or W&B does not take it.
    """
    import wandb  # noqa: PLC0415

    if not wandb.login(prompt=False, verify=False):
        raise UserError("W&B is not logged in: run `wandb login`, or use --out spec.json, which needs no W&B.")
    try:
        workspace.entity = workspace.entity or str(wandb.Api().default_entity)
        return str(workspace.save().url)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the client's HTTP library raises comes through
        raise UserError(
            f"W&B did not save the workspace in project {workspace.project} ({in_one_line(error)}); a project exists "
            "from its first tracked run on, and --out spec.json needs no W&B."
        ) from error


def _section(prefix: str, titles: Mapping[str, str], highest: float | None = None) -> "ws.Section":
    """Curves of the metrics `<prefix>/<name>` against `edits`, from 0 to `highest`."""
    import wandb_workspaces.reports.v2.interface as wr  # noqa: PLC0415
    import wandb_workspaces.workspaces as ws  # noqa: PLC0415

    panels: list[Any] = [
        wr.LinePlot(
            title=title,
            x="edits",
            y=[f"{prefix}/{name}"],
            range_y=(0.0, highest),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=100,
        )
        for name, title in titles.items()
    ]
    return ws.Section(name=prefix, panels=panels, layout_settings=ws.SectionLayoutSettings(columns=2, rows=2))


def _checked(names: Sequence[str]) -> list[str]:
    for name in names:
        if set(name) & set("'\"\\"):
            raise UserError(
                f"{name} is no name of a model or dataset; write one of those in conf/, e.g. tiny or facts."
            )
    return list(names)
