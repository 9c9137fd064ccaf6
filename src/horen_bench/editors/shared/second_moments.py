"""Second moments of what enters a down-projection on general text: `C = 1/N sum_t x_t x_t^T`.

Uncentred, every attended token counts once, BOS included, on the model as received. One pass over the corpus serves all
layers and ends above the last; a pass that was stopped goes on from its last save, with the same sums. Memory: one
`(m, m)` sum per layer where the model is, i.e. in float32 0.8 GB at m = 14,336 and 2.6 GB at m = 25,600; twice that in
float64.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.shared.config import StatisticsConfig
from horen_bench.editors.shared.corpora import read_corpus
from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index, linear_sizes
from horen_bench.models.calls import run
from horen_bench.models.file_hashes import sha256_of
from horen_bench.models.hooks import as_sequences, ending_at, inputs_of
from horen_bench.models.surgery import all_finite
from horen_bench.models.weights import EMBEDDED
from horen_bench.paths import resource
from horen_bench.prompts import Batch, PromptEncoder, pad
from horen_bench.results.atomic import replacing

_GROUP = 100  # texts that are sorted by length together
_BATCH_TOKENS = 8192  # padded tokens of a forward pass; the sums do not depend on it
_MOST_BAD = 5  # texts with non-finite activations
_SAVE_EVERY = 60.0  # seconds between saves of a pass; a slow save is repeated less often
_HASHED = 1 << 24  # numbers of a parameter that are copied to the host at once
_HASHING_THREADS = 4  # hashing leaves the interpreter's lock
_UNSAID = ("transformers_version", "_name_or_path", "architectures", "dtype")  # of a configuration; no moment's matter


@dataclass(frozen=True, slots=True)
class SecondMoment:
    """A sum and what it is a sum of; sums over parts of a corpus add up.

    Attributes:
        total: `sum_t x_t x_t^T`, `(m, m)`.
        n_tokens: how many `x_t`.
    """

    total: Tensor
    n_tokens: int

    @property
    def mean(self) -> Tensor:
        """`C`, `(m, m)`."""
        return self.total / self.n_tokens

    def __add__(self, other: "SecondMoment") -> "SecondMoment":
        return SecondMoment(self.total + other.total, self.n_tokens + other.n_tokens)


def second_moments(
    model: PreTrainedModel, encoder: PromptEncoder, paths: Sequence[str], statistics: StatisticsConfig
) -> dict[str, SecondMoment]:
    """The moments of each down-projection: from the published files, the cache, or one pass over the corpus.

    Raises:
        UserError: the corpus or a published file cannot be read or does not fit.
    """
    if statistics.published:
        folder = Path(statistics.published).expanduser()
        return {path: _checked(read_published(folder, path), model, path) for path in paths}
    cache = cache_folder(statistics)
    keys = cache_keys(model, encoder, paths, statistics)
    files = {path: cache / f"{key}.safetensors" for path, key in keys.items()}
    moments = {path: moment for path, file in files.items() if (moment := _load(file)) is not None}
    missing = [path for path in paths if path not in moments]
    if missing:
        texts = read_corpus(statistics.corpus, statistics.n_texts)
        unfinished = cache / f"unfinished-{_digest([files[path].name for path in missing], texts)}.safetensors"
        dtype, max_length = getattr(torch, statistics.dtype), statistics.max_length
        fresh = accumulate(model, encoder, missing, texts, max_length=max_length, dtype=dtype, unfinished=unfinished)
        for path, moment in fresh.items():
            _save(files[path], moment, {"module": path, "texts": len(texts), "corpus": statistics.corpus})
        unfinished.unlink(missing_ok=True)
        moments |= fresh
    return {path: moments[path] for path in paths}


@dataclass(slots=True)
class MomentSums:
    """The sums of a pass over a corpus, as far as it has come.

    Attributes:
        totals: by module, `sum_t x_t x_t^T`, `(m, m)`.
        n_texts: texts read.
        n_tokens: tokens in the sums.
        n_bad: batches left out because of activations that are not finite.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    n_texts: int = 0
    n_tokens: int = 0
    n_bad: int = 0

    def save(self, path: Path) -> None:
        """Write it down, all or nothing."""
        counts = torch.tensor([self.n_texts, self.n_tokens, self.n_bad])
        totals = {name: total.cpu().contiguous() for name, total in self.totals.items()}
        with replacing(path) as temporary:
            save_file({"counts": counts, **totals}, temporary)

    @classmethod
    def load(cls, path: Path | None) -> "MomentSums":
        """The saved sums; new ones where there is none, or a damaged one."""
        totals = saved_tensors(path, "counts")
        return cls(totals, *totals.pop("counts").tolist()) if totals else cls()


