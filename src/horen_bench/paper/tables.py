"""The paper's tables, ours beside the published numbers: pure functions of the rows that a grid collected.

Every table is first a long frame (`published.compared`); it is written as it is (CSV) and laid out as in the paper
(Markdown, LaTeX), one table per protocol, so that numbers of two protocols never stand side by side. Title and remark
of a table stand in its file of `conf/experiment`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from horen_bench.paper.published import compared, plain_name, published
from horen_bench.paths import resource
from horen_bench.results.atomic import write_text
from horen_bench.results.columns import MAIN, TEXT
from horen_bench.results.console import MISSING, notes, score_columns

_SCORES = {name: f"{head} ↑" for name, head in MAIN.items()}
_COST = {
    "edit_ms": "Edit, ms ↓",
    "inference_ms": "Probe, ms ↓",
    "inference_base_ms": "Probe unedited, ms",
    "side_keys": "Keys, M ↓",
    "side_values": "Values, M ↓",
    "side_modified": "Modified, M ↓",
}
# What LaTeX does not print as it stands.
_LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)
_TEXT = {name: f"{head} ↑" for name, head in TEXT.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table is laid out.

    Attributes:
        metrics: columns of the rows, and their heads with an arrow towards better.
        down: long-frame columns that tell its lines apart.
        across: those that tell its columns apart.
        unedited: whether the unedited model's scores stand there as well.
    """

    metrics: Mapping[str, str] = field(default_factory=lambda: _SCORES)
    down: tuple[str, ...] = ("dataset", "model", "method")
    across: tuple[str, ...] = ("N", "score")
    unedited: bool = False


def _scores(*names: str) -> dict[str, str]:
    return {name: _SCORES[name] for name in names}


LAYOUTS = {
    "table1": Layout(),
    "table2": Layout(),
    "table4": Layout(),
    "table5": Layout(_COST, down=("dataset", "model", "method", "N"), across=("score",)),
    "table6": Layout(_scores("rel", "gen", "loc")),
    "table7": Layout(_TEXT, down=("dataset", "model", "score"), across=("N", "method"), unedited=True),
    "table8": Layout(_scores("rel", "gen")),
    "table9": Layout(),
    "table10": Layout(),
    "table11": Layout(),
}
TABLES = (*LAYOUTS, "table3", "protocol_audit")

_LINES = ("ours", "95 %", "unedited", "paper", "difference")


# --- On paper ----------------------------------------------------------------------------------------------


