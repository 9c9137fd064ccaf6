"""What every codebook editor does: read queries, write values, keep entries; a method adds how it routes.

One linear module is hooked. Its input, pooled over the last prompt tokens, is the query; its output receives the
matched entry's value at the last prompt token. Routing depends on the frozen network alone, and values of different
entries are independent: so a stream's decisions are all taken first, and then its values are trained, side by side
(`engine=parallel`) or one by one on the whole model (`engine=sequential`).
Shapes: `B` sequences of `T` tokens, `m` input and `d` output size of the module, `C` entries.
"""

import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from numpy.random import SeedSequence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.base import Action, Editor, EditRecord, Route, check_choice
from horen_bench.editors.codebook.adaptors import Adaptor
from horen_bench.editors.codebook.entries import Codebook
from horen_bench.editors.codebook.parallel import Job, train_values
from horen_bench.editors.codebook.training import EarlyStopping, Schedule, Trained, edit_loss, train_value
from horen_bench.errors import UserError
from horen_bench.models.architecture import check_linear, decoder_layer_index, is_last_layer
from horen_bench.models.partial import NotSupportedError, UpperLayers
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import EncodedEdit, encode_edit, encode_prompts, last_prompt_positions, pad, pad_id_of

LabelRule = Literal["tokens", "release"]
Engine = Literal["parallel", "sequential"]

_PARALLEL_SLICE = 1024  # edits that the parallel engine likes to get at once
_MOST_QUERIES = 256  # routed at once, and
_MOST_SCORES = 1 << 24  # entries of a score matrix


@dataclass(frozen=True, slots=True)
class Matches:
    """Decisions for `B` queries, all `(B,)`: best entry, its score, whether it passes the threshold."""

    entries: Tensor
    scores: Tensor
    matched: Tensor


class _QueriesRead(Exception):  # noqa: N818 - no error, it ends a forward pass early
    """The queries of a batch are known."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where an edit is written, and the routing that led there (None while the codebook was empty).

    An edit that `failed` has its entry, but no query of its own reaches it: the value stays as it starts. `problem` is
    the sentence about it.
    """

    action: Action
    entry: int
    route: Route | None
    problem: str | None = None


