"""How methods look, from their own YAML files."""

from typing import ClassVar

from horen_bench.config.schema import LineStyle, MethodConfig
from horen_bench.results.plots.style import method_styles, strokes


class OtherMethod(MethodConfig):
    editor: ClassVar[str] = "elsewhere:Editor"


def test_every_packaged_method_looks_like_no_other() -> None:
    styles = method_styles().styles
    looks = {(style.colour, style.line, style.marker) for style in styles.values()}
    assert len(looks) == len(styles) == len(method_styles().ranks)


def test_legends_follow_the_ranks_with_variants_behind_their_method() -> None:
    labels = ["UnKE", "own", "GRACE", "HoReN, T=3", "GRACE+Norm, equal cosine", "HoReN", "GRACE+Norm", "GRACE"]
    expected = ["HoReN", "HoReN, T=3", "GRACE", "GRACE+Norm", "GRACE+Norm, equal cosine", "UnKE", "own"]
    assert method_styles().in_order(labels) == expected


def test_a_method_of_another_package_brings_its_style_or_is_grey() -> None:
    red = LineStyle(colour="#FF0000", line="long", marker="x", size=5.0)
    own = OtherMethod(name="own", label="Own", style=red, rank=5)
    plain = OtherMethod(name="plain", label="Plain")
    styles = method_styles().joined([own, plain])
    assert strokes(styles.of("Own")) == {
        "color": "#FF0000",
        "linestyle": (0, (5, 1)),
        "marker": "x",
        "markersize": 5.0,
    }
    assert styles.of("Plain").colour == styles.of("no such label").colour == "#7F7F7F"
    assert styles.in_order(["GRACE", "Own", "HoReN"]) == ["HoReN", "Own", "GRACE"]
    assert "Own" not in method_styles().styles
