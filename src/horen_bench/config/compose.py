"""Between Hydra and the program: composed settings, the objects that they name, and Hydra's errors in plain words."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig

from horen_bench.errors import UserError
from horen_bench.paths import resource

_LABELS = ("name", "label", "protocol")  # for rows and tables, and the run's own; no constructor takes them


def build(part: Mapping[str, Any], what: str, **more: Any) -> Any:
    """Build the object that `_target_` names from the other settings.

    Args:
        part: plain values of a method, dataset or tracker.
        what: the part's group, for the message.
        more: further arguments.

    Raises:
        UserError: the constructor refuses the settings.
    """
    settings = {key: value for key, value in part.items() if key not in _LABELS}
    try:
        return instantiate(settings, **more, _recursive_=False, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what}={part.get('name', part['_target_'])} cannot be built: {reason}") from error


def composed(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of `conf/` under overrides as a command line has them.

    Raises:
        HydraException: an override names nothing; `plain_words` says it better.
    """
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return compose("config", list(overrides))


def plain_words(error: Exception) -> str:
    """Hydra's or OmegaConf's message in one line that says what to write."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: there is no such {group}; write one of {', '.join(error.options)}"
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown is None:
        return text
    near = difflib.get_close_matches(unknown[1], _dotted(composed()), n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else "python -m horen_bench --help lists them all"
    return f"{unknown[1]}: there is no such setting; {hint}"


def _dotted(config: DictConfig) -> list[str]:
    names: list[str] = []
    for key, value in config.items_ex(resolve=False):
        nested = _dotted(value) if isinstance(value, DictConfig) else []
        names += [str(key), *(f"{key!s}.{name}" for name in nested)]
    return names
