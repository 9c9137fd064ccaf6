"""Prompts that no edit is about: what the activation margins hold still."""

from collections.abc import Sequence
from pathlib import Path

from horen_bench.errors import UserError

# Ours. General questions, none of them from a dataset of this package.
BUILT_IN = (
    "what is the boiling point of water",
    "how many legs does a spider have",
    "who wrote the song about the rain",
    "when does the night train leave",
    "how long is a football match",
    "what do bees make",
    "why is the sky blue",
    "where do penguins live",
    "who won the race last year",
    "how do you bake bread",
    "what is the largest ocean",
    "when was the first bridge built",
    "how tall is the old tower",
    "what is the name of the river",
    "who plays the drums in the band",
    "where is the oldest library",
    "how many days are in a week",
    "what is a group of wolves called",
    "when is the best time to plant roses",
    "who painted the ceiling of the chapel",
    "what color is the inside of a melon",
    "how far is the moon from here",
    "where does the path through the woods end",
    "what is the opposite of cold",
    "who sings the part of the king",
    "how do you say thank you in Welsh",
    "what language is spoken on the island",
    "when did the shop open its doors",
    "how many keys are on a piano",
    "what is the square root of nine",
    "where is the sun at noon",
    "who carries the flag at the games",
)


def irrelevant_prompts(path: str | None) -> Sequence[str]:
    """The lines of a text file, or the built-in list.

    Args:
        path: UTF-8 text, one prompt a line; None: the built-in list.

    Raises:
        UserError: the file cannot be read or holds no prompt.
    """
    if path is None:
        return BUILT_IN
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"method.irrelevant_prompts={path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"method.irrelevant_prompts={path} holds no prompt; write one a line")
    return prompts
