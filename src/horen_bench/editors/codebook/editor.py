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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from numpy.random import SeedSequence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord, Route
from horen_bench.editors.base import Editor
from horen_bench.editors.codebook.adaptors import Adaptor
from horen_bench.editors.codebook.config import CodebookConfig
from horen_bench.editors.codebook.entries import Codebook
from horen_bench.editors.codebook.parallel import train_values
from horen_bench.editors.codebook.queries import suffix_mean
from horen_bench.editors.codebook.routing import Agreement, Decision, Matches, RouterDescription
from horen_bench.editors.codebook.slices import Slice
from horen_bench.editors.codebook.training import Schedule, TrainedValue, Value, ValueJob, train_on_whole_model
from horen_bench.models.architecture import check_linear, compute_dtype, device_of, is_last_layer, linear_sizes
from horen_bench.models.padding import together
from horen_bench.models.partial import FastPath, UpperLayers
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import EncodedEdit, PromptEncoder, last_prompt_positions, pad

CodebookConfigT = TypeVar("CodebookConfigT", bound=CodebookConfig)

# Edits that the parallel engine likes to get at once: of a large model fewer, so that a slice takes about a minute.
_MOST_EDITS = 1024
_PARAMETERS = {"cpu": 2**32, "cuda": 2**41}  # of the model times edits, roughly a minute's work
_FEWEST_EDITS = {"cpu": 16, "cuda": 128}  # still enough rows side by side
_MOST_QUERIES = 256  # routed at once, and
_MOST_SCORES = 1 << 24  # entries of a score matrix
_NO_TOKEN = "prompt or target has no token"
_NO_KEY = "the prompt's key, or the module's output there, is not finite; nothing was written"


