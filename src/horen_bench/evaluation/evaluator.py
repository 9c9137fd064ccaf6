"""What all protocols share: questions in, answers and scores out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.evaluation.probes import Question

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: the ids that locality compares, and those that are scored against an answer."""

    ids: tuple[int, ...]
    scored_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner(ABC):
    """Asks questions of one model under one protocol, in batches sorted by length.

    Attributes:
        model: the model, edited or not.
        tokenizer: its tokenizer.
        batch_size: prompts per forward pass.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 64

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Names the base model's answers, which depend on nothing else here."""

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], progress: Progress = lambda _: None) -> list[Answer]:
        """The model's answers, in the order of the questions.

        Args:
            questions: what to ask.
            progress: called with the number of questions answered since the last call.
        """
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            answers.update(zip(chosen, self.ask_batch([questions[i] for i in chosen]), strict=True))
            progress(len(chosen))
        return [answers[i] for i in range(len(questions))]

    @abstractmethod
    def ask_batch(self, questions: Sequence[Question]) -> list[Answer]:
        """The model's answers to questions that fit one batch."""

    @abstractmethod
    def scores(
        self, questions: Sequence[Question], answers: Sequence[Answer], base: Sequence[Answer]
    ) -> list[dict[str, float]]:
        """Scores of each answer by name, the same names for every question; "" is the score of a protocol's own.

        Args:
            questions: what was asked.
            answers: of the model in question.
            base: of the unedited model, the reference of some questions.
        """

    @abstractmethod
    def text(self, answer: Answer) -> str:
        """An answer as text."""

    def warnings(self) -> list[str]:
        """Sentences that whoever reads the scores must know."""
        return []
