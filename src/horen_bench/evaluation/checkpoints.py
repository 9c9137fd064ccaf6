"""A run's evaluation: which probes of a prefix, under which protocol, with which warnings."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from horen_bench.cases import EditCase, Route
from horen_bench.config.schema import RunConfig
from horen_bench.datasets.audit import dominating_mention, paraphrase_warnings, touched_probes
from horen_bench.errors import UserError
from horen_bench.evaluation.aggregate import Evaluated, per_probe
from horen_bench.evaluation.cache import PredictionCache, base_predictions
from horen_bench.evaluation.evaluator import Evaluator
from horen_bench.evaluation.long_form import LongFormEvaluator, TextScorer
from horen_bench.evaluation.probes import CaseProbe, probes_of, sample
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.metrics.similarity import BertScoreF1, MiniLmCosine, free_device
from horen_bench.models.context import ContextLimit, named
from horen_bench.models.loading import LoadedModel
from horen_bench.profiling import Stopwatch
from horen_bench.progress import Bars

_PREDICTING = 2  # in the names of kept predictions; one more whenever the program predicts otherwise than before


class CheckpointEvaluation:
    """Evaluates prefixes of a stream under the protocols of a run.

    Built while the model is unedited, whose predictions are made then. A probe that does not fit the model's context is
    left out of its score, and named.

    Args:
        config: of the run.
        loaded: the unedited model; the same object is evaluated later, edited.
        cases: the stream.
        checkpoints: protocols by number of edits.
        bars: where progress is shown.

    Attributes:
        limit: of the model's context.
        probes: all that may be evaluated and fit the context with their answers, in case order.

    Raises:
        UserError: the context has room for no probe.
    """

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedModel,
        cases: Sequence[EditCase],
        checkpoints: Mapping[int, Sequence[str]],
        bars: Bars,
    ) -> None:
        self._config = config
        self.limit = ContextLimit.of(loaded)
        self._cases = cases
        self._caches: dict[str, PredictionCache] = {}
        every = probes_of(cases, sorted(self._sampled(checkpoints)))
        self.probes = [probe for probe in every if self.limit.holds(probe.prompt, probe.answer)]
        self._fitting: dict[str, list[CaseProbe]] = {}
        self._too_long: dict[str, list[CaseProbe]] = {}
        for protocol in dict.fromkeys(name for names in checkpoints.values() for name in names):
            positions = self._sampled(n for n, names in checkpoints.items() if protocol in names)
            probes = self._sorted_out(protocol, _about(every, positions))
            evaluator = evaluator_of(protocol, config, loaded)
            base = base_predictions(evaluator, probes, _base_file(config, loaded, evaluator), bars)
            self._caches[protocol] = PredictionCache(evaluator, base, reuse=config.reuse)

    def at(
        self, n: int, protocol: str, routes_of: Callable[[Sequence[str]], list[Route | None]], bars: Bars
    ) -> Evaluated:
        """Evaluate the model, which has the first `n` edits, under a protocol.

        Args:
            n: number of edits.
            protocol: its name.
            routes_of: what the editor's router decides for prompts.
            bars: where progress is shown.
        """
        cache, prefix = self._caches[protocol], self._cases[:n]
        touches = touched_probes(prefix)
        touched = {(each.case, each.probe.prompt) for each in touches}
        left_out = touched if self._config.locality == "clean" else set()
        positions = sample(n, self._config.eval_cases, self._config.seed)
        fitting = _about(self._fitting[protocol], set(positions))
        probes = [probe for probe in fitting if not _is_locality_of(probe, left_out)]
        advance = bars.bar(f"evaluating at N={n}, {protocol}", len(probes), "probes")
        seconds = Stopwatch()
        routes = routes_of([probe.prompt for probe in probes])
        predictions = cache.predict(probes, routes, advance)
        spent = seconds.elapsed()
        table = per_probe(cache.evaluator, probes, predictions, cache.base(probes), routes)
        return Evaluated(
            protocol=protocol,
            prefix=prefix,
            positions=positions,
            probes=table,
            seconds=spent,
            n_touched=len(touched),
            warnings=[
                *cache.evaluator.warnings(),
                *self._locality_warnings(n, len(touched), dominating_mention(touches)),
                *paraphrase_warnings(prefix),
                *self._length_warnings(n, _about(self._too_long[protocol], set(positions))),
            ],
        )

    def _sampled(self, checkpoints: Iterable[int]) -> set[int]:
        """Positions of the cases that are evaluated at any of the checkpoints."""
        return {i for n in checkpoints for i in sample(n, self._config.eval_cases, self._config.seed)}

    def _sorted_out(self, protocol: str, probes: Sequence[CaseProbe]) -> list[CaseProbe]:
        """The probes that fit the context under a protocol: with their answers, but texts end where it ends."""
        writes = protocol == "text"
        fits = {probe: self.limit.holds(probe.prompt, None if writes else probe.answer) for probe in probes}
        self._fitting[protocol] = [probe for probe in probes if fits[probe]]
        self._too_long[protocol] = [probe for probe in probes if not fits[probe]]
        if probes and not self._fitting[protocol]:
            raise UserError(
                f"protocol={protocol}: none of the {len(probes)} probes fits the model's {self.limit.positions} "
                "positions; choose a model with a longer context, or a dataset with shorter prompts"
            )
        return self._fitting[protocol]

    def _length_warnings(self, n: int, probes: Sequence[CaseProbe]) -> list[str]:
        if not probes:
            return []
        counts = ", ".join(f"{count} {family}" for family, count in Counter(p.family for p in probes).items())
        ids = dict.fromkeys(self._cases[probe.case].id for probe in probes)
        return [
            f"N={n}: probes that are longer than the model's {self.limit.positions} positions were left out "
            f"({counts}); of case {named([*ids])}"
        ]

    def _locality_warnings(self, n: int, n_touched: int, cause: str) -> list[str]:
        if not n_touched:
            return []
        clean = self._config.locality == "clean"
        rule = "were left out" if clean else "count in Loc; locality=clean leaves them out"
        return [f"N={n}: {n_touched} locality probes are touched by another edit{cause} and {rule}"]


def evaluator_of(protocol: str, config: RunConfig, loaded: LoadedModel) -> Evaluator:
    """The evaluator of a protocol's name, as a run's configuration has it."""
    model, encoder, size = loaded.model, loaded.encoder, config.batch_size
    if protocol != "text":
        rule = protocol_of(protocol, config.method.release_mode)
        return TokenMatchEvaluator(model=model, encoder=encoder, batch_size=size, protocol=rule)
    text, device = config.text, free_device(model.device.type)
    similarities = [(MiniLmCosine, text.minilm), (BertScoreF1, text.bert_score)]
    return LongFormEvaluator(
        model=model,
        encoder=encoder,
        batch_size=size,
        scorer=TextScorer([kind(name, device, size) for kind, name in similarities if name]),
        max_new_tokens=text.max_new_tokens,
    )


def _base_file(config: RunConfig, loaded: LoadedModel, evaluator: Evaluator) -> Path:
    """Where predictions of the unedited model are kept for all runs."""
    chat = "" if config.template == "none" else f"-chat-{config.template_date}"
    name = f"{loaded.fingerprint}-{evaluator.cache_name}{chat}-{_PREDICTING}.json"
    return Path(config.results_dir) / "base_predictions" / name


def _about(probes: Sequence[CaseProbe], positions: set[int]) -> list[CaseProbe]:
    return [probe for probe in probes if probe.case in positions]


def _is_locality_of(probe: CaseProbe, probes: set[tuple[int, str]]) -> bool:
    return probe.family == "loc" and (probe.case, probe.prompt) in probes
