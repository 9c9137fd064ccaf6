"""How a run's model is questioned: one exam for each protocol, with what need not be asked again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.config.settings import Config, editor_class
from horen_bench.editors.base import Route
from horen_bench.evaluation import (
    Answer,
    Examiner,
    Question,
    TextExaminer,
    TextJudge,
    TokenExaminer,
    greedy_decode,
    protocol_of,
)
from horen_bench.metrics.similarity import BertScoreF1, MiniLmCosine, free_device
from horen_bench.models.loading import LoadedModel
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import encode_continuations, encode_prompts, pad_id_of
from horen_bench.results.store import cached_answers

# What is timed of a question, on every model alike; ours.
_TIMED_QUESTIONS, _TIMED_TOKENS = 20, 8


@dataclass(slots=True)
class Exam:
    """One protocol of a run.

    Attributes:
        examiner: asks the model questions.
        base: the unedited model's answer to each question that this protocol asks, by the question's position.
        answered: what a memory's entry made the model answer, by question: entry and version, answer.
    """

    examiner: Examiner
    base: Mapping[int, Answer]
    answered: dict[int, tuple[tuple[int | None, int], Answer]] = field(default_factory=dict)

    def answers(
        self,
        questions: Sequence[Question],
        chosen: Sequence[int],
        routes: Sequence[Route | None],
        advance: Callable[[int], None],
    ) -> list[Answer]:
        """Answers to the questions at `chosen`, asking the model no more than necessary.

        Where no entry acts, the edited model is the base model, whose answer is known; where the same entry with the
        same value acts as at an earlier checkpoint, so is the answer. Both hold exactly, since a route decides all
        that a memory editor does. Editors without a router are asked everything.
        """
        known = {i: self.base[i] for i, route in zip(chosen, routes, strict=True) if route and not route.matched}
        for i, route in zip(chosen, routes, strict=True):
            earlier = self.answered.get(i)
            if route and route.matched and earlier and earlier[0] == (route.entry, route.version):
                known[i] = earlier[1]
        asking = [i for i in chosen if i not in known]
        advance(len(known))
        known |= dict(zip(asking, self.examiner.ask([questions[i] for i in asking], advance), strict=True))
        for i, route in zip(chosen, routes, strict=True):
            if route and route.matched:
                self.answered[i] = ((route.entry, route.version), known[i])
        return [known[i] for i in chosen]


def exam_of(
    protocol: str,
    config: Config,
    loaded: LoadedModel,
    questions: Mapping[int, Question],
    *,
    progress: Progress,
) -> Exam:
    """The exam of a protocol: the unedited model is asked what earlier runs did not ask it.

    Args:
        protocol: its name.
        config: of the run.
        loaded: the unedited model.
        questions: what this protocol asks, by position among the run's questions.
        progress: where a bar is shown.
    """
    examiner = _examiner(protocol, config, loaded)
    cache = Path(config["results_dir"]) / "base_answers" / f"{_cache_name(config, loaded, examiner)}.json"
    answers = _base_answers(cache, examiner, [*questions.values()], progress)
    return Exam(examiner, dict(zip(questions, answers, strict=True)))


def _examiner(name: str, config: Config, loaded: LoadedModel) -> Examiner:
    """Who asks under the protocol of a name."""
    size = config["batch_size"]
    if name != "text":
        protocol = protocol_of(name, editor_class(config).release_mode)
        return TokenExaminer(model=loaded.model, tokenizer=loaded.tokenizer, batch_size=size, protocol=protocol)
    text = config["text"]
    chosen = [(MiniLmCosine, text["minilm"]), (BertScoreF1, text["bert_score"])]
    judge = TextJudge([kind(model, free_device(loaded.model.device.type), size) for kind, model in chosen if model])
    return TextExaminer(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=size,
        judge=judge,
        max_new_tokens=text["max_new_tokens"],
    )


def _cache_name(config: Config, loaded: LoadedModel, examiner: Examiner) -> str:
    name = f"{loaded.fingerprint}-{examiner.cache_name}"
    return name if config["template"] == "none" else f"{name}-chat"


def _base_answers(cache: Path, examiner: Examiner, questions: Sequence[Question], progress: Progress) -> list[Answer]:
    def ask(missing: list[int]) -> list[dict[str, list[int]]]:
        task = progress.add_task("asking the base model", total=len(missing), unit="questions")
        answers = examiner.ask([questions[i] for i in missing], lambda n: progress.advance(task, n))
        return [{"ids": list(answer.ids), "scored_ids": list(answer.scored_ids)} for answer in answers]

    found = cached_answers(cache, [question.key for question in questions], ask)
    return [Answer(tuple(one["ids"]), tuple(one["scored_ids"])) for one in found]


def inference_ms(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> float:
    """Milliseconds that a model takes for one question, decoding greedily without a batch; NaN without a question.

    Every method is timed by this: the first `_TIMED_QUESTIONS`, the tokens of each answer, at most `_TIMED_TOKENS`.
    """
    questions = questions[:_TIMED_QUESTIONS]
    if not questions:
        return float("nan")
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    answers = encode_continuations(tokenizer, [question.answer for question in questions])
    lengths = [min(len(ids), _TIMED_TOKENS) for ids in answers]
    with torch.no_grad():
        greedy_decode(model, prompts[:1], lengths[:1], pad_id_of(tokenizer))  # the first call sets things up
        seconds = Stopwatch()
        for prompt, n_tokens in zip(prompts, lengths, strict=True):
            greedy_decode(model, [prompt], [n_tokens], pad_id_of(tokenizer))
    return 1000 * seconds.elapsed() / len(questions)
