"""From a part of the configuration to the object that it names."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from horen_bench.errors import UserError

_LABELS = ("name", "label")  # for rows and tables; no constructor takes them


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
