"""Between Hydra and the program: `conf/` composed under a command line, and made into a `RunConfig`."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError

from horen_bench.config import sentences
from horen_bench.config.schema import (
    Dataset,
    MethodConfig,
    ModelConfig,
    RunConfig,
    Section,
    TrackerConfig,
    imported,
    with_text_keys,
)
from horen_bench.errors import UserError
from horen_bench.paths import resource

_COMPONENTS: Mapping[str, type[Section]] = {"method": MethodConfig, "dataset": Dataset, "tracker": TrackerConfig}
_GROUPS = ("model", *_COMPONENTS)
# Top-level keys of an experiment, which describe a grid and no run.
OF_A_GRID = ("suite", "suites", "labels", "table")


def composed(overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """The configuration of `conf/` under overrides as a command line has them; Hydra's own settings in it if wanted.

    Raises:
        HydraException: an override names nothing; `in_words` says it better.
    """
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=with_hydra)


def run_config(overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a command line describes.

    Raises:
        UserError: a fault in it, in one sentence.
    """
    try:
        config = composed(overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(in_words(error, overrides)) from error
    return validated(config)


def in_words(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's or OmegaConf's message in one line that says what to write."""
    if isinstance(error, ValueError):  # Hydra's own, which names nothing: a part without a name
        given = next((word for word in overrides if word.partition("=")[0] in ("", *_GROUPS)), " ".join(overrides))
        return f"{given}: a name and a choice are needed, such as model=tiny (--help lists the choices)"
    return sentences.of_hydra(error, lambda: _settings_of_choices(overrides))


def _settings_of_choices(overrides: Sequence[str]) -> list[str]:
    """Dotted names of the settings that the chosen parts have, whatever else the overrides say."""
    choices = [one for one in overrides if one.partition("=")[0] in _GROUPS]
    try:
        config = composed(choices)
    except (HydraException, OmegaConfBaseException, ValueError):
        config = composed()
    return sentences.dotted(_unresolved(config))


def _unresolved(config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config)
    return with_text_keys(values)


def validated(config: DictConfig) -> RunConfig:
    """The typed configuration of a run.

    Raises:
        UserError: a part was taken away, a value refers to one that is not there, or something has the wrong type or
            range.
    """
    values = {key: value for key, value in _resolved(config).items() if key not in OF_A_GRID}
    known = sentences.dotted(values)
    model = _checked(ModelConfig, values["model"], "model", known)
    parts = {name: _component(name, values[name], kind, known) for name, kind in _COMPONENTS.items()}
    run = _checked(RunConfig, {**values, **parts, "model": model}, "", known)
    assert isinstance(run, RunConfig)
    return run


def _component(name: str, values: Any, kind: type[Section], known: Sequence[str]) -> Section:
    """The part whose class `_target_` names."""
    target = values.get("_target_") if isinstance(values, Mapping) else None
    if not isinstance(target, str):
        raise UserError(f"{name} must be a group of settings with a _target_, got {sentences.shown(values)}")
    try:
        found = imported(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name}._target_={target} cannot be imported ({error}); is its package installed?") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"{name}._target_={target} is no {kind.__name__}; name a subclass of it")
    return _checked(found, {key: value for key, value in values.items() if key != "_target_"}, name, known)


def _checked(kind: type[Section], values: Any, prefix: str, known: Sequence[str]) -> Section:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(sentences.of_validation(error, prefix, known)) from error


def _resolved(config: DictConfig) -> dict[str, Any]:
    for part in _GROUPS:
        if config.get(part) is None:
            raise UserError(f"the run is left without a {part}; write {part}=... (--help lists them)")
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except InterpolationKeyError as error:
        raise UserError(
            f"method={_name(config, 'method')} needs a value that conf/model/{_name(config, 'model')}.yaml lacks "
            f"({str(error.msg).splitlines()[0]}); add it there or set {error.full_key} yourself"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {' '.join(str(error).split())}") from error
    return with_text_keys(values)


def _name(config: DictConfig, part: str) -> Any:
    values = OmegaConf.to_container(config[part])
    return values.get("name") if isinstance(values, dict) else values
