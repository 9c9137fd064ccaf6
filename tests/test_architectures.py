"""Every architecture of the table in docs/models.md: what holds for each method on it, and that the page says so."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from horen_bench.errors import UserError

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_NAMES: list[str] = list(yaml.safe_load((_BENCHMARKS / "architectures.yaml").read_text())["architectures"])


@pytest.fixture(scope="module")
def architectures() -> Iterator[Any]:
    """The module that makes the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_BENCHMARKS))
        yield import_module("architectures")


@pytest.mark.parametrize("name", _NAMES)
def test_every_law_holds_and_the_page_says_what_happens(name: str, architectures: Any) -> None:
    row, broken = architectures.examine(name)
    assert broken == []
    page = architectures.made_part(architectures.PAGE.read_text(encoding="utf-8")).splitlines()
    assert [line for line in page if line.startswith((f"| {name} |", f"- {name}: "))] == [row.line(), *row.notes()]


def test_an_argument_that_an_architecture_does_not_have_is_refused(architectures: Any) -> None:
    """A soft-cap with a typing error would leave it off, and the row would be one of another model."""
    config = architectures.ARCHITECTURES["Gemma-2"]["config"]
    with pytest.raises(UserError, match="final_logit_softcaping"):
        architectures.random_model({**config, "final_logit_softcaping": 3.0})


@pytest.mark.parametrize("name", _NAMES)
def test_what_a_small_model_says_depends_on_the_whole_prompt(name: str, architectures: Any) -> None:
    """Else padding and positions could be wrong without a row that shows it."""
    model, _ = architectures.random_model(architectures.ARCHITECTURES[name]["config"])
    prompt = torch.tensor([[1, 5, 6, 7, 8, 9]])
    logits = [model(input_ids=ids, use_cache=False).logits[0, -1] for ids in (prompt, *_with_other_tokens(prompt))]
    changes = [float((other - logits[0]).abs().max() / logits[0].std()) for other in logits[1:]]
    assert min(changes) > 1e-2


def _with_other_tokens(prompt: Tensor) -> list[Tensor]:
    """The prompt with another token at each place but the first in turn."""
    places = torch.eye(prompt.shape[1], dtype=torch.long)[1:]
    return [prompt + 100 * place for place in places]
