"""The one door through which models, tokenizers and configurations come in.

Code that comes with a model is never run, weights are never unpickled, and what is loaded is whole: no weight is left
as it was drawn at random, none is left over, all are finite.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from horen_bench.errors import UserError

_NAMED = 3  # tensors of a kind that a message names


def pretrained(kind: Any, source: str | Path, **settings: Any) -> Any:
    """`kind.from_pretrained(source, **settings)`, without running code of the model's.

    Args:
        kind: a class of transformers.
        source: a hub id or a folder.
        settings: of `from_pretrained`.

    Raises:
        UserError: the model names code on the hub to compute attention.
        Exception: whatever transformers, tokenizers and safetensors raise.
    """
    if kind not in (AutoConfig, AutoTokenizer):
        settings["use_safetensors"] = True
        refuse_kernels(pretrained(AutoConfig, source, revision=settings.get("revision")), source)
    return kind.from_pretrained(source, **settings, trust_remote_code=False)


def from_gguf(kind: Any, file: Path, **settings: Any) -> Any:
    """`kind.from_pretrained` of what a GGUF file holds, de-quantised; a GGUF file has no code in it.

    Raises:
        Exception: as `pretrained`, and whatever the package gguf raises.
    """
    return kind.from_pretrained(file.parent, gguf_file=file.name, **settings, trust_remote_code=False)


def bare_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The module tree of a causal language model on torch's `meta` device; code of the model's is not run.

    Raises:
        Exception: whatever transformers raises.
    """
    refuse_kernels(config, str(config.name_or_path))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def whole_model(kind: Any, source: str | Path, *, part: bool = False, **settings: Any) -> PreTrainedModel:
    """A model of which every weight comes from its files.

    Args:
        kind: as for `pretrained`.
        source: as for `pretrained`.
        part: the files may hold more than the model, and the model a pooling layer more than they: an encoder out of a
            model that was trained for something else.
        settings: of `from_pretrained`.

    Raises:
        UserError: weights are missing, left over, of another shape, or not finite.
        Exception: as `pretrained`.
    """
    with _without_report():
        model: PreTrainedModel
        model, info = pretrained(kind, source, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if part:
        missing, unexpected = [name for name in missing if "pooler." not in name], []
    reshaped = [f"{name} {list(shape)} for {list(needed)}" for name, shape, needed in sorted(info["mismatched_keys"])]
    problems = {"lack": missing, "hold beyond it": unexpected, "hold in another shape": reshaped}
    named = ", ".join(f"{problem} {_listed(names)}" for problem, names in problems.items() if names)
    if named:
        raise UserError(
            f"{source} cannot be loaded: against the {type(model).__name__} of its config.json, its *.safetensors "
            f"{named}; these files do not belong together, copy the folder again from where the model comes from"
        )
    return model


def refuse_non_finite(model: nn.Module, source: str | Path) -> None:
    """See that all weights are numbers.

    Least and greatest are taken, faster than the weights were read, so that nothing need be remembered about it.

    Raises:
        UserError: some are NaN or infinite.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if not bad:
        return
    dtype = str(model.get_parameter(bad[0]).dtype).removeprefix("torch.")
    half = "its range may be too small for them, try model.dtype=bfloat16; else " if dtype == "float16" else ""
    raise UserError(
        f"{source} has weights that are not finite in {dtype} ({_listed(bad)}); {half}copy the folder again from where "
        "the model comes from"
    )


def refuse_kernels(config: PreTrainedConfig, source: str | Path) -> None:
    """See that a configuration does not name a repository whose code is to compute attention or experts.

    Raises:
        UserError: it does.
    """
    for setting in ("_attn_implementation", "_experts_implementation"):
        for name in _values(getattr(config, setting, None)):
            if "/" in name:
                raise UserError(
                    f"{source}: its config.json names code from {name}, and code that comes with a model is not "
                    f"run; take {setting.removeprefix('_')} out of config.json"
                )


def _values(setting: Any) -> list[str]:
    """The names in a setting that is one for all parts of a model, or a mapping by part."""
    return [str(name) for name in (setting.values() if isinstance(setting, Mapping) else [setting])]


def _is_finite(parameter: torch.Tensor) -> bool:
    """Of what is in memory: weights that were left on the disk are on `meta`."""
    if parameter.is_meta or not parameter.is_floating_point() or parameter.numel() == 0:
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(parameter.detach()))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps back transformers' table of what does not fit: it becomes a sentence."""

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
