"""Module trees without weights: what a backbone looks like, and whether a configured module exists.

Lets a run fail within a second on a layer that the model lacks, before any weight is loaded.
"""

import difflib
import traceback
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from horen_bench.config.schema import ModelConfig
from horen_bench.errors import UserError
from horen_bench.models.building.built import BUILT, built_folder
from horen_bench.models.pretrained import bare_model, pretrained
from horen_bench.models.weights import check_settings, model_source

PlainLinear = nn.Linear | Conv1D


def skeleton(architecture: Mapping[str, Any]) -> PreTrainedModel:
    """Build the module tree of a causal language model on torch's `meta` device.

    No memory and no network: 0.05 s for 20.9e9 parameters, a few seconds if transformers must
    first be imported. Shapes are true, values do not exist.

    Args:
        architecture: `model_type` and keyword arguments of that type's transformers configuration,
            as in `conf/model/*.yaml`; what is left out has the type's default.

    Raises:
        UserError: unknown model type, an argument that the type does not have, or values that
            transformers refuses.
    """
    # transformers insists on plain dicts where a configuration nests mappings.
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in architecture.items()}
    model_type = str(values.pop("model_type", ""))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.architecture.model_type={model_type}: transformers has no causal language model of this "
            f"type; {_nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or 'one it has is llama'}"
        )
    # transformers would keep a misspelt argument as one more attribute and build the default shape.
    defaults = AutoConfig.for_model(model_type)
    for key in values:
        if not hasattr(defaults, key):
            hint = _nearest(key, defaults.to_dict()) or "config.json on the model's hub page has the names"
            raise UserError(f"model.architecture.{key}: '{model_type}' has no such argument; {hint}")
    try:
        return bare_model(AutoConfig.for_model(model_type, **values))
    except Exception as error:  # each architecture checks its own arguments and raises what it likes
        reason = traceback.format_exception_only(error)[-1].splitlines()[-1].strip()
        raise UserError(
            f"model.architecture: transformers cannot build a '{model_type}' from these values ({reason})"
        ) from error


def folder_skeleton(folder: Path) -> PreTrainedModel:
    """Like `skeleton`, for the `config.json` of a local model folder.

    Raises:
        UserError: no readable `config.json` of a causal language model, or one that needs code of its own.
    """
    check_settings(folder)
    try:
        return bare_model(pretrained(AutoConfig, folder))
    except UserError:
        raise
    except Exception as error:  # as above
        reason = " ".join(traceback.format_exception_only(error)[-1].split())[:200]
        raise UserError(f"model.hub_id={folder}: no causal language model to load here ({reason})") from error


def without_weights(model: ModelConfig) -> PreTrainedModel | None:
    """A configured model as a module tree: by its local folder, else its `architecture`; None where it has neither.

    Raises:
        UserError: as `skeleton` and `folder_skeleton`, or the folder does not exist.
    """
    source = Path(model_source(model.hub_id))
    if source.is_dir():
        return folder_skeleton(source)
    if built_folder(model.hub_id) and not model.hub_id.startswith(BUILT):
        return None  # a GGUF file: what it holds is known once it is converted
    return skeleton(model.architecture) if model.architecture else None


def check_module(model: nn.Module, path: str, *, where: str) -> nn.Module:
    """Return the module at a dotted path.

    Args:
        model: a model or its `skeleton`.
        path: dotted name from the root, such as `model.layers.24.mlp.down_proj`.
        where: the configuration key that holds the path, for the message.

    Raises:
        UserError: no such module; the message names what is there instead.
    """
    owner, owner_path = model, ""
    for part in path.split("."):
        children = dict(owner.named_children())
        if part not in children:
            raise UserError(
                f"{where}={path}: {type(model).__name__} has no such module; "
                f"{owner_path or 'at its root it'} {_what_is_there(part, list(children))}"
            )
        owner, owner_path = children[part], f"{owner_path}.{part}".lstrip(".")
    return owner


def check_linear(model: nn.Module, path: str, *, where: str) -> nn.Module:
    """Return the linear module at a dotted path; its weight may be of any kind, as only its activations are used.

    Raises:
        UserError: no such module, or one of another kind.
    """
    module = check_module(model, path, where=where)
    if not is_linear(module):
        raise UserError(f"{where}={path} is a {type(module).__name__}; a linear module is needed")
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether a module says that it takes `m` numbers and gives `d`, whatever its weight looks like."""
    return _sizes(module) is not None


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module, `(m, d)`.

    Raises:
        TypeError: the module is not linear; `check_linear` gives one that is.
    """
    sizes = _sizes(module)
    if sizes is None:
        raise TypeError(f"{type(module).__name__} is not linear")
    return sizes


def matrix_of(module: PlainLinear, weight: Tensor | None = None) -> Tensor:
    """A linear module's weight as `(d, m)`: a view, so that what is written into it is written into the weight.

    The one place that knows how a weight is stored: GPT-2's `Conv1D` has it as `(m, d)`.

    Args:
        module: the module.
        weight: a tensor of the shape of the module's own, to be seen in its place.
    """
    stored: Tensor = module.weight if weight is None else weight
    return stored.T if isinstance(module, Conv1D) else stored


def is_packed(weight: Any) -> bool:
    """Whether it is no parameter of floating-point numbers to compute with: quantised, or not there at all."""
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.element_size() == 1:
        return True
    # torchao's and quanto's tensors say that they are of the dtype that they were, and know how to get back.
    return type(weight).dequantize is not Tensor.dequantize


def compute_dtype(model: PreTrainedModel, module: nn.Module) -> torch.dtype:
    """The floating-point dtype of a module's outputs: its weight's, or where that is packed the embeddings'."""
    weight: Any = getattr(module, "weight", None)
    plain: Any = model.get_input_embeddings().weight if is_packed(weight) else weight
    dtype: torch.dtype = plain.dtype
    return dtype


def device_of(module: nn.Module) -> torch.device:
    """Where a module is: its first parameter or, where weights are packed in buffers, the first of these."""
    return next(chain(module.parameters(), module.buffers())).device


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear module; quantised ones have them by the names of `nn.Linear`."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    m, d = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (m, d) if isinstance(m, int) and isinstance(d, int) else None


def _what_is_there(part: str, children: list[str]) -> str:
    """Second half of the sentence about a module that lacks `part`."""
    if not children:
        return "has no modules inside"
    if all(name.isdigit() for name in children):
        return f"has {len(children)} entries, {children[0]} to {children[-1]}"
    hint = _nearest(part, children)
    return f"has {', '.join(children)}" + (f"; {hint}" if hint else "")


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name most like `name`, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean {matches[0]}?" if matches else ""


def decoder_layer_index(path: str) -> int | None:
    """Number of the decoder layer that a dotted path leads into, from 0; None if into no layer.

    It is the first number in the path: an expert's number comes after that of its layer.
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def n_decoder_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers of the language model, as its configuration has it."""
    n_layers: int = model.config.get_text_config().num_hidden_layers
    return n_layers


def is_last_layer(model: PreTrainedModel, path: str) -> bool:
    """Whether a dotted path leads into the last decoder layer.

    No attention comes after it, so a memory there that acts at the last prompt token can change
    the first target token only.
    """
    return decoder_layer_index(path) == n_decoder_layers(model) - 1


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None where it has no limit, or its configuration does not say."""
    config = model.config.get_text_config()
    if config.model_type == "falcon" and config.alibi:  # as it says itself, its positions are not used then
        return None
    length: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return length