def laid_out(long: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """One protocol's numbers as in the paper, as text: under each of ours its interval, the paper's, the difference.

    Args:
        long: what `compared` gives, of one protocol.
        layout: which columns go down and which across.
    """
    text = pd.DataFrame(
        {
            "ours": long["ours"].map(_three),
            "95 %": [_interval(low, high) for low, high in zip(long["low"], long["high"], strict=True)],
            "unedited": long["unedited"].map(_three),
            "paper": long["paper"],
            "difference": long["difference"].map(lambda value: None if pd.isna(value) else f"{value:+.3f}"),
        }
    )
    lines = [line for line in _LINES if layout.unedited or line != "unedited"]
    tall = pd.concat([long.assign(line=line, text=text[line]) for line in lines])
    down, across = [*layout.down, "line"], list(layout.across)
    for name in {*down, *across} - {"N"}:  # in the order of the grid, not of the alphabet
        tall[name] = _as_met(tall[name])
    table = tall.set_index([*down, *across])["text"].unstack(across).sort_index().sort_index(axis=1)
    filled = table.notna().any(axis=1) | (table.index.get_level_values("line") == "ours")
    return table[filled].fillna(MISSING)


def _three(value: float) -> str | None:
    return None if pd.isna(value) else f"{value:.3f}"


def _interval(low: float, high: float) -> str | None:
    return None if pd.isna(low) else f"{low:.2f}-{high:.2f}"


def caption(name: str, long: pd.DataFrame) -> str:
    """What a table shows and how it was measured."""
    finished = long[long["status"] == "finished"]
    title, remark = _title_and_remark(name)
    items = ", ".join(f"{int(part['items'].max()):,} at N = {n:,}" for n, part in finished.groupby("N"))
    cases = f"cases evaluated: {items}; seed {_listed(finished['seed'])}" if len(finished) else "nothing of ours yet"
    below = "its 95 % bootstrap interval over cases, " if finished["low"].notna().any() else ""
    below += "the unedited model's, " if LAYOUTS[name].unedited else ""
    return (
        f"Table {name.removeprefix('table')}. {title}. Protocol {long['protocol'].iloc[0]}; {cases}. Below a "
        f"number of ours {below}the paper's, and ours minus the paper's; {MISSING} is missing. {remark}"
    ).strip()


def _title_and_remark(name: str) -> tuple[str, str]:
    grid = OmegaConf.load(resource("conf") / "experiment" / f"{name}.yaml")
    return OmegaConf.select(grid, "table.title"), OmegaConf.select(grid, "table.remark", default="")


def _listed(values: "pd.Series[int]") -> str:
    return ", ".join(str(value) for value in sorted(values.unique()))


def absences(long: pd.DataFrame) -> list[str]:
    """One sentence for each reason why numbers are missing, with the command that fills them."""
    absent = long[long["status"] != "finished"]
    sentences = []
    for (model, status, reason, command), part in absent.groupby(
        ["model", "status", "reason", "command"], sort=False, dropna=False
    ):
        methods = ", ".join(part["method"].unique())
        counts = ", ".join(f"{n:,}" for n in sorted(part["N"].unique()))
        sentences.append(f"{model}, {methods}, N = {counts}: {status}: {reason}; `{command}`")
    return sentences


def remarks(rows: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """What the finished runs have to say: coverage of the scores shown, failed edits, warnings.

    Args:
        rows: of one protocol, as `grids.collect` gives them.
        metrics: columns that are shown.
    """
    finished = rows[rows["status"] == "finished"]
    if finished.empty:
        return []
    finished = finished.astype({"items": int, "failed_edits": int})  # no gaps among these
    hidden = [f"{name}_low" for name in score_columns(finished) if name not in set(metrics)]
    runs = finished.drop(columns=hidden).groupby(
        ["model_label", "method_label", "dataset_label", "variant"], sort=False
    )
    return [f"{', '.join(filter(None, map(str, run)))}: {note}" for run, of_run in runs for note in notes(of_run)]


# --- Files -------------------------------------------------------------------------------------------------


def write_table(name: str, rows: pd.DataFrame, folder: Path) -> str:
    """Write a table as CSV, Markdown and LaTeX; the Markdown.

    Args:
        name: e.g. `table1`.
        rows: what `grids.collect` gives.
        folder: where to.
    """
    layout = LAYOUTS[name]
    long = compared(rows, published(name), layout.metrics)
    parts = [part for _, part in long.groupby("protocol", sort=False)]
    tables = []
    for part in parts:
        same = rows[rows["protocol"] == part["protocol"].iloc[0]]
        below = [*absences(part), *remarks(same, layout.metrics)]
        tables.append((caption(name, part), laid_out(part, layout), below))
    return _written(name, long if layout.unedited else long.drop(columns="unedited"), tables, folder)


def _written(
    name: str, long: pd.DataFrame, tables: Sequence[tuple[str, pd.DataFrame, Sequence[str]]], folder: Path
) -> str:
    markdown = "\n".join(_markdown(*table) for table in tables)
    numbers = long.assign(command=long["command"].where(long["status"] != "finished")) if "command" in long else long
    write_text(folder / f"{name}.csv", numbers.to_csv(index=False, float_format="%.6g"))
    write_text(folder / f"{name}.md", markdown)
    write_text(folder / f"{name}.tex", "\n".join(_latex(text, table) for text, table, _ in tables))
    return markdown


def _markdown(text: str, table: pd.DataFrame, notes: Sequence[str]) -> str:
    flat = table.copy()
    flat.columns = pd.Index([_head(column) for column in flat.columns])
    flat = flat.reset_index()
    keys = [name for name in table.index.names if name != "line"]
    again = flat[keys].astype(str).duplicated()
    flat = flat.astype(object)
    flat.loc[again, keys] = ""  # once, over its lines
    body = flat.rename(columns={"line": ""}).to_markdown(index=False, disable_numparse=True)
    return "\n".join([text, "", body, "", *(f"- {note}" for note in notes), ""])


def _head(column: Any) -> str:
    parts = column if isinstance(column, tuple) else (column,)
    return ", ".join(f"N = {part:,}" if isinstance(part, int) else str(part) for part in parts)


def _latex(text: str, table: pd.DataFrame) -> str:
    """Needs the packages booktabs, longtable and multirow."""
    styled = table.style.format(escape="latex")
    styled = styled.format_index(_latex_text, axis=0).format_index(_latex_text, axis=1)
    styled = styled.hide(axis="columns", names=True)
    latex: str = styled.to_latex(hrules=True, multicol_align="c", caption=_latex_text(text), environment="longtable")
    return latex


def _latex_text(text: object) -> str:
    escaped = (f"{text:,}" if isinstance(text, int) else str(text)).translate(_LATEX)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)


# --- Table 3 and the audit ---------------------------------------------------------------------------------


def write_settings(settings: pd.DataFrame, folder: Path) -> str:
    """Table 3, from the configuration.

    Args:
        settings: `model`, `hub_id`, `threshold` and `pooling_percent` of each backbone.
        folder: where to.
    """
    paper = pd.read_csv(resource("baselines") / "paper" / "table3.csv", dtype=str)
    heads = {"threshold": "Threshold", "pooling_percent": "Pooled tokens, %"}
    rows = [
        {"model": row["model"], "score": head, "ours": f"{row[name]:.6g}", "paper": _of_backbone(paper, row, name)}
        for row in settings.to_dict("records")
        for name, head in heads.items()
    ]
    long = pd.DataFrame(rows)
    long["difference"] = (pd.to_numeric(long["ours"]) - pd.to_numeric(long["paper"])).map("{:+.6g}".format, "ignore")
    tall = long.melt(["model", "score"], ["ours", "paper", "difference"], var_name="line", value_name="text")
    for name in ("model", "score", "line"):
        tall[name] = _as_met(tall[name])
    index = pd.MultiIndex.from_frame(tall[["model", "score", "line"]])
    table = pd.DataFrame(tall.set_index(index)["text"].unstack(["score", "line"]))
    table = table.sort_index().sort_index(axis=1).fillna(MISSING)
    text = f"Table 3. {_title_and_remark('table3')[0]}."
    return _written("table3", long, [(text, table, [])], folder)


def _of_backbone(paper: pd.DataFrame, backbone: Mapping[Any, Any], name: str) -> str | None:
    """The paper's value, which has the hub's names."""
    same = [plain_name(backbone["hub_id"]).endswith(plain_name(model)) for model in paper["model"]]
    return str(paper.loc[same, name].item()) if any(same) else None


def _as_met(values: "pd.Series[Any]") -> pd.Categorical:
    """Values that sort in the order of their first appearance."""
    return pd.Categorical(values, categories=list(values.unique()), ordered=True)


def write_audit(rows: pd.DataFrame, folder: Path) -> str:
    """The same edits under three protocols: each score, and how far the other two are from `greedy`."""
    nothing = pd.DataFrame(columns=["dataset", "metric", "paper"])
    long = compared(rows, nothing, _SCORES).drop(columns=["unedited", "paper"])
    missing = absences(long)
    models = long[long["status"] == "finished"]["model"].unique()
    long = long[long["model"].isin(models)].copy()  # whole backbones that were not run are in the notes alone
    keys = ["dataset", "model", "method", "N", "score"]
    greedy = long[long["protocol"] == "greedy"].set_index(keys)["ours"]
    base = greedy.reindex(pd.MultiIndex.from_frame(long[keys])).to_numpy()
    long["difference"] = long["ours"] - base
    text = [
        MISSING if pd.isna(ours) else f"{ours:.3f}" + ("" if protocol == "greedy" else f" ({difference:+.3f})")
        for ours, protocol, difference in zip(long["ours"], long["protocol"], long["difference"], strict=True)
    ]
    shown = long.assign(text=text)
    for name in ("dataset", "model", "method", "score", "protocol"):
        shown[name] = _as_met(shown[name])
    across = shown.set_index(["dataset", "model", "method", "N", "score", "protocol"])["text"]
    table = across.unstack(["score", "protocol"]).sort_index().sort_index(axis=1).fillna(MISSING)
    title, remark = _title_and_remark("protocol_audit")
    about = f"Protocol audit. {title}. {remark}"
    return _written("protocol_audit", long, [(about, table, missing)], folder)
