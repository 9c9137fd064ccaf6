"""Dataset files: written for one test, or real records where they are at hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as a JSON file and gives its path."""

    def write(records: Any, name: str = "records.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def refusal() -> Callable[[Callable[[], object]], str]:
    """The whole sentence with which something is refused."""

    def sentence(act: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            act()
        return str(caught.value)

    return sentence


@pytest.fixture(scope="session")
def real_records() -> Path:
    """Records that are not ours to redistribute."""
    folder = Path(__file__).parents[2] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("the published records that are not ours to redistribute are not here")
    return folder