@torch.no_grad()
def accumulate(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    paths: Sequence[str],
    texts: Sequence[str],
    *,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    unfinished: Path | None = None,
) -> dict[str, SecondMoment]:
    """Sum up in one pass.

    Args:
        model: as received.
        encoder: the tokenizer's default special tokens count as tokens of the text.
        paths: of the down-projections.
        texts: one sequence each.
        max_length: tokens kept of a text.
        dtype: of the sums.
        unfinished: file that the pass is saved in every minute and goes on from, or None. Sums are added up in the same
            order, so that a stop leaves no trace in them.

    Raises:
        UserError: no text, or activations that are not finite in more than a few texts.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    highest = model.get_submodule(block_of(max(paths, key=lambda path: decoder_layer_index(path) or 0)))
    sums = MomentSums.load(unfinished)
    next_save = time.monotonic() + _SAVE_EVERY
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("second moments", total=len(texts), completed=sums.n_texts)
        for start in range(sums.n_texts, len(texts), _GROUP):
            group = texts[start : start + _GROUP]
            for rows in _batches(encoder, group, max_length):
                batch = pad(rows, encoder.pad_id, "right", device=model.device)
                _add(sums, _attended(model, modules, highest, batch), dtype)
            sums.n_texts += len(group)
            progress.update(task, completed=sums.n_texts)
            if unfinished is not None and time.monotonic() > next_save:
                began = time.monotonic()
                sums.save(unfinished)
                next_save = 11 * time.monotonic() - 10 * began + _SAVE_EVERY
    if sums.n_tokens == 0:
        raise UserError("method.statistics.corpus holds no text that gives finite activations")
    return {path: SecondMoment(total, sums.n_tokens) for path, total in sums.totals.items()}


def _add(sums: MomentSums, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Add one batch's inputs `(N, m)` of each module."""
    if not all_finite(*inputs.values()):
        sums.n_bad += 1
        if sums.n_bad > _MOST_BAD:
            raise UserError("the model's activations on method.statistics.corpus are not finite")
        return
    sums.n_tokens += len(next(iter(inputs.values())))
    for path, x in inputs.items():
        product = x.to(dtype).T @ x.to(dtype)
        if path in sums.totals:
            product.add_(sums.totals[path].to(product.device))
        sums.totals[path] = product


def _attended(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], highest: nn.Module, batch: Batch
) -> dict[str, Tensor]:
    """Inputs `(N, m)` of each module at the batch's real tokens."""
    with inputs_of(modules) as inputs, ending_at(highest):
        run(model, batch)
    mask = batch.attention_mask.bool()
    return {path: as_sequences(x, mask.shape)[mask.to(x.device)] for path, x in inputs.items()}


def _batches(encoder: PromptEncoder, texts: Sequence[str], max_length: int) -> Iterator[list[list[int]]]:
    """Token rows, longest first, cut so that a padded batch stays below a fixed size."""
    cut = (row[:max_length] for row in encoder.texts(texts))
    rows: list[list[int]] = sorted((row for row in cut if row), key=len, reverse=True)
    while rows:
        n_rows = max(1, _BATCH_TOKENS // len(rows[0]))
        yield rows[:n_rows]
        rows = rows[n_rows:]


def block_of(path: str) -> str:
    """Dotted path of the decoder layer that a module is in."""
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


# --- Cache -----------------------------------------------------------------------------------------------


def cache_folder(statistics: StatisticsConfig) -> Path:
    """Where moments are kept."""
    if statistics.folder:
        return Path(statistics.folder).expanduser()
    return Path(pooch.os_cache("horen_bench")) / "statistics"


def cache_keys(
    model: PreTrainedModel, encoder: PromptEncoder, paths: Sequence[str], statistics: StatisticsConfig
) -> dict[str, str]:
    """By module, its path and a hash over all that the moment depends on: model, tokenizer, corpus, counts, dtypes.

    Reads every weight once, about a second per gigabyte and thread.
    """
    counts = f"{statistics.n_texts} {statistics.max_length} {statistics.dtype}"
    shared = f"{model_fingerprint(model)} {_tokenizer_hash(encoder)} {_corpus_hash(statistics.corpus)} {counts}"
    return {path: f"{path}-{hashlib.sha256(f'{shared} {path}'.encode()).hexdigest()[:16]}" for path in paths}


def model_fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits over the configuration and every byte of every parameter: another one for each change."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _UNSAID}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    names, parameters = zip(*model.named_parameters(), strict=True)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for name, parameter, content in zip(names, parameters, pool.map(_content_hash, parameters), strict=True):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {content}".encode())
    return digest.hexdigest()[:16]


