"""Around an evaluator: predictions that are known without running the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from horen_bench.cases import Route
from horen_bench.evaluation.evaluator import Advance, Evaluator, Prediction
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.progress import Bars
from horen_bench.results.store import stored_predictions


class PredictionCache:
    """Predicts as its evaluator does, running the model no more than necessary.

    Where no entry of a memory acts, the edited model is the base model, whose prediction is known; where the same entry
    with the same value acts as at an earlier checkpoint, so is the prediction. Both hold exactly, since a route decides
    all that a memory editor does. For editors without a router the model is run on every probe.

    Args:
        evaluator: runs the model.
        base: the unedited model's predictions, which some scores and every row compare with.
        reuse: take over what routes imply; False runs the model on every probe.
    """

    def __init__(self, evaluator: Evaluator, base: Mapping[CaseProbe, Prediction], *, reuse: bool = True) -> None:
        self.evaluator = evaluator
        self._base = base
        self._reuse = reuse
        self._by_entry: dict[CaseProbe, tuple[Route, Prediction]] = {}

    def base(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """What the unedited model predicts, in the order of the probes."""
        return [self._base[probe] for probe in probes]

    def predict(
        self, probes: Sequence[CaseProbe], routes: Sequence[Route | None], advance: Advance = lambda _: None
    ) -> list[Prediction]:
        """The edited model's predictions, in the order of the probes.

        Args:
            probes: what to predict.
            routes: what the editor's router decides for each of their prompts; None where there is no router.
            advance: called with the number of probes that are done since the last call.
        """
        known = [self._known(probe, route) for probe, route in zip(probes, routes, strict=True)]
        unknown = [probe for probe, prediction in zip(probes, known, strict=True) if prediction is None]
        advance(len(probes) - len(unknown))
        new = iter(self.evaluator.predict(unknown, advance))
        predictions = [next(new) if prediction is None else prediction for prediction in known]
        for probe, route, prediction in zip(probes, routes, predictions, strict=True):
            if route and route.matched:
                self._by_entry[probe] = (route, prediction)
        return predictions

    def _known(self, probe: CaseProbe, route: Route | None) -> Prediction | None:
        if not self._reuse or route is None:
            return None
        if not route.matched:
            return self._base[probe]
        earlier, prediction = self._by_entry.get(probe, (None, None))
        same = earlier is not None and (earlier.entry, earlier.version) == (route.entry, route.version)
        return prediction if same else None


def base_predictions(
    evaluator: Evaluator, probes: Sequence[CaseProbe], file: Path, bars: Bars
) -> dict[CaseProbe, Prediction]:
    """What the unedited model predicts; it is run on what earlier runs did not leave in a file, which is added there.

    Args:
        evaluator: of the model, which is still unedited.
        probes: what to predict.
        file: JSON; need not be there.
        bars: where progress is shown.
    """

    def predict(missing: list[int]) -> list[dict[str, list[int]]]:
        advance = bars.bar("evaluating the base model", len(missing), "probes")
        predictions = evaluator.predict([probes[i] for i in missing], advance)
        return [{"ids": list(new.ids), "scored_ids": list(new.scored_ids)} for new in predictions]

    stored = stored_predictions(file, [probe.key for probe in probes], predict, bars.say)
    return {
        probe: Prediction(tuple(ids["ids"]), tuple(ids["scored_ids"]))
        for probe, ids in zip(probes, stored, strict=True)
    }
