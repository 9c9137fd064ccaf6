"""The page: tables written out in HTML, everything else drawn by its own script from embedded values."""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template

import pandas as pd

from horen_bench.report.contents import MOST_CHARACTERS, contents
from horen_bench.report.runs import StoredRun, variants
from horen_bench.results.columns import MAIN, TEXT, printed, text_family
from horen_bench.results.console import MISSING, notes, score_columns

MOST_BYTES = 3_000_000
_CASES = (200, 100, 50, 20, 10, 5, 2, 1, 0)  # per run and protocol; the most that keep the page below MOST_BYTES


def report(runs: Sequence[StoredRun]) -> str:
    """The page about some runs; the same runs give the same page.

    Args:
        runs: at least one; shown by model, dataset and method, a method's variants behind the method itself.
    """
    named = sorted(zip(runs, variants(runs), strict=True), key=_place)
    tables, remarks = "\n".join(_tables(named)), "\n".join(_remarks(named)) or "<li>There are none.</li>"
    for most_cases in _CASES:
        page = _page(tables, remarks, named, most_cases)
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _page(tables: str, remarks: str, runs: Sequence[tuple[StoredRun, str]], most_cases: int) -> str:
    values = contents(runs, most_cases)
    data = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_part("page.html")).substitute(
        style=_part("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=data.replace("<", "\\u003c"),  # the values are anyone's texts: none of them ends the element
        tables=tables,
        remarks=remarks,
        n_runs=len(runs),
        most_cases=most_cases,
        most_characters=MOST_CHARACTERS,
    )


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


# --- Tables --------------------------------------------------------------------------------------------


def _tables(runs: Sequence[tuple[StoredRun, str]]) -> Iterator[str]:
    """A heading and a table for each dataset and protocol."""
    rows = pd.concat([_labelled(run, variant) for run, variant in runs if len(run.rows)] or [pd.DataFrame()])
    if rows.empty:
        yield "<p>No run has reached a checkpoint yet.</p>"
        return
    for (dataset, protocol), part in rows.groupby(["Dataset", "protocol"], sort=True):
        table = _table(part.sort_values(["Model", "n", "Method", "Variant"], kind="stable"))
        title = escape(f"{dataset}, protocol {protocol}")
        yield f"<h3>{title}</h3>"
        yield f'<div class="wide" tabindex="0" role="region" aria-label="{title}">'
        yield _html(table) + "</div>"


def _place(named: tuple[StoredRun, str]) -> tuple[str, ...]:
    run, variant = named
    return (*(run.label(part) for part in ("model", "dataset", "method")), variant)


def _labelled(run: StoredRun, variant: str) -> pd.DataFrame:
    labels = {part.capitalize(): run.label(part) for part in ("dataset", "model", "method")}
    return pd.concat([pd.DataFrame({**labels, "Variant": variant}, index=run.rows.index), run.rows], axis=1)


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as they are printed; a score that no row has is no column, and of text scores those of the paper are."""
    scores = [name for name in score_columns(rows) if rows[name].notna().any()]
    further = [name for name in scores if name not in MAIN and (name in TEXT or not text_family(name))]
    order = [*(name for name in MAIN if name in scores), *further]
    plain = {"Model": rows["Model"], "Method": rows["Method"]}
    if rows["Variant"].any():
        plain["Variant"] = rows["Variant"]
    return pd.DataFrame(
        {
            **plain,
            "N": rows["n"],
            "Seed": rows["seed"],
            "Items": rows["items"],
            **{printed(name): [_score(row, name) for _, row in rows.iterrows()] for name in order},
            "ms/edit": (1000 * rows["edit_seconds"] / rows["n"]).map(_one_digit),
            "eval s": rows["eval_seconds"].map(_one_digit),
        }
    )


def _html(table: pd.DataFrame) -> str:
    """The table as HTML; what follows a line break in a cell is set small below it."""
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in table.columns)
    lines = [f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>']
    for row in table.itertuples(index=False, name=None):
        cells = (escape(str(cell)).partition("\n") for cell in row)
        lines.append("<tr>" + "".join(f"<td>{top}{_small(below)}</td>" for top, _, below in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _small(text: str) -> str:
    return f"<br><small>{text}</small>" if text else ""


def _score(row: "pd.Series[float]", name: str) -> str:
    """The value and, in a line below, its interval."""
    if pd.isna(row[name]):
        return MISSING
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + ("" if pd.isna(low) else f"\n{low:.3f}–{high:.3f}")


def _one_digit(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.1f}"


def _remarks(runs: Sequence[tuple[StoredRun, str]]) -> Iterator[str]:
    """What a reader of the numbers must know, run by run."""
    for run, variant in runs:
        known = f"{run.label('method')} on {run.label('model')}, {run.label('dataset')}" if run.config else run.name
        name = known + (variant and f" ({variant})")
        if run.damage:
            yield f"<li>{escape(run.damage)}</li>"
            continue
        if run.failure:
            yield f"<li>{escape(f'{name}: the last attempt failed: {run.failure}')}</li>"
        elif run.rows.empty:
            yield f"<li>{escape(name)}: no checkpoint is stored.</li>"
        for protocol, rows in run.rows.groupby("protocol", sort=False):
            for note in notes(rows):
                yield f"<li>{escape(f'{name}, {protocol}: {note}')}</li>"
