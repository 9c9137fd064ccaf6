"""The page in a real browser without network: what its curves and cases do."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from horen_bench.report import StoredRun, report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox, which root may not use; it opens nothing but the page that the test wrote.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, runs: list[StoredRun], tmp_path: Path) -> Iterator[Page]:
    """The page, opened; at the end it has fetched nothing and complained of nothing."""
    file = tmp_path / "report.html"
    file.write_text(report(runs), encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 800})
    context.set_default_timeout(10_000)  # milliseconds
    opened = context.new_page()
    trouble: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: trouble.append(message.text))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    context.close()
    assert trouble == []
    assert requests == [file.as_uri()]


def drawn(page: Page) -> dict[str, str]:
    """The line of each curve, as its SVG has it."""
    groups = page.locator("#chart g[data-curve]")
    names = groups.evaluate_all("all => all.map(curve => curve.dataset.curve)")
    lines = page.locator("#chart .curve").evaluate_all("all => all.map(line => line.getAttribute('points'))")
    return dict(zip(names, lines, strict=True))


def test_first_sight_is_op_of_every_run_under_one_protocol(page: Page) -> None:
    assert page.locator("#score").input_value() == "op"
    assert list(drawn(page)) == ["GRACE", "HoReN (seed=1)", "HoReN (seed=2)"]
    page.locator("#protocol").select_option("release")
    assert list(drawn(page)) == ["GRACE", "HoReN (seed=1)"]


def test_curves_follow_score_axis_and_methods(page: Page) -> None:
    op = drawn(page)
    page.locator("#score").select_option("gen")
    gen = drawn(page)
    assert list(gen) == list(op)
    assert all(gen[name] != op[name] for name in op)
    page.locator("#axis").select_option("log")
    assert drawn(page) != gen
    page.get_by_label("GRACE", exact=True).uncheck()
    assert "GRACE" not in drawn(page)
    page.get_by_label("GRACE", exact=True).check()
    page.locator("#score").select_option("edits_per_second")
    assert page.locator("#caption").inner_text() == "edits per second: Tiny, Facts, protocol greedy"


def test_a_gap_is_no_point_and_two_dashes_in_the_values(page: Page) -> None:
    page.locator("#score").select_option("loc")
    assert page.locator("#chart g circle").count() == 3
    page.locator("#values summary").click()
    assert page.locator("#values tbody tr").all_inner_texts() == ["30" + "\t1.000 (0.875–1.000)" * 3]


def test_values_appear_under_pointer_and_by_keyboard(page: Page) -> None:
    page.locator("#chart g[data-curve='GRACE'] circle").first.hover(force=True)
    assert page.locator(".tip").inner_text() == "GRACE, N = 10: 0.750 (0.625–0.750), 10 cases"
    page.mouse.move(0, 0)
    assert page.locator(".tip").is_hidden()
    page.locator("#chart").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.locator("#reading").inner_text() == "HoReN (seed=1), N = 30: 0.750 (0.625–0.750), 30 cases"
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()


def test_cases_are_filtered_searched_and_paged(page: Page) -> None:
    def count() -> str:
        return page.locator("#case-count").inner_text()

    assert count() == "90 of the 90 cases on this page (90 are stored)."
    assert page.locator(".case").count() == 20
    assert page.locator("#page-number").inner_text() == "page 1 of 5"
    page.get_by_role("button", name="Next").click()
    assert page.locator("#page-number").inner_text() == "page 2 of 5"

    page.locator("#case-method").select_option("GRACE")
    page.get_by_label("Probes").select_option("Rel")
    page.get_by_label("Outcome").select_option("wrong")
    assert count().startswith("10 of the 90")
    assert page.locator("#page-number").inner_text() == "page 1 of 1"
    page.get_by_label("Router").select_option("matched")
    assert count().startswith("5 of the 90")
    page.get_by_label("Search").fill("TOWN 12")
    assert count().startswith("1 of the 90")
    card = page.locator(".case").inner_text()
    assert "Who founded town 12?" in card
    assert "→ Founder 12" in card
    assert "GRACE; edit 13 of 30, case case-12; inserted, entry 12, 12 steps" in card
    assert page.locator(".case tbody tr").all_inner_texts() == [
        "Rel\tanswer 12\t0.500\t0.000\tentry 12, score 0.970, acted"
    ]
    page.get_by_label("Outcome").select_option("right")
    assert count().startswith("0 of the 90")


def test_every_probe_of_a_family_has_its_prediction(page: Page) -> None:
    page.get_by_label("Probes").select_option("Loc")
    rows = page.locator(".case").first.locator("tbody tr").all_inner_texts()
    assert rows == ["Loc\tblue\t1.000\t1.000\t--", "\tred\t\t\t--"]


def test_hostile_texts_stay_texts(page: Page) -> None:
    assert page.title() == "Sequential knowledge editing: stored runs"
    assert page.locator("img").count() == 0
    assert "</script><script>document.title" in page.locator(".case h3").first.inner_text()


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.locator("select, input, button").evaluate_all(
        "all => all.filter(control => !(control.labels?.length || control.textContent.trim())).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_ground(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ground = colour(page, "--ground")
    for name in ("--ink", "--quiet", "--link", "--warn", "--good", "--bad"):
        assert contrast(colour(page, name), ground) >= 4.5, name
    for i in range(8):
        assert contrast(colour(page, f"--c{i}"), ground) >= 3, i


def colour(page: Page, name: str) -> str:
    value: str = page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", name)
    return value.strip()


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2 of two `#rrggbb` colours, 1 to 21."""

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_narrow_page_does_not_scroll_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.wait_for_function("document.querySelector('#chart svg').viewBox.baseVal.width < 360")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
