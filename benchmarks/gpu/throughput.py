"""Steps `llama` and `qwen`: HoReN on the shape of a real backbone, and where its time goes."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

from codebook_growth import growth
from common import Pair, backbone, cases, fill, horen, model_spec, seconds_of
from gpu.profile import profile_of
from gpu.suite import Figure, Step
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.evaluation.decoding import inference_ms
from horen_bench.evaluation.probes import probes_of
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.profiling import Stopwatch, peak_memory
from horen_bench.prompts import PromptEncoder
from work import ValueTraining, matrix_rate

# No score is above it, so that every edit is an insert, as nearly all are on a real model: the queries of random
# weights are all alike. Early stopping means nothing on them either, so all steps are taken.
_NEVER = 1.0


def run(step: Step) -> None:
    """In order of value, so that what is dropped when time runs out is what is missed least."""
    backbone = Backbone(step)
    for name in ("editing", "value training", "profile of a step", "key extraction", "evaluation", "growth"):
        step.measure(name, getattr(backbone, name.replace(" ", "_")))
    for size in step.settings["routing"]:
        step.measure(f"routing at C = {size:,}", partial(backbone.routing, size))
    step.measure("peak memory", backbone.peak)


class Backbone:
    """A backbone at random initialisation; built when a measurement first needs it."""

    def __init__(self, step: Step) -> None:
        self._settings = step.settings
        self._device = step.device
        self._name: str = step.settings["model"]

    @cached_property
    def _pair(self) -> Pair:
        return backbone(self._name, self._device)

    @cached_property
    def _training(self) -> ValueTraining:
        return ValueTraining(self._pair, model_spec(self._name).memory_module, cases(self._settings["n_edits"]))

    def _editor(self, engine: str) -> HorenEditor:
        return horen(self._pair, self._name, engine=engine, **self._changes())

    def _changes(self) -> dict[str, Any]:
        return {"threshold": _NEVER, "early_stopping": None, "n_steps": self._settings["n_steps"]}

    def editing(self) -> Iterator[Figure]:
        """Edits per second of both engines; each is warmed up by as many other edits in the same codebook."""
        n, n_plain = self._settings["n_edits"], self._settings["n_plain"]
        edits = cases(2 * n)
        editor = self._editor("parallel")
        editor.edit(edits[:n])
        watch = Stopwatch()
        editor.edit(edits[n:])
        parallel = watch.elapsed() / n
        editor.detach()
        yield Figure("parallel", 1 / parallel, "edits/s")
        yield Figure("parallel, one edit", 1000 * parallel, "ms")
        editor = self._editor("sequential")
        editor.edit(edits[:1])
        watch = Stopwatch()
        editor.edit(edits[1 : 1 + n_plain])
        sequential = watch.elapsed() / n_plain
        editor.detach()
        yield Figure("sequential, one edit", 1000 * sequential, "ms")
        yield Figure("ratio", sequential / parallel)

    def value_training(self) -> Iterator[Figure]:
        """Time and work of a step of all edits side by side."""
        speed = self._training.speed(self._settings["profiled_steps"])
        dtype = self._pair[0].dtype
        most = matrix_rate(dtype, self._device, 8192 if self._device == "cuda" else 256)
        yield Figure("values side by side", speed.batch, "values")
        yield Figure("reading the states", 1000 * speed.prepare, "ms")
        yield Figure("a step", 1000 * speed.step, "ms")
        yield Figure("rate", speed.rate / 1e12, "TFLOP/s")
        yield Figure("share of the matrix rate", speed.rate / most)

    def profile_of_a_step(self) -> Iterator[Figure]:
        """Kernels and waits of a step: those of a run of some steps less those of a run of one."""
        n_steps = self._settings["profiled_steps"] + 1
        self._training.run(1)
        few, many = (profile_of(partial(self._training.run, n), self._device) for n in (1, n_steps))
        step = many.less(few, n_steps - 1)
        yield Figure("time", 1000 * step.wall, "ms")
        yield Figure("device idle", step.idle)
        yield Figure("launches", step.launches)
        yield Figure("waits of the host", step.waits)
        for rank, (name, share) in enumerate(step.top(10), start=1):
            yield Figure(f"kernel {rank}", f"{share:.0%} {name[:120]}")

    def key_extraction(self) -> Iterator[Figure]:
        """Queries of the edit prompts, read from the layers up to the wrapped one."""
        editor = self._editor("parallel")
        prompts = editor.encoder.prompts([case.prompt for case in cases(self._settings["n_edits"])])
        seconds = seconds_of(lambda: editor.queries(prompts), 3)
        editor.detach()
        yield Figure("prompts", len(prompts) / seconds, "prompts/s")
        yield Figure("tokens", sum(map(len, prompts)) / seconds, "tokens/s")
        yield Figure("one edit", 1000 * seconds / len(prompts), "ms")

    def routing(self, size: int) -> Iterator[Figure]:
        """One query, and queries in blocks, against a codebook of a size."""
        editor = self._editor("parallel")
        fill(editor, size)
        block = min(editor.block_size(), size)
        queries = editor.codebook.keys[:block].float()
        single = seconds_of(lambda: editor.match(queries[:1]), 5)
        batched = seconds_of(lambda: editor.match(queries), 5) / block
        editor.detach()
        yield Figure("one query", 1000 * single, "ms")
        yield Figure("queries in blocks", 1 / batched, "queries/s")
        yield Figure("block", block, "queries")

    def growth(self) -> Iterator[Figure]:
        """What an edit takes in a large codebook, beside a small one."""
        rests: list[float] = []
        for size in self._settings["growth"]:
            edits = cases(2 * self._settings["n_edits"])
            at = growth(self._pair, self._name, size, edits, **self._changes())
            rests.append(at.rest)
            yield Figure(f"one edit at C = {size:,}", at.edit, "ms")
            yield Figure(f"its products at C = {size:,}", at.products, "ms")
        if rests:
            yield Figure("time apart from products", rests[-1] / rests[0], "of the smallest's")

    def evaluation(self) -> Iterator[Figure]:
        """Predictions of a model that holds edits, in batches and one by one."""
        edits = cases(self._settings["n_edits"])
        model, encoder = self._pair[0], PromptEncoder(self._pair[1])
        editor = self._editor("parallel")
        fill(editor, len(edits))
        probes = probes_of(edits)[: self._settings["probes"]]
        size, protocol = self._settings["batch_size"], protocol_of("greedy", "generate")
        evaluator = TokenMatchEvaluator(model=model, encoder=encoder, batch_size=size, protocol=protocol)
        evaluator.predict(probes)
        watch = Stopwatch()
        predictions = evaluator.predict(probes)
        seconds = watch.elapsed()
        yield Figure("batched", sum(len(prediction.ids) for prediction in predictions) / seconds, "tokens/s")
        yield Figure("probes", len(probes) / seconds, "probes/s")
        yield Figure("batch", size, "probes")
        yield Figure("inference_ms", inference_ms(model, encoder, probes), "ms")
        editor.detach()

    def peak(self) -> Iterator[Figure]:
        """The most memory that was in use, and the model's part of it."""
        parameters = sum(parameter.nbytes for parameter in self._pair[0].parameters())
        yield Figure("model", parameters / 2**30, "GiB")
        yield Figure("peak", peak_memory() / 2**30, "GiB")
