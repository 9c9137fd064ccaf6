"""Configurations that several tests of editors share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from horen_bench.editors.wise.config import RepairConfig, WiseConfig

_SETTINGS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("side_memory.yaml").read_text())
_NAMED = {"name": "test", "label": "Test", "module": "model.layers.2.mlp.down_proj"}


@pytest.fixture(scope="session")
def wise_config() -> Callable[..., WiseConfig]:
    """Gives the settings of WISE in tests, but for the changes."""
    return lambda **changes: WiseConfig.model_validate({**_NAMED, **_SETTINGS["side"], **changes})


@pytest.fixture(scope="session")
def repair_config() -> Callable[..., RepairConfig]:
    """Gives the settings of REPAIR in tests, but for the changes, those of its side memory first."""

    def config(side: Mapping[str, Any], **changes: Any) -> RepairConfig:
        side = {**_SETTINGS["side"], **side}
        return RepairConfig.model_validate({**_NAMED, **_SETTINGS["repair"], "side": side, **changes})

    return config
