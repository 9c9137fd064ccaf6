"""The settings in words, read from their fields: `--help`, and `docs/settings.md`.

python -m horen_bench.config.help > docs/settings.md
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from horen_bench.config.compose import composed
from horen_bench.config.schema import ModelConfig, RunConfig, Section, TextSettings, imported
from horen_bench.paths import resource

GROUPS = ("model", "method", "dataset", "tracker", "compat", "experiment")
_EXAMPLES = """\
python -m horen_bench                                          the embedded model and facts, HoReN
python -m horen_bench model=qwen25_7b method=horen n=3000      any choice, any N
python -m horen_bench n=1000 checkpoints=[100,500,1000]        where to evaluate the model
python -m horen_bench method.threshold=0.7                     any setting below
python -m horen_bench -m method=horen n=100,1000               a sweep; runs of one stream share their edits
python -m horen_bench compat=release protocol=release          the published code, defects included
python -m horen_bench tracker=wandb                            with curves on Weights & Biases"""
_PARTS = ("model", "method", "dataset", "tracker", "text")  # of a run; each has a table of its own
_LABELS = ("name", "label", "style", "rank", "ms_per_edit")


def help_text(overrides: Sequence[str]) -> str:
    """What `--help` prints: choices, and the settings of a run and of the chosen method.

    Args:
        overrides: of the command line; `method=wise --help` shows WISE's settings.
    """
    try:
        config = composed([override for override in overrides if override.partition("=")[0] in GROUPS])
    except (HydraException, OmegaConfBaseException, ValueError):
        config = composed()
    values: Any = OmegaConf.to_container(config)
    method = imported(str(values["method"]["_target_"]))
    choices = "\n".join(f"  {group}: {', '.join(choices_of(group))}" for group in GROUPS)
    return "\n".join(
        [
            "horen_bench - sequential knowledge editing of language models, measured\n",
            *(f"  {line}" for line in _EXAMPLES.splitlines()),
            f"\nChoices, one YAML file each:\n{choices}",
            "\nSettings of a run (--cfg job prints the values of a call):",
            *_lines(_rows(RunConfig, "", values, leave_out=_PARTS)),
            *_lines(_rows(TextSettings, "text.", values["text"])),
            f"\nSettings of method={values['method']['name']}:",
            *_lines(_rows(method, "method.", values["method"], leave_out=_LABELS)),
            "\nA run that was stopped goes on with the same command; a finished one is printed again.",
        ]
    )


def choices_of(group: str) -> list[str]:
    """Names of a group's files, those of packages on Hydra's search path included."""
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return list(GlobalHydra.instance().config_loader().get_group_options(group))


def settings_page() -> str:
    """Every setting as a page of Markdown."""
    run: Any = OmegaConf.to_container(composed())
    parts = [
        "# Settings",
        "Made from the code by `python -m horen_bench.config.help`. Every one is given on the command line as "
        "`name=value`; the default is that of the file in `conf/`.",
        _table("A run", _rows(RunConfig, "", run, leave_out=_PARTS)),
        _table("Long answers", _rows(TextSettings, "text.", run["text"])),
        _table("A model, `conf/model/`", _rows(ModelConfig, "model.", {})),
    ]
    for group in ("method", "dataset", "tracker"):
        for choice in choices_of(group):
            values: Any = OmegaConf.to_container(composed([f"{group}={choice}"])[group])
            kind = imported(values["_target_"])
            parts.append(_table(f"`{group}={choice}`", _rows(kind, f"{group}.", values, leave_out=_LABELS)))
    return "\n\n".join(parts) + "\n"


Row = tuple[str, str, str, str]  # name, default, what is allowed, meaning


def _rows(kind: type[Section], prefix: str, values: Any, leave_out: Iterable[str] = ()) -> Iterator[Row]:
    """The settings of a section, nested ones in place."""
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        value = values.get(name, field.default) if isinstance(values, dict) else None
        nested = _section_in(field.annotation)
        if nested is not None and isinstance(value, dict):
            yield from _rows(nested, f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", _shown(value), _allowed(field), field.description or ""


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or allows beside null."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _shown(value: Any) -> str:
    if value is PydanticUndefined:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _allowed(field: FieldInfo) -> str:
    """Type and range in a few words."""
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    kind = _kind(field.annotation)
    limits = [
        f"{sign} {getattr(rule, key)}" for rule in _rules(field) for key, sign in bounds.items() if hasattr(rule, key)
    ]
    return ", ".join([kind, *limits])


def _rules(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for argument in get_args(field.annotation):
        yield from (rule for info in getattr(argument, "__metadata__", ()) for rule in getattr(info, "metadata", ()))


def _kind(annotation: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", dict: "group"}
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(_shown(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if origin in (list, tuple):
        return "list"
    if hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0])
    return names.get(origin or annotation, "group")


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    for name, default, allowed, meaning in rows:
        yield f"  {name}={default}  ({allowed})\n      {meaning}".rstrip()


def _table(title: str, rows: Iterable[Row]) -> str:
    head = f"## {title}\n\n| setting | default | allowed | meaning |\n| --- | --- | --- | --- |"
    return "\n".join([head, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    name, default, allowed, meaning = (cell.replace("|", "\\|") for cell in row)
    return f"| `{name}` | {f'`{default}`' if default else ''} | {allowed} | {meaning} |"


def main() -> None:
    """Print the page."""
    sys.stdout.write(settings_page())


if __name__ == "__main__":
    main()
