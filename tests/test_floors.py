"""The house keeps its shape: an import never goes up a floor, and methods do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "horen_bench"

# Ground first. A module may import from its own floor and those below.
FLOORS = (
    {"atomic", "cases", "errors", "measurement", "metrics", "prompts", "resources", "score_names", "world"},
    {"configuration", "models", "store"},
    {"datasets", "figures", "paper_tables", "report", "tables", "tracking"},
    {"editors", "evaluation"},
    {"rows", "settings"},
    {"exams"},
    {"stream"},
    {"analyses", "experiments"},
    {"draw"},
    {"__main__"},
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Dotted names below `horen_bench` that a file imports."""
    names = [
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("horen_bench.")
    ]
    return {name.removeprefix("horen_bench.") for name in names}


def floor(name: str) -> int:
    room = name.split(".", maxsplit=1)[0]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_an_import_never_goes_up(path: Path) -> None:
    higher = {name for name in imported(path) if floor(name) > floor(dotted(path))}
    assert higher == set()


@pytest.mark.parametrize("path", [path for path in MODULES if "editors" in path.parts], ids=dotted)
def test_editors_know_neither_data_nor_scores(path: Path) -> None:
    forbidden = {"datasets", "evaluation", "metrics", "store", "tables", "figures", "tracking"}
    assert {name for name in imported(path) if name.split(".")[0] in forbidden} == set()


def test_methods_do_not_import_each_other() -> None:
    """Shared things live in `base`, `memory` and `rewriting`; REPAIR extends WISE."""
    shared, allowed = {"base", "memory", "rewriting"}, {("repair", "wise")}
    editors = [path for path in MODULES if "editors" in path.parts]
    found = {
        (dotted(path).split(".")[1], name.split(".")[1])
        for path in editors
        for name in imported(path)
        if name.startswith("editors.")
    }
    strangers = {(own, other) for own, other in found if other not in shared | {own}} - allowed
    assert {pair for pair in strangers if pair[0] != "__init__"} == set()


def test_what_is_made_of_rows_knows_the_store_alone() -> None:
    """Each from its own room, from the ground and the store; the report and the paper's tables also from the tables."""
    rooms, below = (
        {"tables", "paper_tables", "figures", "report", "tracking"},
        {"atomic", "errors", "resources", "score_names", "store"},
    )
    for path in MODULES:
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in rooms:
            allowed = {room} | below | ({"tables"} if room in ("paper_tables", "report") else set())
            assert {name.split(".")[0] for name in imported(path)} <= allowed, dotted(path)
