"""The paper's tables, ours beside the published numbers: pure functions of the rows that a grid collected.

Every table is first a long frame, one row per cell, N, protocol and score; it is written as it is (CSV) and laid out as
in the paper (Markdown, LaTeX), one table per protocol, so that numbers of two protocols never stand side by side.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.results.atomic import write_text
from horen_bench.results.columns import MAIN, TEXT, TEXT_FAMILIES, TEXT_METRICS
from horen_bench.results.console import MISSING, notes, score_columns

_SCORES = {name: f"{head} ↑" for name, head in MAIN.items()}
_COST = {
    "edit_ms": "Edit, ms ↓",
    "inference_ms": "Question, ms ↓",
    "inference_base_ms": "Question unedited, ms",
    "side_keys": "Keys, M ↓",
    "side_values": "Values, M ↓",
    "side_modified": "Modified, M ↓",
}
_TEXT = {name: f"{head} ↑" for name, head in TEXT.items()}
# What the paper calls BERTScore is, in the release, the cosine of two MiniLM embeddings.
_TEXT_METRICS = {head: metric for metric, head in TEXT_METRICS.items()} | {"BERTScore": "minilm_cosine"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table is laid out.

    Attributes:
        title: what it shows.
        metrics: columns of the rows, and their heads with an arrow towards better.
        down: long-frame columns that tell its lines apart.
        across: those that tell its columns apart.
        unedited: whether the unedited model's scores stand there as well.
        remark: what its reader must know.
    """

    title: str
    metrics: Mapping[str, str] = field(default_factory=lambda: _SCORES)
    down: tuple[str, ...] = ("dataset", "model", "method")
    across: tuple[str, ...] = ("N", "score")
    unedited: bool = False
    remark: str = ""


_COLUMNS_INFERRED = "The paper's column heads are lost; its N are inferred."
_STANDS_IN = "Facts, made up for the embedded model, stand in for WikiBigEdit."
LAYOUTS = {
    "table1": Layout("ZsRE, six methods", remark=_COLUMNS_INFERRED),
    "table2": Layout("ZsRE, memory editors on long streams", remark=_COLUMNS_INFERRED),
    "table4": Layout("ZsRE, five methods on long streams", remark=_COLUMNS_INFERRED),
    "table5": Layout(
        "Cost of an edit and of a question, and what is stored beside the model",
        _COST,
        down=("dataset", "model", "method", "N"),
        across=("score",),
        remark="Memory in millions of numbers; Modified counts copies of the trained weights and what goes with them. "
        "A question is decoded alone, up to 8 tokens; 20 questions are averaged. The paper's memory columns are lost.",
    ),
    "table6": Layout(
        "WikiBigEdit",
        {name: _SCORES[name] for name in ("rel", "gen", "loc")},
        remark=f"{_STANDS_IN} The paper names no backbone.",
    ),
    "table7": Layout(
        "UnKE, answers of a paragraph",
        _TEXT,
        down=("dataset", "model", "score"),
        across=("N", "method"),
        unedited=True,
        remark="Passages, made up for the embedded model, stand in for UnKE. The paper's three N are lost: its columns "
        "are set beside ours in their order. It names no backbone. Its BERTScore is the release's cosine of MiniLM "
        "embeddings and stands beside ours; nothing is published of BERTScore proper.",
    ),
    "table8": Layout(
        "REPAIR beside the others",
        {name: _SCORES[name] for name in ("rel", "gen")},
        remark=f"{_STANDS_IN} The paper quotes GRACE, WISE and REPAIR from REPAIR's own table.",
    ),
    "table9": Layout(
        "From GRACE to HoReN",
        remark="GRACE+Norm keeps GRACE's radius on the sphere; with an equal cosine, all entries match at HoReN's "
        "threshold. The paper says which of the two it did nowhere.",
    ),
    "table10": Layout("HoReN with and without normalisation", remark=_COLUMNS_INFERRED),
    "table11": Layout("What an entry of HoReN holds", remark=_COLUMNS_INFERRED),
}

_KEYS = ("dataset", "model", "method", "N", "metric")  # what makes a number of ours and one of the paper the same
_LINES = ("ours", "95 %", "unedited", "paper", "difference")


# --- The long frame ----------------------------------------------------------------------------------------


def published(table: str) -> pd.DataFrame:
    """The paper's numbers as text, one row per score, with those of `dataset`, `model`, `method`, `N` that it names."""
    wide = pd.read_csv(resource("baselines") / "paper" / f"{table}.csv", dtype=str)
    wide = wide.rename(columns={"n": "N"})
    if table == "table7":
        families = {head: family for family, head in TEXT_FAMILIES.items()}
        wide["metric"] = wide["split"].map(families) + "_" + wide["metric"].map(_TEXT_METRICS)
        return wide.rename(columns={"value": "paper"}).drop(columns="split")
    names = [name for name in ("dataset", "model", "method", "N") if name in wide]
    return wide.melt(names, var_name="metric", value_name="paper")


