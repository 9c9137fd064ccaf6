"""HoReN: a codebook read by normalized Hopfield retrieval (arXiv 2605.08143).

One linear module is hooked. Its input, pooled over the last prompt tokens and projected to the unit
sphere, is the query; its output receives the matched entry's value at the last prompt token.
Shapes: `B` sequences of `T` tokens, `m` input and `d` output size of the module, `C` entries.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from numpy.random import SeedSequence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.base import Action, Editor, EditRecord, Route
from horen_bench.editors.memory.adaptors import Adaptor, LoraAdaptor, VectorAdaptor
from horen_bench.editors.memory.codebook import Codebook
from horen_bench.editors.memory.hopfield import refine
from horen_bench.editors.memory.prompt_hook import PromptHook
from horen_bench.editors.memory.training import EarlyStopping, Trained, edit_loss, train_value
from horen_bench.errors import UserError
from horen_bench.models.architecture import check_module, is_last_layer
from horen_bench.prompts import (
    EncodedEdit,
    encode_edit,
    encode_prompts,
    last_prompt_positions,
    pad,
    pad_id_of,
)

LabelRule = Literal["tokens", "release"]

# Identical keys give equal scores up to the order of a dot product's additions; scores this close are a tie.
_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Matches:
    """Decisions for `B` queries, all `(B,)`: best entry, its score, whether it passes the threshold."""

    entries: Tensor
    scores: Tensor
    matched: Tensor


class HorenEditor(Editor):
    """HoReN on one model.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: seeds the initial values; edit `i` of a stream draws from `(seed, i)` alone.
        module: dotted path of the hooked linear module, e.g. `model.layers.29.mlp.down_proj`.
        threshold: tau; an entry acts if its score is strictly above it. A cosine in [-1, 1] if `normalize`.
        pooling_ratio: rho in [0, 1]; the query is the mean over the last `ceil(rho * P)` of `P` prompt
            tokens, at least one (0: the last token alone).
        normalize: project queries, keys and retrievals to the unit sphere; False is Table 10's ablation.
        hopfield: `beta` (> 0), `alpha` in [0, 1], `steps` (>= 0; 0: plain nearest key) and `eps` of the
            retrieval.
        adaptor: `vector` or `lora`, the form of a value.
        vector: `learning_rate` of vector values.
        lora: `learning_rate`, `rank` and `scale` of LoRA values.
        n_steps: most Adam steps per edit.
        early_stopping: `loss_bound` and `patience`, or None to take all steps as the release does.
        label_rule: `tokens` compares target token ids; `release` compares the mean of the label row, prompt
            positions counted as -100, as the published code does.

    Raises:
        UserError: the model has no such module, or a constant is out of its range.
    """

    release_mode: ClassVar[Literal["generate", "teacher_forced"]] = "generate"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        threshold: float,
        pooling_ratio: float,
        normalize: bool,
        hopfield: Mapping[str, Any],
        adaptor: Literal["vector", "lora"],
        vector: Mapping[str, Any],
        lora: Mapping[str, Any],
        n_steps: int,
        early_stopping: Mapping[str, Any] | None,
        label_rule: LabelRule,
    ) -> None:
        _check_ranges(threshold, pooling_ratio, normalize, hopfield, n_steps)
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.module_path = module
        self.threshold = threshold
        self.pooling_ratio = pooling_ratio
        self.normalize = normalize
        self.hopfield = dict(hopfield)
        self.n_steps = n_steps
        self.early_stopping = EarlyStopping(**early_stopping) if early_stopping else None
        self.label_rule: LabelRule = label_rule
        self.n_edits = 0
        linear = check_module(model, module, where="method.module")
        if not isinstance(linear, torch.nn.Linear):
            raise UserError(f"method.module={module} is a {type(linear).__name__}; a linear module is needed")
        self.adaptor = _adaptor(adaptor, linear.out_features, vector, lora)
        self.codebook = Codebook(linear.in_features, self.adaptor.shapes, linear.weight.device)
        self.hook = PromptHook(model, linear, self._respond)

    # --- Query (paper 2.2): pooled over prompt tokens only, then projected -----------------------------

    def query(self, inputs: Tensor, prompt_mask: Tensor) -> Tensor:
        """The unrefined query `q^(0)` of each sequence, float32 `(B, m)`.

        Args:
            inputs: the hooked module's input, `(B, T, m)`.
            prompt_mask: bool `(B, T)`, true on prompt tokens.
        """
        pooled = _suffix_mean(inputs, prompt_mask, self.pooling_ratio)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    @torch.no_grad()
    def queries(self, prompts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
        """Queries of tokenised prompts, `(len(prompts), m)`, read from the frozen network."""
        found: list[Tensor] = []

        def read(inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> None:
            found.append(self.query(inputs, prompt_mask))

        with self.hook.responding(read):
            for start in range(0, len(prompts), batch_size):
                rows = prompts[start : start + batch_size]
                batch = pad(rows, pad_id_of(self.tokenizer), device=self.model.device)
                self.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        return torch.cat(found)

    # --- Match (2.3): damped Hopfield refinement, strict threshold, newest entry wins ties -------------

    def match(self, queries: Tensor) -> Matches:
        """Route queries `(B, m)` against the codebook, which must hold an entry."""
        keys = self.codebook.keys
        refined = refine(queries, keys, normalize=self.normalize, **self.hopfield)
        scores = refined @ keys.T
        best = scores.amax(dim=1, keepdim=True)
        newest = len(self.codebook) - 1 - (scores >= best - _TIE).flip(dims=[1]).int().argmax(dim=1)
        return Matches(newest, best[:, 0], best[:, 0] > self.threshold)

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """The router's decision for each prompt."""
        if len(self.codebook) == 0:
            return [Route(None, math.nan, matched=False)] * len(prompts)
        ids = encode_prompts(self.tokenizer, prompts)
        return list(_as_routes(self.match(self.queries(ids)))) if ids else []

    # --- Inference: add the matched value at the last prompt token -------------------------------------

    def _respond(self, inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> Tensor | None:
        if len(self.codebook) == 0:
            return None
        matches = self.match(self.query(inputs, prompt_mask))
        rows = matches.matched.nonzero()[:, 0]
        if rows.numel() == 0:
            return None
        return self._written(outputs, prompt_mask, self.codebook.value(matches.entries[rows]), rows)

    def _written(self, outputs: Tensor, prompt_mask: Tensor, value: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Outputs with values `(R, ...)` added, in float32, at the last prompt token of `rows` `(R,)`."""
        columns = last_prompt_positions(prompt_mask)[rows]
        before = outputs[rows, columns].float()
        after = before + self.adaptor.added(value, before)
        return outputs.index_put((rows, columns), after.to(outputs.dtype))

    # --- Writing (2.4): route, then insert or fine-tune ------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases one by one."""
        return [self._edit_one(case) for case in cases]

    def _edit_one(self, case: EditCase) -> EditRecord:
        started = time.perf_counter()
        encoded = encode_edit(self.tokenizer, case.prompt, case.target)
        index, self.n_edits = self.n_edits, self.n_edits + 1
        record = partial(EditRecord, case.id)
        if not encoded.target:
            seconds = time.perf_counter() - started
            return record("failed", None, None, math.nan, 0, seconds, "the target has no token to write")
        query = self.queries([encoded.prompt])
        route = next(_as_routes(self.match(query))) if len(self.codebook) else None
        matched = route.entry if route and route.matched else None
        entry = matched if matched is not None and self._consistent(matched, encoded) else None
        action: Action = "inserted" if matched is None else "conflict" if entry is None else "fine_tuned"
        start = self.codebook.value(entry) if entry is not None else self._initial_value(index)
        trained = self._train(encoded, start)
        if entry is None:
            entry = self.codebook.append(query[0], trained.value, encoded.target, len(encoded.prompt))
        else:
            self.codebook.set_value(entry, trained.value)
        problem = None if trained.finite else "the loss was not finite; the last finite value was kept"
        seconds = time.perf_counter() - started
        return record(action, entry, route, trained.loss, trained.steps, seconds, problem)

    def _consistent(self, entry: int, edit: EncodedEdit) -> bool:
        """Whether the matched entry was created by the same target (branch ii)."""
        label, length = self.codebook.labels[entry], self.codebook.prompt_lengths[entry]
        if self.label_rule == "tokens":
            return label == edit.target
        return _label_row_mean(label, length) == _label_row_mean(edit.target, len(edit.prompt))

    def _initial_value(self, index: int) -> dict[str, Tensor]:
        seed = int(SeedSequence([self.seed, index]).generate_state(1)[0])
        value = self.adaptor.initial(torch.Generator().manual_seed(seed))
        return {name: tensor.to(self.codebook.keys.device) for name, tensor in value.items()}

    def _train(self, edit: EncodedEdit, start: Mapping[str, Tensor]) -> Trained:
        def loss_of(value: dict[str, Tensor]) -> Tensor:
            def respond(inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> Tensor:
                one = {name: tensor[None] for name, tensor in value.items()}
                return self._written(outputs, prompt_mask, one, outputs.new_zeros(1, dtype=torch.long))

            return edit_loss(self.model, self.hook, edit, respond)

        return train_value(
            start,
            loss_of,
            learning_rate=self.adaptor.learning_rate,
            n_steps=self.n_steps,
            early_stopping=self.early_stopping,
        )

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The codebook and the number of edits seen."""
        return {"n_edits": torch.tensor(self.n_edits), **self.codebook.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved codebook."""
        self.codebook.load_state_dict(state)
        self.n_edits = int(state["n_edits"])

    def detach(self) -> None:
        """Take the hook out."""
        self.hook.remove()

    def side_parameters(self) -> int:
        """Numbers in keys and values."""
        return self.codebook.numel()

    def warnings(self) -> list[str]:
        """The last block's limit, where it applies."""
        if not is_last_layer(self.model, self.module_path):
            return []
        return [
            f"{self.module_path} is in the last block: a value there can change the first target token only, "
            "so the score of longer targets is capped by what the base model continues"
        ]


def _suffix_mean(inputs: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mean of `(B, T, m)` over the last `max(1, ceil(ratio * P))` of a row's `P` true positions, float32."""
    n_prompt = mask.sum(dim=1)
    # The product is rounded first: 0.6 * 5 is 3.0000000000000004 and would pool a token too many.
    n_pooled = (n_prompt.double() * ratio).round(decimals=9).ceil().clamp(min=1)
    rank_from_end = n_prompt[:, None] - mask.cumsum(dim=1)
    pooled = mask & (rank_from_end < n_pooled[:, None])
    weights = pooled.float() / pooled.sum(dim=1, keepdim=True)
    return torch.einsum("bt,btm->bm", weights, inputs.float())


def _as_routes(matches: Matches) -> Iterator[Route]:
    columns = (matches.entries.tolist(), matches.scores.tolist(), matches.matched.tolist())
    return (Route(entry, score, matched) for entry, score, matched in zip(*columns, strict=True))


def _label_row_mean(target: Sequence[int], prompt_length: int) -> float:
    """Mean of a label row as the release builds it: -100 on the prompt, then the target ids."""
    return torch.tensor([-100] * prompt_length + list(target)).float().mean().item()


def _adaptor(kind: str, size: int, vector: Mapping[str, Any], lora: Mapping[str, Any]) -> Adaptor:
    if kind == "vector":
        return VectorAdaptor(size, **vector)
    if kind == "lora":
        return LoraAdaptor(size, **lora)
    raise UserError(f"method.adaptor must be 'vector' or 'lora', got '{kind}'")


def _check_ranges(
    threshold: float, pooling_ratio: float, normalize: bool, hopfield: Mapping[str, Any], n_steps: int
) -> None:
    if normalize and not -1 <= threshold <= 1:
        raise UserError(f"method.threshold must be in [-1, 1], got {threshold}; scores of unit vectors are cosines")
    if not 0 <= pooling_ratio <= 1:
        raise UserError(f"method.pooling_ratio must be in [0, 1], got {pooling_ratio}; 0 is the last token alone")
    if not hopfield["beta"] > 0:
        raise UserError(f"method.hopfield.beta must be > 0, got {hopfield['beta']}")
    if not 0 <= hopfield["alpha"] <= 1:
        raise UserError(f"method.hopfield.alpha must be in [0, 1], got {hopfield['alpha']}")
    if hopfield["steps"] < 0 or n_steps < 0:
        raise UserError("method.hopfield.steps and method.n_steps must not be negative")
