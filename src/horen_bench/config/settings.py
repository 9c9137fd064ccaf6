"""Checks a run's configuration before any weight is loaded.

Each fault is one sentence that says what was written, what is allowed, and what to write instead.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.config.compose import build
from horen_bench.editors.base import Editor
from horen_bench.errors import UserError
from horen_bench.evaluation import PROTOCOL_NAMES
from horen_bench.models.architecture import folder_skeleton, skeleton
from horen_bench.models.loading import model_source

Config = Mapping[str, Any]

_PARTS = ("model", "method", "dataset", "tracker")


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values.

    Raises:
        UserError: a part was taken away, or a value refers to one that is not there, e.g. a method without values for
            this backbone.
    """
    for part in _PARTS:
        if part not in config:
            raise UserError(f"~{part} leaves the run without a {part}; write {part}=... (--help lists them) instead")
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except InterpolationKeyError as error:
        raise UserError(
            f"method={config.method.name} needs a value that conf/model/{config.model.name}.yaml lacks "
            f"({str(error.msg).splitlines()[0]}); add it there or set {error.full_key} yourself"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {' '.join(str(error).split())}") from error
    return {str(key): value for key, value in dict(values).items()}  # type: ignore[arg-type]


def check(config: Config) -> None:
    """Check numbers, protocol and method; the method is built on a model without weights.

    Raises:
        UserError: something cannot be run.
    """
    _check_count("n", config["n"])
    checkpoints = config["checkpoints"]
    if not isinstance(checkpoints, list):
        raise UserError(f"checkpoints must be a list such as [100,500,1000], got {checkpoints!r}")
    for checkpoint in checkpoints:
        _check_count("checkpoints", checkpoint)
    _check_count("batch_size", config["batch_size"])
    for optional in ("threads", "eval_cases"):
        if config[optional] is not None:
            _check_count(optional, config[optional])
    if not _is_whole(config["seed"]) or config["seed"] < 0:
        raise UserError(f"seed must be a whole number of at least 0, got {config['seed']!r}")
    if not (_is_whole(config["save_every"]) or isinstance(config["save_every"], float)):
        raise UserError(f"save_every must be a number of seconds, got {config['save_every']!r}")
    if not isinstance(config["force"], bool):
        raise UserError(f"force must be true or false, got {config['force']!r}")
    if not protocols_of(config):
        raise UserError("protocol is an empty list; write one protocol, or several such as [greedy,release]")
    for protocol in protocols_of(config):
        if protocol not in PROTOCOL_NAMES:
            raise UserError(f"protocol={protocol} is unknown; write one of {', '.join(PROTOCOL_NAMES)}")
    _check_text(config["text"])
    if config["locality"] not in ("all", "clean"):
        raise UserError(f"locality must be all or clean, got {config['locality']!r}")
    _check_template(config)
    bare = _model_without_weights(config["model"])
    if bare is not None:
        build_editor(config, bare, tokenizer=None)


def checkpoints_of(config: Config) -> list[int]:
    """The checkpoints up to `n`, ascending; `n` always is one."""
    return sorted({c for c in config["checkpoints"] if c < config["n"]} | {config["n"]})


def protocols_of(config: Config) -> list[str]:
    """Names of the protocols under which the model is questioned: one, or a list without repetitions."""
    chosen = config["protocol"]
    return list(dict.fromkeys(chosen)) if isinstance(chosen, list) else [chosen]


def editor_class(config: Config) -> type[Editor]:
    """The class of the configured method."""
    found: type[Editor] = get_class(config["method"]["_target_"])
    return found


def build_editor(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Editor:
    """The configured method on a model.

    Raises:
        UserError: the method refuses its settings.
    """
    editor: Editor = build(config["method"], "method", model=model, tokenizer=tokenizer, seed=config["seed"])
    return editor


def _check_template(config: Config) -> None:
    if config["template"] not in ("none", "model"):
        raise UserError(f"template must be none or model, got {config['template']!r}")
    if config["template"] == "model" and editor_class(config).needs_subject:
        raise UserError(
            f"method={config['method']['name']} looks for the subject in the bare prompt, so template=model does not "
            "suit it; write template=none or choose another method"
        )


def _check_text(text: Mapping[str, Any]) -> None:
    _check_count("text.max_new_tokens", text["max_new_tokens"])
    for name in ("minilm", "bert_score"):
        if text[name] is not None and not isinstance(text[name], str):
            raise UserError(f"text.{name} must be a hub id, a folder or null, got {text[name]!r}")


def _check_count(name: str, value: object) -> None:
    if not _is_whole(value) or value < 1:
        raise UserError(f"{name} must hold whole numbers of at least 1, got {value!r}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _model_without_weights(model: Config) -> PreTrainedModel | None:
    source = Path(model_source(model["hub_id"]))
    if source.is_dir():
        return folder_skeleton(source)
    return skeleton(model["architecture"]) if model.get("architecture") else None
