"""One sentence for every fault in a configuration: the setting, what was given, what is allowed, what to write."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

_ALLOWED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "literal_error": "{expected}",
    "list_type": "a list such as [...]",
    "tuple_type": "a list such as [...]",
    "dict_type": "a group of settings",
    "model_type": "a group of settings",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


def of_validation(error: ValidationError, prefix: str, known: Iterable[str]) -> str:
    """The sentence about the first fault that a section refuses.

    Args:
        error: of pydantic.
        prefix: the section's dotted name, "" for the run itself.
        known: dotted names of the settings of the composed configuration, for a hint about a mistyped one.
    """
    fault = _first(error)
    where = ".".join([*filter(None, [prefix]), *(str(part) for part in fault["loc"] if not isinstance(part, int))])
    if fault["type"] == "extra_forbidden":
        return unknown_setting(where, known)
    if fault["type"] == "missing":
        return f"{where} is missing; it has no default, so write {where}=..."
    if fault["type"] == "value_error":
        said = str(fault["ctx"]["error"])
        return f"{where} {said}" if fault["loc"] and not said.startswith(where) else said
    return f"{where} must be {_allowed(fault)}, got {shown(fault['input'])}"


def _first(error: ValidationError) -> ErrorDetails:
    """A mistyped setting before others, since it may be why another one is missing."""
    faults = error.errors()
    return next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])


def _allowed(fault: ErrorDetails) -> str:
    known = _ALLOWED.get(fault["type"])
    if fault["type"] == "string_pattern_mismatch":
        return f"of the form {fault['ctx']['pattern']}"
    if known is None:
        return f"something else ({fault['msg']})"
    return known.format(**fault.get("ctx", {}))


def shown(value: Any) -> str:
    """A value as a command line has it, cut where it is long."""
    plain = {None: "null", True: "true", False: "false"}
    text = plain[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """The sentence about a setting that there is not."""
    near = difflib.get_close_matches(name, [other for other in known if other != name], n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else "python -m horen_bench --help lists them all"
    return f"{name}: there is no such setting; {hint}"


def of_hydra(error: Exception, known: Callable[[], Sequence[str]]) -> str:
    """Hydra's or OmegaConf's message in one line that says what to write.

    Args:
        error: of either.
        known: gives the dotted names of the settings that the chosen parts have.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: there is no such {group}; write one of {', '.join(error.options)}"
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return unknown_setting(unknown[1], known())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: this cannot be read as name=value ({' '.join(str(error).split())})"
    if unknown := re.match(r"Could not delete from config\. '([^']+)'", text):
        return unknown_setting(f"~{unknown[1]}", [f"~{name}" for name in known()])
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return of_hydra(Exception(f"{text} ({error.__cause__})"), known)
    return text.partition(" See https://")[0].partition(" Full config was")[0]


def dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all settings in nested plain values."""
    names: list[str] = []
    for key, value in values.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names += dotted(value, f"{prefix}{key}.")
    return names