def compared(rows: pd.DataFrame, paper: pd.DataFrame, metrics: Mapping[str, str]) -> pd.DataFrame:
    """One row per cell, N, protocol and score: ours, its interval, the unedited model's, the paper's, ours minus that.

    Args:
        rows: what `experiments.collect` gives.
        paper: what `published` gives.
        metrics: columns of the rows, and their heads.

    Raises:
        UserError: two rows are about the same, or two that are compared are about other cases.
    """
    _refuse_duplicates(rows)
    _refuse_other_cases(rows)
    rows = _with_costs(rows)
    long = pd.DataFrame([_number(row, name, head) for row in rows.to_dict("records") for name, head in metrics.items()])
    paper = _in_order(paper, long)
    shared = [name for name in _KEYS if name in paper]
    ours_key, paper_key = _key(long, shared), _key(paper, shared)
    found = dict(zip(paper_key, paper["paper"], strict=True))
    long["paper"] = [found.get(key) for key in ours_key]
    long["difference"] = long["ours"] - pd.to_numeric(long["paper"])
    return long


def _number(row: Mapping[Any, Any], name: str, head: str) -> dict[str, Any]:
    own = ("dataset", "model")
    return {
        **{part: row[f"{part}_label"] for part in own},
        "method": row["variant"] or row["method_label"],
        "N": row["n"],
        "protocol": row["protocol"],
        "metric": name,
        "score": head,
        "ours": row.get(name, float("nan")),
        "low": row.get(f"{name}_low", float("nan")),
        "high": row.get(f"{name}_high", float("nan")),
        "unedited": row.get(f"{name}_base", float("nan")),
        "seed": row["seed"],
        "items": row.get(f"{name}_items", row.get("items", float("nan"))),
        **{part: row[part] for part in ("status", "reason", "command", "run_dir")},
    }


def _with_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """With milliseconds per edit, and side memory in millions."""
    rows = rows.copy()
    if "edit_seconds" in rows:
        rows["edit_ms"] = 1000 * rows["edit_seconds"] / rows["n"]
    for name in ("side_keys", "side_values", "side_modified"):
        if name in rows:
            rows[name] = rows[name] / 1e6
    return rows


def _in_order(paper: pd.DataFrame, long: pd.DataFrame) -> pd.DataFrame:
    """The paper's numbers with our N for those columns of it whose N are lost."""
    if "n_column" not in paper:
        return paper
    same = long[long["dataset"].map(_plain) == _plain(paper["dataset"].iloc[0])]
    ours = dict(zip(sorted(paper["n_column"].unique()), sorted(same["N"].unique()), strict=False))
    return paper.assign(N=paper["n_column"].map(ours)).drop(columns="n_column")


