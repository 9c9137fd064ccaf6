"""The house keeps its shape: an import never goes up a floor or round in a circle, and methods do not know each other.

`docs/architecture.md` draws it.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "horen_bench"

# Ground first. A module may import from its own floor and those below; a deeper name counts before its room's.
FLOORS = (
    {
        "cases",
        "errors",
        "interruption",
        "paths",
        "profiling",
        "progress",
        "metrics",
        "results.atomic",
        "results.columns",
    },
    {"config", "prompts", "models", "metrics.similarity", "results.store"},
    {"datasets", "world", "editors"},
    {"evaluation"},
    {"runner", "stream"},
    {"paper", "report", "results", "tracking"},
    {"__main__", "command_line"},
)
SHARED = {"base", "shared", "codebook", "locate_edit"}  # of the editors
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Dotted names below `horen_bench` that a file imports, modules where they are modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith("horen_bench."):
            base = node.module.removeprefix("horen_bench").lstrip(".")
            names |= {_module(f"{base}.{alias.name}".lstrip("."), base) for alias in node.names}
    return names - {""}


def _module(name: str, base: str) -> str:
    """`name` where it is a module, else the module that it is taken from."""
    path = PACKAGE.joinpath(*name.split("."))
    return name if path.with_suffix(".py").exists() or path.is_dir() else base


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def floor(name: str) -> int:
    parts = name.split(".")
    candidates = [".".join(parts[:2]), parts[0]]
    return next(i for candidate in candidates for i, rooms in enumerate(FLOORS) if candidate in rooms)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_an_import_never_goes_up(path: Path) -> None:
    higher = {name for name in imported(path) if floor(name) > floor(dotted(path))}
    assert higher == set()


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {dotted(path): imported(path) - {dotted(path)} for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_room_imports_a_room_that_imports_it() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        room = _room(dotted(path))
        graph.setdefault(room, set()).update({_room(name) for name in imported(path)} - {room})
    TopologicalSorter(graph).prepare()


def _room(name: str) -> str:
    """The folder of the first level, but that a lower part of `results` is a room of its own."""
    two = ".".join(name.split(".")[:2])
    return two if any(two in rooms for rooms in FLOORS) else name.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("path", [path for path in MODULES if "editors" in path.parts], ids=dotted)
def test_editors_know_neither_data_nor_scores(path: Path) -> None:
    forbidden = {"datasets", "evaluation", "metrics", "tracking", "world", "runner", "stream"}
    names = imported(path)
    assert {name for name in names if name.split(".")[0] in forbidden} == set()
    assert {name for name in names if name.startswith("results") and name != "results.atomic"} == set()


def test_methods_import_the_contract_their_family_and_what_is_shared_and_never_each_other() -> None:
    editors = [path for path in MODULES if "editors" in path.parts]
    pairs = {
        (dotted(path).split(".")[1], name.split(".")[1])
        for path in editors
        for name in imported(path)
        if name.startswith("editors.") and dotted(path) != "editors"
    }
    assert {(own, other) for own, other in pairs if other not in SHARED | {own}} == set()


def method_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in MODULES if "editors" not in path.parts], ids=dotted)
def test_nothing_outside_the_editors_names_a_method(path: Path) -> None:
    """Texts of code, that is: not in docstrings and comments, and apart from the names of datasets and of metrics."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    docstrings |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    names = set(method_names()) - {"unke"}  # a dataset as well
    assert [text for text in texts if text in names] == []
    of_methods = [name for name in imported(path) if re.match(r"editors\.(?!base$)", name)]
    assert of_methods == [] or "paper" in path.parts


def test_the_drawing_shows_the_floors_that_the_test_holds() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for rooms in FLOORS:
        for room in rooms:
            assert f"`{room}`" in page, room