class CodebookEditor(Editor):
    """An editor with a codebook at one linear module.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: seeds the initial values; edit `i` of a stream draws from `(seed, i)` alone.
        module: dotted path of the hooked linear module, e.g. `model.layers.29.mlp.down_proj`.
        pooling_ratio: rho in [0, 1]; the query is the mean over the last `ceil(rho * P)` of `P` prompt tokens, at least
            one (0: the last token alone).
        normalize: project queries to the unit sphere.
        adaptor: makes the form of a value, given the module's output size `d`.
        n_steps: most Adam steps per edit.
        early_stopping: `loss_bound` and `patience`, or None to take all steps.
        label_rule: `tokens` compares target token ids; `release` compares the mean of the label row, prompt positions
            counted as -100, as the published code does.
        engine: `parallel` trains the values of many edits side by side on the layers above the module; `sequential`
            one at a time on the whole model. Decisions are the same, values up to floating-point order.
        train_batch: values trained side by side; None finds it from the free memory.

    Raises:
        UserError: the model has no such module, or a constant is out of its range.
    """

    release_mode: ClassVar[Literal["generate", "teacher_forced"]] = "generate"
    codebook_class: ClassVar[type[Codebook]] = Codebook

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        pooling_ratio: float,
        normalize: bool,
        adaptor: Callable[[int], Adaptor],
        n_steps: int,
        early_stopping: Mapping[str, float] | None,
        label_rule: LabelRule,
        engine: Engine,
        train_batch: int | None,
    ) -> None:
        check_choice("method.engine", engine, ("parallel", "sequential"))
        check_choice("method.label_rule", label_rule, ("tokens", "release"))
        if not 0 <= pooling_ratio <= 1:
            raise UserError(f"method.pooling_ratio must be in [0, 1], got {pooling_ratio}; 0 is the last token alone")
        linear = check_linear(model, module, where="method.module")
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.module_path = module
        self.pooling_ratio = pooling_ratio
        self.normalize = normalize
        self.label_rule: LabelRule = label_rule
        self.engine: Engine = engine
        self.train_batch = train_batch
        self.slice_size = _PARALLEL_SLICE if engine == "parallel" else 1
        self.adaptor = adaptor(linear.out_features)
        stopping = EarlyStopping(**early_stopping) if early_stopping else None  # type: ignore[arg-type]
        self.schedule = Schedule(self.adaptor.learning_rate, n_steps, stopping)
        self.n_edits = 0
        self._linear = linear
        self._upper: UpperLayers | None = None
        self._no_upper: str | None = None
        # Keys are means of the model's activations, so its own dtype holds them at half the memory of float32.
        weight = linear.weight
        self.codebook = self.codebook_class(linear.in_features, self.adaptor.shapes, weight.device, weight.dtype)
        self.hook = PromptHook(model, linear, self._respond)

    # --- What a method adds ----------------------------------------------------------------------------

    @abstractmethod
    def match(self, queries: Tensor) -> Matches:
        """Route queries `(B, m)` against the codebook, which holds an entry."""

    @abstractmethod
    def decide(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        """Where each edit is written, taken one by one in order; makes the new entries, without values.

        Args:
            edits: the edits.
            queries: theirs, `(len(edits), m)`.
        """

    # --- Query: pooled over prompt tokens only, then projected --------------------------------------------

    def query(self, inputs: Tensor, prompt_mask: Tensor) -> Tensor:
        """The unrefined query `q^(0)` of each sequence, float32 `(B, m)`.

        Args:
            inputs: the hooked module's input, `(B, T, m)`.
            prompt_mask: bool `(B, T)`, true on prompt tokens.
        """
        pooled = _suffix_mean(inputs, prompt_mask, self.pooling_ratio)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def queries(self, prompts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
        """Queries of tokenised prompts, `(len(prompts), m)`, read from the frozen network."""
        found = self.read_at_prompts(prompts, lambda inputs, _, mask: self.query(inputs, mask), batch_size)
        return torch.cat(found) if found else self.codebook.keys[:0].float()

    @torch.no_grad()
    def read_at_prompts(
        self, prompts: Sequence[Sequence[int]], read: Callable[[Tensor, Tensor, Tensor], Tensor], batch_size: int = 64
    ) -> list[Tensor]:
        """What `read` makes of the hooked module's input, its own output and the prompt mask, batch by batch."""
        found: list[Tensor] = []

        def respond(inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> None:
            found.append(read(inputs, outputs, prompt_mask))
            raise _QueriesRead  # the layers above have nothing to add

        with self.hook.responding(respond):
            for start in range(0, len(prompts), batch_size):
                rows = prompts[start : start + batch_size]
                batch = pad(rows, pad_id_of(self.tokenizer), device=self.model.device)
                with suppress(_QueriesRead):
                    self.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        return found

    # --- Routing ---------------------------------------------------------------------------------------

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """The router's decision for each prompt."""
        if len(self.codebook) == 0:
            return [Route(None, math.nan, matched=False)] * len(prompts)
        queries = self.queries(encode_prompts(self.tokenizer, prompts))
        found: list[Route | None] = []
        for start in range(0, len(queries), self.block_size()):
            found += self.as_routes(self.match(queries[start : start + self.block_size()]))
        return found

    def block_size(self) -> int:
        """Queries that are routed at once, so that no score matrix grows past a fixed size with the codebook."""
        return max(1, min(_MOST_QUERIES, _MOST_SCORES // max(1, len(self.codebook))))

    def as_routes(self, matches: Matches) -> list[Route]:
        """Matches as plain values."""
        columns = (matches.entries.tolist(), matches.scores.tolist(), matches.matched.tolist())
        versions = self.codebook.versions
        return [Route(entry, score, hit, versions[entry]) for entry, score, hit in zip(*columns, strict=True)]

    # --- Inference: the matched value at the last prompt token -------------------------------------------

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

    # --- Writing -----------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in order: routing decisions first, then all values, chains on one entry in waves.

        Routing depends on the frozen network alone and values of different entries are independent, so both engines
        take the same decisions and find the same values.
        """
        if self.engine == "sequential":
            return [record for case in cases for record in self._write([case])]
        return self._write(cases)

    def _write(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        started = time.perf_counter()
        edits = [encode_edit(self.tokenizer, case.prompt, case.target) for case in cases]
        kept = [i for i, edit in enumerate(edits) if edit.prompt and edit.target]
        first, self.n_edits = self.n_edits, self.n_edits + len(cases)
        queries = self.queries([edits[i].prompt for i in kept])
        decisions = dict(zip(kept, self.decide([edits[i] for i in kept], queries), strict=True))
        lost = {i for i in kept if decisions[i].action == "failed"}
        for i in lost:
            self.codebook.set_value(decisions[i].entry, self._start_value(decisions[i].entry, first + i))
        trained = self._train_in_waves({i: decisions[i].entry for i in kept if i not in lost}, edits, first)
        seconds = (time.perf_counter() - started) / max(1, len(cases))
        return [
            _record(case, decisions[i], trained.get(i), seconds) if i in decisions else _not_written(case, seconds)
            for i, case in enumerate(cases)
        ]

    def consistent(self, entry: int, edit: EncodedEdit) -> bool:
        """Whether an entry was created by the same target as the edit's."""
        label, length = self.codebook.labels[entry], self.codebook.prompt_lengths[entry]
        if self.label_rule == "tokens":
            return label == edit.target
        return _label_row_mean(label, length) == _label_row_mean(edit.target, len(edit.prompt))

    def _train_in_waves(
        self, entries: Mapping[int, int], edits: Sequence[EncodedEdit], first: int
    ) -> dict[int, Trained]:
        """Train the value of each edit's entry; edits of one entry follow each other, all others go side by side.

        Args:
            entries: the entry that each edit, by position, is written to.
            edits: all edits.
            first: index in the stream of the edit at position 0.
        """
        chains: dict[int, deque[int]] = {}
        for position, entry in entries.items():
            chains.setdefault(entry, deque()).append(position)
        trained: dict[int, Trained] = {}
        while chains:
            wave = {chain.popleft(): entry for entry, chain in chains.items()}
            chains = {entry: chain for entry, chain in chains.items() if chain}
            jobs = [Job(i, edits[i], self._start_value(entry, first + i)) for i, entry in wave.items()]
            for job, result in self._train(jobs):
                trained[job.position] = result
                self.codebook.set_value(wave[job.position], result.value)
        return trained

    def _start_value(self, entry: int, index: int) -> dict[str, Tensor]:
        """The entry's value, or a first one for edit `index` of the stream."""
        if self.codebook.versions[entry]:
            return self.codebook.value(entry)
        return self._initial_value(index)

    def _initial_value(self, index: int) -> dict[str, Tensor]:
        seed = int(SeedSequence([self.seed, index]).generate_state(1)[0])
        value = self.adaptor.initial(torch.Generator().manual_seed(seed))
        return {name: tensor.to(self.codebook.keys.device) for name, tensor in value.items()}

    def _train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Trained]]:
        upper = self._upper_layers() if self.engine == "parallel" else None
        if upper is None:
            return ((job, self._train_plainly(job)) for job in jobs)
        return train_values(jobs, upper, self.adaptor.added, self.schedule, self.train_batch)

    def _upper_layers(self) -> UpperLayers | None:
        """The fast path's layers, or None where the model does not fit it; then `warnings` says so."""
        if self._upper is None and self._no_upper is None:
            try:
                self._upper = UpperLayers(self.model, self._linear, _layer_of(self.module_path))
            except NotSupportedError as reason:
                self._no_upper = f"values were trained one by one on the whole model: {reason}"
        return self._upper

    def _train_plainly(self, job: Job) -> Trained:
        """One value on the whole model, one sequence at a time: the path that the fast one is compared with."""

        def loss_of(value: dict[str, Tensor]) -> Tensor:
            def respond(inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> Tensor:
                one = {name: tensor[None] for name, tensor in value.items()}
                return self._written(outputs, prompt_mask, one, outputs.new_zeros(1, dtype=torch.long))

            return edit_loss(self.model, self.hook, job.edit, respond)

        return train_value(job.start, loss_of, self.schedule)

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The codebook and the number of edits seen."""
        return {"n_edits": torch.tensor(self.n_edits), **self.codebook.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved codebook."""
        if "n_edits" not in state:
            raise ValueError("the state lacks 'n_edits'; it is not one of this editor's")
        self.codebook.load_state_dict(state)
        self.n_edits = int(state["n_edits"])

    def detach(self) -> None:
        """Take the hook out."""
        self.hook.remove()

    def side_parameters(self) -> int:
        """Numbers in keys and values."""
        return self.codebook.numel()

    def side_memory(self) -> dict[str, int]:
        """Keys (with their radii, where they have one) and values."""
        values = sum(value.numel() for value in self.codebook.values.values())
        return {"keys": self.codebook.numel() - values, "values": values, "modified": 0}

    def warnings(self) -> list[str]:
        """The last block's limit, where it applies."""
        found = [self._no_upper] if self._no_upper else []
        if is_last_layer(self.model, self.module_path):
            found.append(
                f"{self.module_path} is in the last block: a value there can change the first target token only, "
                "so the score of longer targets is capped by what the base model continues"
            )
        return found


def _suffix_mean(inputs: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mean of `(B, T, m)` over the last `max(1, ceil(ratio * P))` of a row's `P` true positions, float32."""
    n_prompt = mask.sum(dim=1)
    # The product is rounded first: 0.14 * 50 is 7.000000000000001 and would pool a token too many.
    n_pooled = (n_prompt.double() * ratio).round(decimals=9).ceil().clamp(min=1)
    rank_from_end = n_prompt[:, None] - mask.cumsum(dim=1)
    pooled = mask & (rank_from_end < n_pooled[:, None])
    weights = pooled.float() / pooled.sum(dim=1, keepdim=True)
    return torch.einsum("bt,btm->bm", weights, inputs.float())


def _record(case: EditCase, decision: Decision, trained: Trained | None, seconds: float) -> EditRecord:
    if trained is None:
        return EditRecord(case.id, "failed", None, decision.route, math.nan, 0, seconds, decision.problem)
    problem = decision.problem if trained.finite else "the loss was not finite; the last finite value was kept"
    loss, steps = trained.loss, trained.steps
    return EditRecord(case.id, decision.action, decision.entry, decision.route, loss, steps, seconds, problem)


def _not_written(case: EditCase, seconds: float) -> EditRecord:
    return EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, "prompt or target has no token")


def _layer_of(path: str) -> int:
    layer = decoder_layer_index(path)
    if layer is None:
        raise NotSupportedError(f"{path} is in no numbered layer")
    return layer


def _label_row_mean(target: Sequence[int], prompt_length: int) -> float:
    """Mean of a label row as the release builds it: -100 on the prompt, then the target ids."""
    return torch.tensor([-100] * prompt_length + list(target)).float().mean().item()