class CodebookEditor(Editor[CodebookConfigT]):
    """An editor with a codebook at one linear module; the model's weights are never changed.

    The initial value of edit `i` of a stream is drawn from `(seed, i)` alone.

    Attributes:
        agreements: what each `label_rule` means.
        codebook: the entries.
        adaptor: the form of a value.
        hook: what acts on the module.
        n_edits: edits seen so far, failed ones included.

    Raises:
        UserError: the model has no such module, or it is not linear.
    """

    codebook_class: ClassVar[type[Codebook]] = Codebook
    agreements: ClassVar[Mapping[str, Agreement]]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: CodebookConfigT,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        linear = check_linear(model, config.module, where="method.module")
        self.slice_size = parallel_slice(model) if config.engine == "parallel" else 1
        n_inputs, n_outputs = linear_sizes(linear)
        self.adaptor = self.new_adaptor(n_outputs)
        # Keys are means of the model's activations, so its own dtype holds them at half the memory of float32.
        kind = (device_of(linear), compute_dtype(model, linear))
        self.codebook = self.codebook_class(n_inputs, self.adaptor.shapes, *kind)
        self.hook = self.new_hook()
        self.n_edits = 0
        self._schedule = Schedule(self.adaptor.learning_rate, config.n_steps, config.early_stopping)
        self._fast = FastPath(
            partial(UpperLayers, model, config.module),
            "values were trained one by one on the whole model",
            wanted=config.engine == "parallel",
        )

    # --- What a method adds ----------------------------------------------------------------------------

    @abstractmethod
    def new_adaptor(self, size: int) -> Adaptor:
        """The form of a value, given the module's output size `d`."""

    def new_hook(self) -> PromptHook:
        """The hook that lets entries act."""
        return PromptHook(self.model, self.model.get_submodule(self.config.module), self._respond)

    @abstractmethod
    def match(self, queries: Tensor) -> Matches:
        """Route queries `(B, m)` against the codebook, which holds an entry."""

    @abstractmethod
    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Query `i` against key `i`, as `match` scores them, `(B,)`, in the measure of `describe_router`.

        Args:
            queries: unrefined, `(B, m)`.
            keys: `(B, m)`, of entries of the codebook.
        """

    @abstractmethod
    def describe_router(self) -> RouterDescription:
        """How it compares a query with a key, in words."""

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
        pooled = suffix_mean(inputs, prompt_mask, self.config.pooling_ratio)
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def _key(self, inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> Tensor:
        """The queries `(B, m)`; NaN where a value could not act, because the module's own output is not finite."""
        last = outputs[range(len(outputs)), last_prompt_positions(prompt_mask)]
        return torch.where(last.isfinite().all(dim=1, keepdim=True), self.query(inputs, prompt_mask), torch.nan)

    def queries(self, prompts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
        """Queries of tokenised prompts, `(len(prompts), m)`, read from the frozen network."""
        if not prompts:
            return self.codebook.keys[:0].float()
        return self.read_at_prompts(prompts, self._key, batch_size)

    def read_at_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        reader: Callable[[Tensor, Tensor, Tensor], Tensor],
        batch_size: int = 64,
    ) -> Tensor:
        """What `reader` makes `(B, ...)` of the hooked module's input, its own output and the prompt mask, row by row.

        Args:
            prompts: token ids, at least one row.
            reader: called for each batch.
            batch_size: most rows of one; what may not share one does not.
        """
        groups = together(self.model, [len(prompt) for prompt in prompts])
        batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
        rows = ([prompts[i] for i in batch] for batch in batches)
        readings = torch.cat(
            self.hook.read((pad(part, self.encoder.pad_id, device=self.model.device) for part in rows), reader)
        )
        return readings[torch.tensor([i for batch in batches for i in batch], device=readings.device).argsort()]

    # --- Routing ---------------------------------------------------------------------------------------

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """The router's decision for each prompt."""
        if len(self.codebook) == 0:
            return [Route(None, math.nan, matched=False)] * len(prompts)
        queries = self.queries(self.encoder.prompts(prompts))
        routes: list[Route | None] = []
        for start in range(0, len(queries), self.block_size()):
            routes += self.as_routes(self.routed(queries[start : start + self.block_size()]))
        return routes

    def block_size(self) -> int:
        """Queries that are routed at once, so that no score matrix grows past a fixed size with the codebook."""
        return max(1, min(_MOST_QUERIES, _MOST_SCORES // max(1, len(self.codebook))))

    def routed(self, queries: Tensor) -> Matches:
        """As `match`; what can be no key matches no entry, and has the score NaN."""
        usable = self.usable(queries)
        matches = self.match(torch.where(usable[:, None], queries, 0))
        return Matches(matches.entries, matches.scores.masked_fill(~usable, torch.nan), matches.matched & usable)

    def usable(self, queries: Tensor) -> Tensor:
        """Of each query `(B, m)`, whether it can be a key: of finite length, and on the unit sphere a direction."""
        fine: Tensor = torch.linalg.vector_norm(queries, dim=1).isfinite()
        if self.config.normalize:
            fine &= queries.any(dim=1)  # activations too large to be squared come out as zero
        return fine

    def as_routes(self, matches: Matches) -> list[Route]:
        """Matches as plain values."""
        columns = (matches.entries.tolist(), matches.scores.tolist(), matches.matched.tolist())
        versions = self.codebook.versions
        return [
            Route(None if math.isnan(score) else entry, score, hit, versions[entry])
            for entry, score, hit in zip(*columns, strict=True)
        ]

    # --- Inference: the matched value at the last prompt token -------------------------------------------

    def _respond(self, inputs: Tensor, outputs: Tensor, prompt_mask: Tensor) -> Tensor | None:
        if len(self.codebook) == 0:
            return None
        matches = self.routed(self._key(inputs, outputs, prompt_mask))
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
        take the same decisions and find the same values. An edit whose key or loss is not finite has failed and leaves
        no entry: later ones are routed as if it had never been there.
        """
        if self.config.engine == "sequential":
            return [record for case in cases for record in self._write([case])]
        return self._write(cases)

    def _write(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        started = time.perf_counter()
        encoded = [self.encoder.edit(case.prompt, case.target) for case in cases]
        problems = {i: _NO_TOKEN for i, edit in enumerate(encoded) if not (edit.prompt and edit.target)}
        kept = [i for i in range(len(cases)) if i not in problems]
        queries = self.queries([encoded[i].prompt for i in kept])
        usable = self.usable(queries).tolist()
        problems |= {i: _NO_KEY for i, fine in zip(kept, usable, strict=True) if not fine}
        if not all(usable):
            kept, queries = [i for i in kept if i not in problems], queries[usable]
        written = self._written_slice({i: encoded[i] for i in kept}, queries)
        self.n_edits += len(cases)
        seconds = (time.perf_counter() - started) / max(1, len(cases))
        return [
            EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, problems[i])
            if i in problems
            else _record(case, written.decisions[i], written.result(i), seconds)
            for i, case in enumerate(cases)
        ]

    def _written_slice(self, edits: Mapping[int, EncodedEdit], queries: Tensor) -> Slice:
        """Decide where edits, by position, with queries `(len(edits), m)`, are written, and write them."""
        rows = {i: row for row, i in enumerate(edits)}

        def decide(positions: Sequence[int]) -> list[Decision]:
            part = slice(rows[positions[0]], rows[positions[-1]] + 1)
            return self.decide([edits[i] for i in positions], queries[part])

        def start(entry: int, position: int) -> Value:
            return self._start_value(entry, self.n_edits + position)

        written = Slice(self.codebook, edits, decide, start, self._trained)
        written.settle()
        written.commit()
        return written

    def consistent(self, entry: int, edit: EncodedEdit) -> bool:
        """Whether the target that made an entry agrees with the edit's."""
        return self.agreements[self.config.label_rule](self.codebook, entry, edit)

    def _trained(self, jobs: Sequence[ValueJob]) -> Iterator[tuple[ValueJob, TrainedValue]]:
        if upper := self._fast.layers(max((len(job.edit.ids) for job in jobs), default=0)):
            return train_values(jobs, upper, self.adaptor.added, self._schedule, self.config.train_batch)
        whole = (self.model, self.hook, self._written, self._schedule)
        return ((job, train_on_whole_model(job, *whole)) for job in jobs)

    def _start_value(self, entry: int, index: int) -> dict[str, Tensor]:
        """The entry's value, or a first one for edit `index` of the stream."""
        if self.codebook.versions[entry]:
            return self.codebook.value(entry)
        return self._initial_value(index)

    def _initial_value(self, index: int) -> dict[str, Tensor]:
        seed = int(SeedSequence([self.seed, index]).generate_state(1)[0])
        value = self.adaptor.initial(torch.Generator().manual_seed(seed))
        return {name: tensor.to(self.codebook.keys.device) for name, tensor in value.items()}

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
        """The slow path and the last block's limit, where they apply."""
        sentences = self._fast.warnings()
        if is_last_layer(self.model, self.config.module):
            sentences.append(
                f"{self.config.module} is in the last block: a value there can change the first target token only, "
                "so the score of longer targets is capped by what the base model continues"
            )
        return sentences


def _record(case: EditCase, decision: Decision, trained: TrainedValue | None, seconds: float) -> EditRecord:
    if trained is None:
        return EditRecord(case.id, "failed", None, decision.route, math.nan, 0, seconds, decision.problem)
    loss, steps = trained.loss, trained.steps
    return EditRecord(case.id, decision.action, decision.entry, decision.route, loss, steps, seconds, decision.problem)


def parallel_slice(model: PreTrainedModel) -> int:
    """How many edits the parallel engine gets at once: of the model's size and kind of device alone.

    Where slices are cut changes the last digits of values, so neither the clock nor free memory has a say.
    """
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return max(_FEWEST_EDITS[kind], min(_MOST_EDITS, _PARAMETERS[kind] // parameters))
