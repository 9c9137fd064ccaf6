"""Questions a model on a prefix of the stream under one protocol; knows nothing about methods."""

from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.evaluation.evaluator import Answer, Examiner
from horen_bench.evaluation.long_form import TextExaminer, TextJudge
from horen_bench.evaluation.probes import Question, questions_about, sample
from horen_bench.evaluation.token_match import TOKEN_PROTOCOLS, Mode, Protocol, TokenExaminer, protocol_of

PROTOCOL_NAMES = (*TOKEN_PROTOCOLS, "text")

__all__ = [
    "PROTOCOL_NAMES",
    "Answer",
    "Examiner",
    "Mode",
    "Protocol",
    "Question",
    "TextExaminer",
    "TextJudge",
    "TokenExaminer",
    "greedy_decode",
    "protocol_of",
    "questions_about",
    "sample",
]
