"""Long answers: written to their end, whatever stands beside them in the batch, and scored as texts."""

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.long_form import LongFormEvaluator, TextScorer
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.metrics.similarity import Similarity
from horen_bench.prompts import PromptEncoder

EOS = 0


class SameFirstWord(Similarity):
    """1 where both texts begin with the same word; keeps the pairs that it scores."""

    name = "first_word"

    def __init__(self) -> None:
        super().__init__("none", "cpu", 1)
        self.pairs: list[tuple[str, str]] = []

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        pairs = list(zip(predictions, references, strict=True))
        self.pairs += pairs
        return [float(text.split()[:1] == reference.split()[:1]) for text, reference in pairs]

    def loaded(self, folder: str) -> Any:
        raise NotImplementedError


def evaluator_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | PromptEncoder,
    max_new_tokens: int = 12,
    batch_size: int = 64,
) -> LongFormEvaluator:
    return LongFormEvaluator(
        model=model,
        encoder=PromptEncoder.of(tokenizer),
        batch_size=batch_size,
        scorer=TextScorer([SameFirstWord()]),
        max_new_tokens=max_new_tokens,
    )


def probe_of(prompt: str, answer: str = "the fair", family: str = "rel") -> CaseProbe:
    return CaseProbe(0, family, "base" if family == "loc" else "answer", prompt, answer)


def stopping_early(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """A token that some of the greedy continuations hold and others do not, to stand for EOS."""
    rows = greedy_decode(model, PromptEncoder(tokenizer).prompts(prompts), [12] * len(prompts), EOS)
    counts = {token: sum(token in row for row in rows) for row in rows for token in row}
    return next(token for token, count in counts.items() if 0 < count < len(rows))


PROMPTS = [
    "Who founded Brightwater?",
    "nq question: where is the museum of clocks",
    "The bridge",
    "Lucan Vey",
    "Who built the old tower of Grenholm?",
]


@torch.no_grad()
def test_a_row_that_stops_leaves_the_batch_and_the_others_go_on_as_if_alone(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = stopping_early(golden_model, golden_tokenizer, PROMPTS)
    rows = PromptEncoder(golden_tokenizer).prompts(PROMPTS)
    alone = [greedy_decode(golden_model, [row], [12], EOS, (stop,))[0] for row in rows]
    assert len({len(row) for row in alone}) > 1
    assert greedy_decode(golden_model, rows, [12] * len(rows), EOS, (stop,)) == alone
    for row, whole in zip(alone, greedy_decode(golden_model, rows, [12] * len(rows), EOS), strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_a_prediction_ends_before_eos_and_no_later_than_its_limit(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = stopping_early(golden_model, golden_tokenizer, PROMPTS)
    golden_tokenizer.eos_token = golden_tokenizer.convert_ids_to_tokens(stop)
    probes = [probe_of(prompt) for prompt in PROMPTS]
    predictions = evaluator_of(golden_model, golden_tokenizer).predict(probes)
    assert all(stop not in prediction.ids and len(prediction.ids) <= 12 for prediction in predictions)
    assert len({len(prediction.ids) for prediction in predictions}) > 1
    assert evaluator_of(golden_model, golden_tokenizer, batch_size=2).predict(probes) == predictions
    shorter = evaluator_of(golden_model, golden_tokenizer, max_new_tokens=3).predict(probes)
    assert [prediction.ids[:3] for prediction in predictions] == [prediction.ids for prediction in shorter]


def test_a_text_ends_at_each_token_that_the_checkpoint_ends_its_texts_with(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = stopping_early(golden_model, golden_tokenizer, PROMPTS)
    probes = [probe_of(prompt) for prompt in PROMPTS]
    whole = [prediction.ids for prediction in evaluator_of(golden_model, golden_tokenizer).predict(probes)]
    cast(Any, golden_model.generation_config).eos_token_id = [EOS, stop]
    cut = [prediction.ids for prediction in evaluator_of(golden_model, golden_tokenizer).predict(probes)]
    assert cut == [ids[: ids.index(stop)] if stop in ids else ids for ids in whole]
    assert cut != whole


def test_writing_stops_at_the_end_of_the_context(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden_tokenizer.eos_token = "q"  # never predicted here
    prompts = ["The bridge", "The bridge" + " by the river" * 2, "The bridge" + " by the river" * 20]
    lengths = [len(row) for row in PromptEncoder(golden_tokenizer).prompts(prompts)]
    cast(Any, golden_model.config).max_position_embeddings = lengths[1] + 1
    predictions = evaluator_of(golden_model, golden_tokenizer, 512).predict([probe_of(prompt) for prompt in prompts])
    assert [len(prediction.ids) for prediction in predictions] == [lengths[1] + 1 - lengths[0], 1, 0]


def predicted(tokenizer: PreTrainedTokenizerBase, text: str) -> Prediction:
    return Prediction(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), ())


def test_predictions_are_scored_against_the_given_text_and_locality_against_the_base_prediction(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    evaluator = evaluator_of(golden_model, golden_tokenizer)
    probes = [probe_of("Q", "the old fair"), probe_of("L", "anything", "loc")]
    predictions = [predicted(golden_tokenizer, " the fair "), predicted(golden_tokenizer, "a bridge")]
    base = [predicted(golden_tokenizer, "x"), predicted(golden_tokenizer, "a bridge of stone")]
    first, second = evaluator.scores(probes, predictions, base)
    assert evaluator.text(predictions[0]) == "the fair"
    assert first["rouge1_recall"] == pytest.approx(2 / 3)  # the, fair of the, old, fair
    assert first["rouge1_precision"] == 1.0
    assert first["bleu1_bp"] == pytest.approx(math.exp(1 - 3 / 2))
    assert (first["length"], first["first_word"]) == (2.0, 1.0)
    assert second["rouge1_recall"] == pytest.approx(2 / 4)  # a, bridge of a, bridge, of, stone
    assert evaluator.scores([], [], []) == []


def test_a_pair_is_scored_once_however_often_it_comes_back() -> None:
    similarity = SameFirstWord()
    scorer = TextScorer([similarity])
    first = scorer([("a b", "a c"), ("a b", "a c"), ("x", "a c")])
    assert scorer([("x", "a c"), ("a b", "a c")]) == [first[2], first[0]]
    assert similarity.pairs == [("a b", "a c"), ("x", "a c")]


def test_longest_answers_are_part_of_the_name_of_the_base_predictions(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    names = [evaluator_of(golden_model, golden_tokenizer, n).cache_name for n in (128, 512)]
    assert names == ["text-128", "text-512"]


def test_an_edit_under_a_chat_template_is_predicted_for_its_prompt_and_ends(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Editing, routing and evaluation see one and the same prompt, and the end is learnt with the answer."""
    golden_tokenizer.chat_template = (
        "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %}: {% endif %}"
    )
    chat = PromptEncoder(golden_tokenizer, "model")
    evaluator = evaluator_of(golden_model, chat)
    probe = probe_of("Who founded Brightwater?", "Lucan.")
    assert evaluator.text(evaluator.predict([probe])[0]) != "Lucan."
    config = run_config(["method=horen", "model=tiny"]).method
    editor = config.editor_class()(golden_model, chat, config)
    editor.edit([EditCase("a", probe.prompt, probe.answer)])
    (route,) = editor.routes([probe.prompt])
    assert route.matched
    assert route.score == pytest.approx(1.0, abs=1e-4)
    (prediction,) = evaluator.predict([probe])
    assert evaluator.text(prediction) == "Lucan."
    assert len(prediction.ids) < 12
