"""Step `correctness`: what tests show on the CPU, on small models of real architectures and on the device at hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import Pair, cases, horen, random_model
from gpu.scarce import scarce_memory
from gpu.suite import Figure, Step
from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.schema import TokenProtocol
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.probes import probes_of
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.models.partial import UpperLayers
from horen_bench.prompts import PromptEncoder
from work import ValueTraining

_CONSTANTS_OF = "llama31_8b"  # whose file in conf/model/ gives the constants that are not named here


def run(step: Step) -> None:
    """Each architecture in each dtype; then memory that does not do."""
    settings = step.settings
    for dtype in settings["dtypes"]:
        for name, architecture in settings["architectures"].items():
            whole = {**settings["common"], **architecture}
            step.measure(f"{name} {dtype}", partial(architecture_keeps_promises, step, name, whole, dtype))
    memory = settings["memory"]
    step.measure("memory: value training", lambda: training_in_scarce_memory(step, memory))
    step.measure("memory: evaluation", lambda: evaluation_in_scarce_memory(step, memory))
    step.measure("automatic batch", lambda: automatic_batch(step, memory))


def architecture_keeps_promises(step: Step, name: str, architecture: Mapping[str, Any], dtype: str) -> Iterator[Figure]:
    """One architecture in one dtype."""
    module = step.settings["modules"].get(name, step.settings["module"])
    yield from promises(Subject(random_model(architecture, dtype, step.device), module, step.settings))


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on trial: its tokenizer, the hooked module, and the step's settings."""

    pair: Pair
    module: str
    settings: Mapping[str, Any]

    def edits(self) -> list[EditCase]:
        """New facts, then some of them with the target of another, then with their own again."""
        n_new = 2 * self.settings["n_edits"] // 3
        new = cases(n_new)
        n_more = self.settings["n_edits"] - n_new
        changed = [replace(case, target=new[-1 - i].target) for i, case in enumerate(new[: n_more // 2])]
        return [*new, *changed, *new[: n_more - len(changed)]]

    def editor(self, engine: str) -> HorenEditor:
        """HoReN on it; only one at a time, as each hooks the model."""
        return horen(
            self.pair,
            _CONSTANTS_OF,
            engine=engine,
            module=self.module,
            threshold=self.settings["threshold"],
            n_steps=self.settings["n_steps"],
        )

    def predictions(self, edits: Sequence[EditCase]) -> list[Prediction]:
        """What the model predicts on all probes of some edits."""
        return _evaluator(self.pair, "greedy", 32).predict(probes_of(edits))

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of a fixed sequence."""
        model = self.pair[0]
        logits: Tensor = model(torch.arange(5, 21, device=model.device)[None], use_cache=False).logits
        return logits


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of an editor came to: records, predictions, and the state."""

    records: list[EditRecord]
    predictions: list[Prediction]
    state: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        subject: Subject,
        engine: str,
        slices: Iterable[Sequence[EditCase]],
        *,
        evaluated: bool = False,
        restarted: bool = False,
    ) -> "Outcome":
        """Edit slice by slice.

        Args:
            subject: the model.
            engine: of the editor.
            slices: the edits.
            evaluated: predict on all probes at the end.
            restarted: a fresh editor goes on from a saved state at each slice.
        """
        records: list[EditRecord] = []
        editor = subject.editor(engine)
        edits: list[EditCase] = []
        for part in slices:
            if restarted:
                state = editor.state_dict()
                editor.detach()
                editor = subject.editor(engine)
                editor.load_state_dict(state)
            records += editor.edit(part)
            edits += part
        outcome = cls(records, subject.predictions(edits) if evaluated else [], editor.state_dict())
        editor.detach()
        return outcome


def promises(subject: Subject) -> Iterator[Figure]:
    """Parallel equals sequential, detached is untouched, twice is the same, and so is a run that was resumed."""
    edits = subject.edits()
    half = len(edits) // 2
    before = subject.logits()
    parallel = Outcome.of(subject, "parallel", [edits], evaluated=True)
    yield Figure("detached bit for bit", float(torch.equal(before, subject.logits())))
    sequential = Outcome.of(subject, "sequential", [edits], evaluated=True)
    yield Figure("decisions equal", _share(map(_decision, parallel.records), map(_decision, sequential.records)))
    yield Figure("tokens equal", _share(_tokens(parallel.predictions), _tokens(sequential.predictions)))
    yield Figure("largest difference of a value", _difference(parallel.state, sequential.state))
    yield Figure("edits that matched an entry", sum(bool(r.route and r.route.matched) for r in parallel.records))
    twice = Outcome.of(subject, "parallel", [edits])
    yield Figure("two runs equal", float(_equal(parallel.state, twice.state)))
    whole = Outcome.of(subject, "parallel", [edits[:half], edits[half:]])
    resumed = Outcome.of(subject, "parallel", [edits[:half], edits[half:]], restarted=True)
    yield Figure("resumed run equal", float(_equal(whole.state, resumed.state)))


def training_in_scarce_memory(step: Step, memory: Mapping[str, Any]) -> Iterator[Figure]:
    """All values in one batch, for which the memory then does not do."""
    training = ValueTraining(_roomy_model(step, memory), _module(memory), cases(memory["n_edits"]))
    expected: dict[int, Tensor] = {}

    def train() -> None:
        expected.update(training.run(memory["n_steps"], memory["n_edits"]))

    states = (UpperLayers, "losses", lambda _self, states, _added: len(states))
    with scarce_memory(step.device, train, memory["room"], states) as errors:
        values = training.run(memory["n_steps"], memory["n_edits"])
    yield Figure("out-of-memory errors survived", errors())
    far = max(float((values[i] - value).abs().max() / value.abs().max()) for i, value in expected.items())
    yield Figure("largest difference of a value", far)
    yield Figure("results equal", float(values.keys() == expected.keys() and far < 0.05))


def evaluation_in_scarce_memory(step: Step, memory: Mapping[str, Any]) -> Iterator[Figure]:
    """All probes in one batch, for which the memory then does not do."""
    probes = probes_of(cases(memory["n_probes"]))[: memory["n_probes"]]
    evaluator = _evaluator(_roomy_model(step, memory), "teacher_forced", len(probes))
    expected: list[Prediction] = []
    batches = (TokenMatchEvaluator, "predict_batch", lambda _self, batch: len(batch))

    def predict() -> None:
        expected.extend(evaluator.predict(probes))

    with scarce_memory(step.device, predict, memory["room"], batches) as errors:
        predictions = evaluator.predict(probes)
    yield Figure("out-of-memory errors survived", errors())
    share = _share(_tokens(predictions), _tokens(expected))
    yield Figure("tokens equal", share)
    yield Figure("results equal", float(len(predictions) == len(probes) and share > 0.99))


def automatic_batch(step: Step, memory: Mapping[str, Any]) -> Iterator[Figure]:
    """The batch that the GPU is guessed to have room for, before and after a run: what is free must not count."""
    training = ValueTraining(_roomy_model(step, memory), _module(memory), cases(memory["n_edits"]))
    yield Figure("values side by side", training.batch(), "values")
    training.run(memory["n_steps"], None)
    yield Figure("values side by side, after a run", training.batch(), "values")


def _roomy_model(step: Step, memory: Mapping[str, Any]) -> Pair:
    return random_model(memory["architecture"], "float32", step.device)


def _evaluator(pair: Pair, protocol: TokenProtocol, batch_size: int) -> TokenMatchEvaluator:
    model, tokenizer = pair
    rule = protocol_of(protocol, "generate")
    return TokenMatchEvaluator(model=model, encoder=PromptEncoder(tokenizer), batch_size=batch_size, protocol=rule)


def _module(memory: Mapping[str, Any]) -> str:
    return f"model.layers.{memory['architecture']['num_hidden_layers'] - 2}.mlp.down_proj"


def _decision(record: EditRecord) -> tuple[str, int | None]:
    return record.action, record.entry


def _tokens(predictions: Sequence[Prediction]) -> Iterator[int]:
    return (token for prediction in predictions for token in prediction.ids)


def _share(ours: Iterable[object], theirs: Iterable[object]) -> float:
    """Share of items that are equal, place by place; missing ones are not."""
    a, b = list(ours), list(theirs)
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(1, len(a), len(b))


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def _difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference between values, over the largest value; of the entries that both have."""
    a, b = state["value.vector"], other["value.vector"]
    n = min(len(a), len(b))
    return float((a[:n] - b[:n]).abs().max() / b[:n].abs().max())
