"""A GGUF file as an ordinary model folder: weights de-quantised to float32, tokenizer and settings beside them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from horen_bench.errors import UserError, reason_of
from horen_bench.models.memory import out_of_memory_in
from horen_bench.models.pretrained import from_gguf

_MEMORY = "about nine bytes for each weight are needed; close other programs, or take a smaller model"


def convert(file: Path, folder: Path) -> None:
    """Write a model folder that holds what a GGUF file says.

    transformers reads the file and knows its architectures; it does not save what it read from one, so that is done
    here. Takes about two minutes and 3 GB for 270 million weights with a vocabulary of 262,144.

    Args:
        file: `*.gguf`, any quantisation that the package gguf knows.
        folder: exists; files in it are replaced.

    Raises:
        UserError: the package gguf is missing, the file is damaged, transformers does not know its architecture, or
            memory runs out.
    """
    _needs_gguf(file)
    with out_of_memory_in(f"{file.name} was converted", _MEMORY):
        tokenizer = _read(AutoTokenizer, file)
        model = _read(AutoModelForCausalLM, file, dtype=torch.float32)
        save_folder(model, model.state_dict(), folder)
        tokenizer.save_pretrained(folder)


def save_folder(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Save weights and the settings of a model; a tied head is saved once, as the embedding."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    kept = {name: weight.contiguous() for name, weight in weights.items() if name not in tied}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _read(kind: Any, file: Path, **settings: Any) -> Any:
    """The model or tokenizer in the file, by transformers."""
    try:
        return from_gguf(kind, file, **settings)
    except Exception as error:  # each architecture and the package gguf raise what they like
        reason = reason_of(error)
        raise UserError(
            f"{file} cannot be converted ({reason}); copy it again from where it comes from, or take the model's "
            "*.safetensors in place of its *.gguf"
        ) from error


def _needs_gguf(file: Path) -> None:
    if find_spec("gguf") is None:
        raise UserError(
            f'{file} is read with the package gguf; pip install "horen-bench[gemma]", or take the model\'s '
            "*.safetensors in place of its *.gguf"
        )
