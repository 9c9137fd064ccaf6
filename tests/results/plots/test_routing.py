"""The figures about routing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from horen_bench.results.plots.routing import (
    cost_figure,
    distribution_of,
    hopfield_figure,
    ladder_figure,
    pooling_figure,
    routed_of,
)
from horen_bench.results.plots.style import save

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def scores() -> pd.DataFrame:
    """Two methods, three prompts each; one method measures distances."""
    about = {"HoReN": {"stage": "T = 1", "measure": "cosine", "threshold": 0.8}}
    about |= {"GRACE": {"stage": "last token", "measure": "distance", "threshold": 1.0}}
    prompts = [
        ("GRACE", "paraphrase", 0.5, True),
        ("GRACE", "paraphrase", 3.0, False),
        ("GRACE", "unrelated", 9.0, False),
        ("HoReN", "paraphrase", 0.9, True),
        ("HoReN", "paraphrase", 0.7, False),
        ("HoReN", "unrelated", 0.1, False),
    ]
    columns = ("method_label", "kind", "score", "routed")
    return pd.DataFrame([dict(zip(columns, prompt, strict=True)) | about[prompt[0]] for prompt in prompts])


def test_a_distribution_gives_the_share_of_a_kinds_prompts_per_bin(scores: pd.DataFrame) -> None:
    bins = distribution_of(scores)
    assert bins.groupby(["method_label", "kind"])["share"].sum().tolist() == [1.0] * 4
    near = bins[(bins["method_label"] == "GRACE") & (bins["kind"] == "paraphrase") & (bins["share"] > 0)]
    assert near["share"].tolist() == [0.5, 0.5]
    assert (near["left"] <= [0.5, 3.0]).all()
    assert (near["right"] >= [0.5, 3.0]).all()
    of_horen = bins[bins["method_label"] == "HoReN"]
    assert (of_horen["left"].min(), of_horen["right"].max()) == (0.1, 0.9), "from the least score to the greatest"


def test_routed_shares_are_counted_by_method_and_kind(scores: pd.DataFrame) -> None:
    shares = routed_of(scores).set_index(["method_label", "kind"])
    assert shares["routed"].to_dict() == {
        ("GRACE", "paraphrase"): 0.5,
        ("GRACE", "unrelated"): 0.0,
        ("HoReN", "paraphrase"): 0.5,
        ("HoReN", "unrelated"): 0.0,
    }
    assert shares["prompts"].tolist() == [2, 1, 2, 1]


def test_the_ladder_has_a_bar_per_method_and_score_and_the_papers_beside_it(
    scores: pd.DataFrame, finished: Make, absent: Make, published: pd.DataFrame
) -> None:
    rows = pd.DataFrame([finished(100, "GRACE", gen=0.2), absent(100, "GRACE+Norm"), finished(100)])
    paper = published[published["n"] == 100]
    figure = ladder_figure(rows, distribution_of(scores), routed_of(scores), paper)
    bars, raw, refined = figure.axes
    heights = [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    assert heights == [0.9, 0.2, 1.0, 0.9, 0.8, 1.0], "no bar where there is no row"
    (diamonds,) = [line for line in bars.lines if line.get_marker() == "D"]
    assert np.asarray(diamonds.get_ydata()).tolist() == [1.0, 0.9, 1.0]
    assert "not run at N = 100: GRACE+Norm" in figure.get_suptitle()
    assert (raw.get_xlabel(), refined.get_xlabel()) == ("Euclidean distance", "cosine")
    assert raw.get_title() == "GRACE\nlast token\n50.0% | 0.0%"
    thresholds = [np.asarray(axes.lines[0].get_xdata()).tolist() for axes in (raw, refined)]
    assert thresholds == [[1.0, 1.0], [0.8, 0.8]]


def test_cost_is_drawn_on_two_logarithmic_axes() -> None:
    facts = {"key_size": 512, "dtype": "float32", "seed": 1, "device": "cpu", "threads": 1, "model_label": "tiny"}
    rows = [
        {"method_label": method, "rule": rule, "entries": size, "ms": ms, "ms_low": ms, "ms_high": ms, **facts}
        for method, rule in (("GRACE", "Euclidean distance"), ("HoReN", "Hopfield, T = 1"))
        for size, ms in ((100, 0.1), (1000, 1.0))
    ]
    (axes,) = cost_figure(pd.DataFrame(rows)).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [line.get_label() for line in axes.lines] == ["GRACE, Euclidean distance", "HoReN, Hopfield, T = 1"]
    assert np.asarray(axes.lines[1].get_ydata()).tolist() == [0.1, 1.0]


def test_steps_are_swept_with_a_curve_per_damping(finished: Make, absent: Make) -> None:
    rows = [finished(500, gen=0.1 * steps, steps=steps, alpha=alpha) for alpha in (0.5, 0.1) for steps in (2, 0, 1)]
    rows.append(absent(500, steps=5, alpha=0.1))
    figure = hopfield_figure(pd.DataFrame(rows))
    gen = next(axes for axes in figure.axes if axes.get_title() == "Gen")
    assert [line.get_label() for line in gen.lines] == ["α = 0.1", "α = 0.5"]
    assert np.asarray(gen.lines[0].get_data()).tolist() == [[0, 1, 2], [0.0, 0.1, 0.2]]
    assert [axes.get_title() for axes in figure.axes] == ["Rel", "Gen", "Loc", "OP"], "a panel per score that is there"
    assert "N = 500" in figure.get_suptitle()


def test_pooling_is_swept_with_a_curve_per_n_and_the_models_ratio_marked(finished: Make) -> None:
    rows = [finished(n, pooling_ratio=ratio) for n in (100, 1000) for ratio in (0.2, 1.0)]
    figure = pooling_figure(pd.DataFrame(rows), usual=0.6)
    *curves, mark = figure.axes[0].lines
    assert [line.get_label() for line in curves] == ["N = 100", "N = 1,000"]
    assert np.asarray(mark.get_xdata()).tolist() == [0.6, 0.6]


def test_files_are_the_same_for_the_same_rows_and_hold_no_date(
    tmp_path: Path, scores: pd.DataFrame, finished: Make
) -> None:
    rows = pd.DataFrame([finished(100, "GRACE"), finished(100)])
    written: list[list[bytes]] = []
    for folder in ("a", "b"):
        figure = ladder_figure(rows, distribution_of(scores), routed_of(scores), pd.DataFrame())
        paths = save(figure, {"": rows, "_routed": routed_of(scores)}, tmp_path / folder / "figure4")
        written.append([path.read_bytes() for path in paths])
    assert [path.name for path in paths] == ["figure4.svg", "figure4.png", "figure4.csv", "figure4_routed.csv"]
    assert written[0] == written[1]
    assert b"<dc:date>" not in written[0][0]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a" / "figure4_routed.csv"), routed_of(scores))
