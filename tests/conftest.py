"""Fixtures that several folders of tests share."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="session", autouse=True)
def absl_leaves_captured_output_open() -> None:
    """absl, which `rouge_score` imports, closes the stream that it first saw when Hydra sets up logging: pytest's."""
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only get in each other's way at these sizes, and would reorder additions."""
    transformers_logging.disable_progress_bar()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# --- The reference model: 262,464 parameters, briefly trained on a page of invented text ----------------


@pytest.fixture(scope="session")
def baselines_folder() -> Path:
    return Path(__file__).parents[1] / "baselines"


@pytest.fixture(scope="session")
def golden_folder(baselines_folder: Path) -> Path:
    """Folder of the small Llama on which the published implementations were run."""
    return baselines_folder / "model"


@pytest.fixture
def golden_model(golden_folder: Path) -> PreTrainedModel:
    """A fresh copy of the reference model, frozen."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(golden_folder)
    model.requires_grad_(False)
    return model


@pytest.fixture
def other_golden_model(golden_folder: Path) -> PreTrainedModel:
    """A second copy, for what must not leak from one model to another."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(golden_folder)
    model.requires_grad_(False)
    return model


@pytest.fixture
def golden_tokenizer(golden_folder: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer: byte-level BPE that puts a BOS in front; pad is EOS is 0."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(golden_folder)
    return tokenizer


@pytest.fixture
def bosless_tokenizer(golden_folder: Path) -> PreTrainedTokenizerBase:
    """The same vocabulary without BOS and without pad token."""
    backend = Tokenizer.from_file(str(golden_folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def golden_tokens(golden_folder: Path) -> dict[str, Any]:
    """Token ids of every request text."""
    tokens: dict[str, Any] = json.loads((golden_folder / "tokens.json").read_text())
    return tokens


@pytest.fixture(scope="session")
def golden_base(golden_folder: Path) -> dict[str, Tensor]:
    """Logits, hidden states and generations of the unedited reference model."""
    return load_file(golden_folder / "base_model.safetensors")