def _key(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names without capitals and punctuation, which the paper does not always write the same way."""
    columns = [frame[name].map(_plain if name != "metric" else str) for name in names]
    return list(zip(*columns, strict=True))


def _plain(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _refuse_duplicates(rows: pd.DataFrame) -> None:
    names = ["model_label", "method_label", "dataset_label", "variant", "n", "protocol"]
    twice = rows[rows.duplicated(names, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        where = twice[(twice[names] == first[names]).all(axis=1)]["run_dir"]
        raise UserError(
            f"{first['model_label']}, {first['method_label']}, {first['dataset_label']} has {len(where)} rows at "
            f"N={first['n']} under protocol {first['protocol']} ({', '.join(where)}); a table shows one of them: "
            "choose it by its settings"
        )


def _refuse_other_cases(rows: pd.DataFrame) -> None:
    """Rows of one dataset and N must be about the same cases, or their difference says nothing about the methods."""
    if "cases" not in rows:
        return
    stored = rows.dropna(subset="cases")
    for (dataset, n), part in stored.groupby(["dataset", "n"]):
        if part["cases"].nunique() > 1:
            places = part.drop_duplicates("cases")["run_dir"].tolist()
            raise UserError(
                f"the rows of {dataset} at N={n} are about different cases ({', '.join(places)}; the data changed "
                "between the runs); run one of them again with force=true"
            )


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
    told = table.notna().any(axis=1) | (table.index.get_level_values("line") == "ours")
    return table[told].fillna(MISSING)


def _three(value: float) -> str | None:
    return None if pd.isna(value) else f"{value:.3f}"


def _interval(low: float, high: float) -> str | None:
    return None if pd.isna(low) else f"{low:.2f}-{high:.2f}"


def caption(name: str, long: pd.DataFrame) -> str:
    """What a table shows and how it was measured."""
    layout, there = LAYOUTS[name], long[long["status"] == "finished"]
    items = ", ".join(f"{int(part['items'].max()):,} at N = {n:,}" for n, part in there.groupby("N"))
    asked = f"cases questioned: {items}; seed {_listed(there['seed'])}" if len(there) else "nothing of ours yet"
    below = "its 95 % bootstrap interval over cases, " if there["low"].notna().any() else ""
    below += "the unedited model's, " if layout.unedited else ""
    return (
        f"Table {name.removeprefix('table')}. {layout.title}. Protocol {long['protocol'].iloc[0]}; {asked}. Below a "
        f"number of ours {below}the paper's, and ours minus the paper's; {MISSING} is missing. {layout.remark}"
    ).strip()


def _listed(values: "pd.Series[int]") -> str:
    return ", ".join(str(value) for value in sorted(values.unique()))


def absences(long: pd.DataFrame) -> list[str]:
    """One sentence for each reason why numbers are missing, with the command that fills them."""
    absent = long[long["status"] != "finished"]
    found = []
    for (model, status, reason, command), part in absent.groupby(
        ["model", "status", "reason", "command"], sort=False, dropna=False
    ):
        methods = ", ".join(part["method"].unique())
        counts = ", ".join(f"{n:,}" for n in sorted(part["N"].unique()))
        found.append(f"{model}, {methods}, N = {counts}: {status}: {reason}; `{command}`")
    return found


def remarks(rows: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """What the finished runs have to say: coverage of the scores shown, failed edits, warnings.

    Args:
        rows: of one protocol, as `experiments.collect` gives them.
        metrics: columns that are shown.
    """
    there = rows[rows["status"] == "finished"].astype({"items": int, "failed_edits": int})  # no gaps among these
    hidden = [f"{name}_low" for name in score_columns(there) if name not in set(metrics)]
    runs = there.drop(columns=hidden).groupby(["model_label", "method_label", "dataset_label", "variant"], sort=False)
    return [f"{', '.join(filter(None, map(str, run)))}: {note}" for run, of_run in runs for note in notes(of_run)]


# --- Files -------------------------------------------------------------------------------------------------


def write_table(name: str, rows: pd.DataFrame, folder: Path) -> str:
    """Write a table as CSV, Markdown and LaTeX; the Markdown.

    Args:
        name: e.g. `table1`.
        rows: what `experiments.collect` gives.
        folder: where to.
    """
    layout = LAYOUTS[name]
    long = compared(rows, published(name), layout.metrics)
    parts = [part for _, part in long.groupby("protocol", sort=False)]
    tables = []
    for part in parts:
        same = rows[rows["protocol"] == part["protocol"].iloc[0]]
        said = [*absences(part), *remarks(same, layout.metrics)]
        tables.append((caption(name, part), laid_out(part, layout), said))
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
    flat.loc[again, keys] = ""  # said once, over its lines
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
    said = f"{text:,}" if isinstance(text, int) else str(text)
    for sign, latex in {"%": r"\%", "_": r"\_", "&": r"\&", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}.items():
        said = said.replace(sign, latex)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", said)


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
        {"model": one["model"], "score": head, "ours": f"{one[name]:.6g}", "paper": _of_backbone(paper, one, name)}
        for one in settings.to_dict("records")
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
    text = "Table 3. HoReN's threshold and the share of prompt tokens that make the query, as in conf/model."
    return _written("table3", long, [(text, table, [])], folder)


def _of_backbone(paper: pd.DataFrame, backbone: Mapping[Any, Any], name: str) -> str | None:
    """The paper's value, which has the hub's names."""
    same = [_plain(backbone["hub_id"]).endswith(_plain(model)) for model in paper["model"]]
    return str(paper.loc[same, name].item()) if any(same) else None


def _as_met(values: "pd.Series[Any]") -> pd.Categorical:
    """Values that sort in the order of their first appearance."""
    return pd.Categorical(values, categories=list(values.unique()), ordered=True)


def write_audit(rows: pd.DataFrame, folder: Path) -> str:
    """The same edits under three protocols: each score, and how far the other two are from `greedy`."""
    nothing = pd.DataFrame(columns=["dataset", "metric", "paper"])
    long = compared(rows, nothing, _SCORES).drop(columns=["unedited", "paper"])
    missing = absences(long)
    run = long[long["status"] == "finished"]["model"].unique()
    long = long[long["model"].isin(run)].copy()  # whole backbones that were not run are in the notes alone
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
    about = (
        "Protocol audit. The same edits questioned in three ways; in brackets the distance from `greedy`. The release "
        "generates freely for HoReN and GRACE, and gives the answer to the others (`teacher_forced`)."
    )
    return _written("protocol_audit", long, [(about, table, missing)], folder)
