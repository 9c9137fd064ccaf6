"""Scores along the stream: what is drawn of rows, and what is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from horen_bench.results.plots.scale import scale_figure, trajectory_figure

Make = Callable[..., dict[str, Any]]
NOTHING = pd.DataFrame()


def curves(axes: Axes) -> dict[str, list[list[float]]]:
    """Points by label."""
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_method_is_a_curve_through_its_checkpoints_in_order_of_n(finished: Make) -> None:
    rows = [finished(1000, op=0.7), finished(100, op=0.8), finished(100, "GRACE", op=0.3)]
    (axes,) = scale_figure(pd.DataFrame(rows), "op", NOTHING).axes
    assert curves(axes) == {"HoReN": [[100, 0.8], [1000, 0.7]], "GRACE": [[100, 0.3]]}
    assert axes.get_xscale() == "log"


def test_what_was_not_run_is_named_and_never_drawn(finished: Make, absent: Make) -> None:
    failed = absent(100, "ROME", status="failed")
    rows = [finished(100), *(absent(n, method) for method in ("WISE", "REPAIR") for n in (2000, 10_000)), failed]
    figure = scale_figure(pd.DataFrame(rows), "op", NOTHING)
    assert list(curves(figure.axes[0])) == ["HoReN"]
    *_, line = figure.get_suptitle().splitlines()
    assert line == "not run at N = 2,000, 10,000: WISE, REPAIR; failed at N = 100: ROME"


def test_a_score_that_a_row_lacks_is_a_gap_and_not_a_zero(finished: Make) -> None:
    rows = [finished(100), finished(500, gen=np.nan), finished(1000)]
    (points,) = curves(scale_figure(pd.DataFrame(rows), "gen", NOTHING).axes[0]).values()
    assert np.isnan(points[1][1])
    assert 0 not in np.ravel(points)


def test_the_papers_numbers_stand_in_a_panel_of_their_own(finished: Make, published: pd.DataFrame) -> None:
    figure = scale_figure(pd.DataFrame([finished(100, "GRACE"), finished(100)]), "op", published)
    own, paper = figure.axes
    assert list(curves(own)) == ["HoReN", "GRACE"]
    assert curves(paper) == {"HoReN": [[100, 0.97], [1000, 0.97]]}
    assert paper.get_title() == "as published: LLaMA-3.1 8B, ZsRE"
    assert legend(figure) == ["HoReN", "GRACE"]


def test_two_variants_of_a_method_are_two_curves(finished: Make) -> None:
    rows = [finished(100, variant="T=3"), finished(100)]
    assert list(curves(scale_figure(pd.DataFrame(rows), "op", NOTHING).axes[0])) == ["HoReN", "HoReN, T=3"]


def test_the_caption_says_what_the_numbers_are_about(finished: Make) -> None:
    def about(*rows: dict[str, Any]) -> str:
        return scale_figure(pd.DataFrame(rows), "op", NOTHING).get_suptitle().splitlines()[1]

    assert about(finished(100)) == "tiny, Facts, protocol greedy, seed 1, cpu, all N cases evaluated"
    part = about(finished(100), finished(5000, items=2000))
    assert part.endswith(", at larger N 2,000 cases evaluated, a random sample")
    assert about(finished(5000, items=2000)).endswith(", cpu, 2,000 cases evaluated, a random sample")


def test_early_edits_have_their_own_row_of_panels(finished: Make) -> None:
    rows = pd.DataFrame([finished(100), finished(500), finished(1000, rel=0.7)])
    early = pd.DataFrame([finished(500), finished(1000, rel=0.6)])
    axes = trajectory_figure(rows, early, first=500).axes
    assert [panel.get_title() for panel in axes[3:]] == [f"{score}, first 500 edits" for score in ("Rel", "Gen", "Loc")]
    assert curves(axes[0]) == {"HoReN": [[100, 0.9], [500, 0.9], [1000, 0.7]]}
    assert curves(axes[3]) == {"HoReN": [[500, 0.9], [1000, 0.6]]}
    assert {panel.get_xscale() for panel in axes} == {"log"}
