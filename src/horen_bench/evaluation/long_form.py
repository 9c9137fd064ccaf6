"""Long answers, written to their end and compared as texts (`protocol=text`, paper Table 7).

The model goes on greedily until EOS, `max_new_tokens` or the end of its context; special tokens are left out of the
text. The reference is the answer given, or, for locality, what the unedited model wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.evaluation.evaluator import Answer, Examiner
from horen_bench.evaluation.probes import Question
from horen_bench.metrics.similarity import Similarity
from horen_bench.metrics.text_scores import Standard, word_scores
from horen_bench.models.architecture import context_length
from horen_bench.prompts import encode_prompts, pad_id_of

Pair = tuple[str, str]


class TextJudge:
    """All scores of a text against a reference; a pair is scored once, however often it comes back.

    Args:
        similarities: the scores that need a model.
    """

    def __init__(self, similarities: Sequence[Similarity]) -> None:
        self._similarities = similarities
        self._standard: Standard | None = None
        self._known: dict[Pair, dict[str, float]] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """Scores by name of each pair of prediction and reference."""
        self._standard = self._standard or Standard()
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        for pair in new:
            self._known[pair] = word_scores(*pair, self._standard)
        for similarity in self._similarities:
            scores = similarity([said for said, _ in new], [wanted for _, wanted in new]) if new else []
            for pair, score in zip(new, scores, strict=True):
                self._known[pair][similarity.name] = score
        return [self._known[pair] for pair in pairs]

    def warnings(self) -> list[str]:
        """Why a score is missing."""
        return [one.problem for one in self._similarities if one.problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExaminer(Examiner):
    """Lets the model write, and has what it wrote judged.

    Attributes:
        judge: gives the scores.
        max_new_tokens: longest answer.
    """

    judge: TextJudge
    max_new_tokens: int
    _texts: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)

    @property
    def cache_name(self) -> str:
        """The protocol, with the longest answer."""
        return f"text-{self.max_new_tokens}"

    def ask_batch(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers up to EOS; where a prompt leaves no room in the context, an empty one."""
        prompts = encode_prompts(self.tokenizer, [question.prompt for question in questions])
        room = [self._room(len(prompt)) for prompt in prompts]
        asked = [i for i, n_tokens in enumerate(room) if n_tokens > 0]
        eos = self.tokenizer.eos_token_id
        stop = () if eos is None else (int(eos),)
        answers = [Answer((), ())] * len(prompts)
        if asked:
            chosen, lengths = [prompts[i] for i in asked], [room[i] for i in asked]
            rows = greedy_decode(self.model, chosen, lengths, pad_id_of(self.tokenizer), stop)
            for i, row in zip(asked, rows, strict=True):
                answers[i] = Answer(tuple(row[:-1] if row[-1] in stop else row), ())
        return answers

    def scores(
        self, questions: Sequence[Question], answers: Sequence[Answer], base: Sequence[Answer]
    ) -> list[dict[str, float]]:
        """What the judge says, scored in one batch."""
        pairs = [
            (self.text(answer), self.text(before) if question.reference == "base" else question.answer)
            for question, answer, before in zip(questions, answers, base, strict=True)
        ]
        return self.judge(pairs)

    def text(self, answer: Answer) -> str:
        """What was written, without special tokens and the white space around it."""
        if answer.ids not in self._texts:
            text = str(self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)).strip()
            self._texts[answer.ids] = text
        return self._texts[answer.ids]

    def warnings(self) -> list[str]:
        """Why a score is missing."""
        return self.judge.warnings()

    def _room(self, n_prompt: int) -> int:
        """New tokens that a prompt of so many leaves room for."""
        context = context_length(self.model)
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - n_prompt)