def _content_hash(parameter: Tensor) -> str:
    digest = hashlib.sha256()
    flat = parameter.detach().flatten()
    for start in range(0, flat.numel(), _HASHED):
        digest.update(flat[start : start + _HASHED].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_hash(encoder: PromptEncoder) -> str:
    """Over all that decides about tokens; a tokenizer without a Rust backend is known by its vocabulary."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else encoder.tokenizer.get_vocab()
    # These two follow the last call.
    lasting = {name: rule for name, rule in rules.items() if not backend or name not in ("truncation", "padding")}
    example = encoder.texts(["A text, 1927."])[0]
    return hashlib.sha256(json.dumps([lasting, example], sort_keys=True).encode()).hexdigest()


def _corpus_hash(source: str) -> str:
    """Over the content of a file, whose ending says how it is read, or of a folder; of the hub, the corpus's name."""
    local = resource("data") / source.removeprefix(EMBEDDED) if source.startswith(EMBEDDED) else Path(source)
    path = local.expanduser()
    if path.is_file():
        return f"{path.suffix}{sha256_of([path])[0]}"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [str(file.relative_to(path)) for file in files]
    return json.dumps([names, sha256_of(files)]) if files else source


def _digest(names: Sequence[str], texts: Sequence[str]) -> str:
    """Sixteen hex digits over the moments that a pass makes and the texts that it reads."""
    digest = hashlib.sha256("\0".join(names).encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _save(path: Path, moment: SecondMoment, facts: Mapping[str, Any]) -> None:
    tensors = {"total": moment.total.cpu().contiguous(), "n_tokens": torch.tensor(moment.n_tokens)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(dict(facts))})


def _load(path: Path) -> SecondMoment | None:
    cached = saved_tensors(path, "total", "n_tokens")
    return SecondMoment(cached["total"], int(cached["n_tokens"])) if cached else None


def saved_tensors(path: Path | None, *names: str) -> dict[str, Tensor]:
    """The tensors of a file that holds at least `names`; none where it is missing or damaged, and made again then."""
    if path is None or not path.exists():
        return {}
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return {}
    return tensors if tensors.keys() >= set(names) else {}


def read_published(folder: Path, path: str) -> SecondMoment:
    """A moment that ROME, MEMIT or EasyEdit computed; nothing in the file is executed.

    Raises:
        UserError: no such file, or not in their format.
    """
    files = sorted(folder.glob(f"{path}_float*_mom2_*.npz"))
    if not files:
        raise UserError(f"method.statistics.published={folder}: there is no {path}_float32_mom2_*.npz")
    try:
        with np.load(files[-1], allow_pickle=False) as saved:
            return SecondMoment(torch.from_numpy(saved["mom2.mom2"]), int(saved["mom2.count"]))
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{files[-1]} is no second moment in the published format ({error})") from error


def _checked(moment: SecondMoment, model: PreTrainedModel, path: str) -> SecondMoment:
    m, _ = linear_sizes(model.get_submodule(path))
    if moment.total.shape != (m, m):
        raise UserError(f"method.statistics.published: {path} has {m} inputs, the file {tuple(moment.total.shape)}")
    return moment


# --- What the methods derive -------------------------------------------------------------------------------


def cholesky(moment: SecondMoment, ridge: float, device: torch.device) -> Tensor:
    """Lower factor of `C + ridge * trace(C)/m * I`, float64 `(m, m)`.

    Raises:
        UserError: it is not positive definite: there was too little text.
    """
    c = moment.mean.to(device, torch.float64)
    m = len(c)
    factor, failed = torch.linalg.cholesky_ex(c + ridge * c.diagonal().mean() * torch.eye(m, device=device))
    if failed or not all_finite(factor):
        raise UserError(
            f"the second moment of {m} inputs over {moment.n_tokens} tokens is not positive definite; take more "
            f"text (50 tokens per input are few), or set method.ridge above {ridge}, e.g. to 1e-6"
        )
    lower: Tensor = factor
    return lower
