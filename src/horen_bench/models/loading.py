"""Loading a causal language model and its tokenizer, from the hub, a local folder, or the package itself."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.errors import UserError
from horen_bench.models.weights import model_source
from horen_bench.progress import quiet_transformers
from horen_bench.prompts import PromptEncoder, Template

_HASHED_BYTES = 1 << 20  # of each end of a file; a whole checkpoint would take minutes
_LOAD_ERRORS = (OSError, ValueError, HfHubHTTPError)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen model in evaluation mode, what encodes its prompts, and what names its weights.

    Attributes:
        model: no parameter requires a gradient.
        encoder: of its tokenizer, which is as published.
        fingerprint: a hash that changes with the weights or the dtype; names stored base predictions.
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
) -> LoadedModel:
    """Load a model from safetensors; code from the hub is never run.

    Args:
        hub_id: a hub id, a local folder, or `embedded:NAME` for a model that travels with the package.
        dtype: a torch dtype by name, e.g. `bfloat16`.
        device: where to put it when `device_map` is None, e.g. `cuda`.
        device_map: `auto` spreads the layers over several GPUs (accelerate).
        revision: branch, tag or commit on the hub.
        template: of prompts; a missing one is refused before weights are read.

    Raises:
        UserError: no such dtype, device or template, or the files are missing, gated, or not safetensors.
    """
    source = model_source(hub_id)
    encoder = PromptEncoder(load_tokenizer(hub_id, revision), template)
    try:
        with quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=_dtype(dtype),
                device_map=device_map,
                use_safetensors=True,
                revision=revision,
                trust_remote_code=False,
            )
    except _LOAD_ERRORS as error:
        raise UserError(_why_not_loaded(hub_id, error)) from error
    if device_map is None:
        model.to(_device(device))  # type: ignore[arg-type]  # torch's own overloads confuse the stub
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, encoder, f"{_weights_hash(source, model)}-{dtype}")


def load_tokenizer(hub_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as published.

    Raises:
        UserError: as `load_model`.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_source(hub_id), revision=revision, trust_remote_code=False
        )
    except _LOAD_ERRORS as error:
        raise UserError(_why_not_loaded(hub_id, error)) from error
    return tokenizer


def default_device() -> str:
    """`cuda` where there is one, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
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


def _why_not_loaded(hub_id: str, error: Exception) -> str:
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"{hub_id} is gated: accept its licence on huggingface.co, then run `hf auth login`"
    if any(isinstance(link, LocalEntryNotFoundError | ConnectionError) for link in chain):
        return (
            f"{hub_id} is not in the local cache and huggingface.co cannot be reached; download it elsewhere "
            "and give its folder with model.hub_id=/path/to/folder"
        )
    reason = " ".join(str(error).split())
    return (
        f"{hub_id} cannot be loaded ({reason[:200]}); give a hub id or a folder with config.json, "
        "tokenizer files and *.safetensors in model.hub_id="
    )


def _weights_hash(source: str, model: PreTrainedModel) -> str:
    """The hub commit where there is one, else a hash over the size and both ends of every file of a folder."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)[:16]
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".json")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HASHED_BYTES)
            file.seek(max(0, size - _HASHED_BYTES))
            digest.update(f"{path.name} {size}".encode() + head + file.read())
    return digest.hexdigest()[:16]
