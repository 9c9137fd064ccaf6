"""Loading a causal language model and its tokenizer, from the hub, a local folder, or the package itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.errors import UserError, reason_of
from horen_bench.models.building.built import build
from horen_bench.models.memory import out_of_memory_in
from horen_bench.models.pretrained import pretrained, refuse_non_finite, whole_model
from horen_bench.models.weights import check_settings, model_source, weights_fingerprint
from horen_bench.progress import quiet_transformers
from horen_bench.prompts import TEMPLATE_DATE, PromptEncoder, Template

_LESS_MEMORY = (
    "write model.dtype=bfloat16, spread the model over all GPUs with model.device_map=auto, choose another device=, or "
    "a smaller model"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen model in evaluation mode, what encodes its prompts, and what names its weights.

    Attributes:
        model: no parameter requires a gradient.
        encoder: of its tokenizer, which is as published.
        fingerprint: `weights_fingerprint`, which changes with all that changes what the model says.
    """

    model: PreTrainedModel
    encoder: PromptEncoder
    fingerprint: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As published; nothing is added to it."""
        return self.encoder.tokenizer


def load_model(
    hub_id: str,
    *,
    dtype: str,
    device: str,
    device_map: str | None = None,
    revision: str | None = None,
    template: Template = "none",
    template_date: str = TEMPLATE_DATE,
) -> LoadedModel:
    """Load a model from safetensors; code from the hub is never run.

    Args:
        hub_id: a hub id, a local folder, `embedded:NAME` for a model that travels with the package; `built:NAME` or
            a GGUF file for one that is built into the user's cache first.
        dtype: a torch dtype by name, e.g. `bfloat16`.
        device: where to put it when `device_map` is None, e.g. `cuda`.
        device_map: `auto` spreads the layers over several GPUs (accelerate).
        revision: branch, tag or commit on the hub.
        template: of prompts; a missing one is refused before weights are read.
        template_date: what a chat template takes for today, ISO 8601.

    Raises:
        UserError: no such dtype, device or template; the files are missing, gated, damaged, not safetensors or not
            those of one model; a weight is not finite; or memory ran out.
    """
    source = _at_hand(hub_id)
    weights_dtype, place = _dtype(dtype), None if device_map else _device(device)
    encoder = PromptEncoder(load_tokenizer(hub_id, revision), template, template_date)
    with _in_words(hub_id), quiet_transformers():
        model = whole_model(AutoModelForCausalLM, source, dtype=weights_dtype, device_map=device_map, revision=revision)
        if place is not None:
            model.to(place)  # type: ignore[arg-type]  # torch's own overloads confuse the stub
        refuse_non_finite(model, source)
    model.requires_grad_(False)
    model.eval()
    fingerprint = weights_fingerprint(hub_id, dtype, revision)
    if fingerprint is None:
        raise UserError(
            f"{hub_id} is not in the hub's cache by a commit, which would name its weights in the results; download it "
            "to a folder and give that with model.hub_id=/path/to/folder"
        )
    return LoadedModel(model, encoder, fingerprint)


def load_tokenizer(hub_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as published.

    Raises:
        UserError: as `load_model`.
    """
    source = _at_hand(hub_id)
    if Path(source).is_dir():
        check_settings(Path(source))
    with _in_words(hub_id, "its tokenizer: "):
        tokenizer: PreTrainedTokenizerBase = pretrained(AutoTokenizer, source, revision=revision)
    return tokenizer


def default_device() -> str:
    """`cuda` where there is one, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _at_hand(hub_id: str) -> str:
    """What transformers loads; a model that is to be built is built now, which takes minutes once."""
    build(hub_id, Console(stderr=True))
    return model_source(hub_id)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    # One byte is too little to compute with: no layer takes such numbers.
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"model.dtype={name} is no floating-point dtype; write float32, bfloat16 or float16")
    return dtype


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used here ({reason}); write cpu, cuda or cuda:N") from error
    return device


@contextmanager
def _in_words(hub_id: str, part: str = "") -> Iterator[None]:
    """Within the block, whatever keeps a model's files from being read is a sentence.

    Transformers checks little of what it reads, each architecture raises what it likes, and tokenizers raises plain
    `Exception`.
    """
    try:
        with out_of_memory_in(f"{hub_id} was loaded", _LESS_MEMORY):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(hub_id, part, error)) from error


def _why_not_loaded(hub_id: str, part: str, error: Exception) -> str:
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"{hub_id} is gated: accept its licence on huggingface.co, then run `hf auth login`"
    if any(isinstance(link, LocalEntryNotFoundError | ConnectionError) for link in chain):
        return (
            f"{hub_id} is not in the local cache and huggingface.co cannot be reached; download it elsewhere "
            "and give its folder with model.hub_id=/path/to/folder"
        )
    reason = reason_of(error)
    if isinstance(error, KeyError | AttributeError | TypeError):  # whose text alone says little
        reason = f"{type(error).__name__}: {reason}"
    damaged = _damaged_files(Path(model_source(hub_id))) if isinstance(error, SafetensorError) else ""
    return (
        f"{hub_id} cannot be loaded ({part}{damaged}{reason}); give a hub id or a folder with config.json, tokenizer "
        "files and *.safetensors in model.hub_id="
    )


def _damaged_files(folder: Path) -> str:
    """The names of a folder's safetensors files that cannot be opened, as the beginning of a reason."""
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            damaged.append(path.name)
    return f"{', '.join(damaged)}: " if damaged else ""
