"""Prompts that no edit is about: what the activation margins hold still."""

from collections.abc import Sequence
from pathlib import Path

from horen_bench.cases import EditCase
from horen_bench.editors.shared.corpora import lines_of
from horen_bench.editors.wise.config import SideMemoryConfig
from horen_bench.errors import UserError

# Ours. Everyday prompts, each with a detail that no dataset is likely to have.
BUILT_IN = (
    "how long does a kettle take to boil on a camp stove",
    "how many legs does a garden spider have when it hatches",
    "who wrote the school song about the rain",
    "when does the last night train leave the old harbor",
    "how many minutes does a school football match last",
    "what do bees make in the first week of spring",
    "why does the evening sky look red over the bay",
    "where do the penguins sleep at the city zoo",
    "who won the rowing race between the two villages",
    "how do you bake rye bread without a tin",
    "what is the largest lake you can see from the tower",
    "when was the wooden bridge by the mill rebuilt",
    "how tall is the clock tower beside the market",
    "what is the name of the stream behind the school",
    "who plays the drums in the village band",
    "where is the oldest library card kept",
    "how many days are in nine weeks",
    "what do you call a group of wolves in winter",
    "when is the best week to plant climbing roses",
    "who painted the ceiling of the small chapel",
    "what color is an unripe melon on the inside",
    "how far is the lighthouse from the ferry",
    "where does the footpath through the beech wood end",
    "what is the opposite of lukewarm",
    "who sings the part of the second gardener",
    "how do you say thank you to a ferryman in Welsh",
    "what language is spoken in the northern valley",
    "when did the cheese shop first open its doors",
    "how many keys does a child's piano have",
    "what is the square root of nine hundred and one",
    "where is the sun at noon in the southern garden",
    "who carries the flag at the winter parade",
)


class DisjointPrompts:
    """Prompts from a list that has nothing to do with the dataset, in turn.

    Args:
        side: names the file of the list: UTF-8 text, one prompt a line; null: the built-in list.

    Attributes:
        prompts: the list.
        n_borrowed: cases that got a prompt of the list because they have none of their own; 0 here.

    Raises:
        UserError: the file cannot be read or holds no prompt.
    """

    def __init__(self, side: SideMemoryConfig) -> None:
        self.n_borrowed = 0
        self.prompts = BUILT_IN if side.irrelevant_prompts is None else _read(side.irrelevant_prompts)

    def check(self, cases: Sequence[EditCase]) -> None:
        """Refuse a list of which some case is tested on a prompt, letter case, spaces and closing marks aside.

        A list as a whole is refused, rather than single prompts left out, because which edit is trained on which prompt
        must not depend on the cases that follow.

        Raises:
            UserError: such a case.
        """
        listed = {_bare(prompt) for prompt in self.prompts}
        for case in cases:
            for probe in case.locality:
                if _bare(probe.prompt) in listed:
                    raise UserError(
                        f"method.irrelevant_prompts: case {case.id} tests locality on '{probe.prompt}', which is in "
                        "the list that edits are trained to leave alone; give a file with other prompts"
                    )

    def of(self, _case: EditCase, turn: int) -> str:
        """The prompt that this edit must not affect; `turn` is the number of its training."""
        return self.prompts[turn % len(self.prompts)]

    def warnings(self) -> list[str]:
        """Where the prompts are from."""
        return ["loc_source=disjoint: trained on irrelevant prompts that no case is tested on"]


def _read(path: str) -> Sequence[str]:
    try:
        prompts = [line.strip() for line in lines_of(Path(path))]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"method.irrelevant_prompts={path} cannot be read: {error}") from error
    if not prompts:
        raise UserError(f"method.irrelevant_prompts={path} holds no prompt; write one a line")
    return prompts


def _bare(prompt: str) -> str:
    return " ".join(prompt.casefold().split()).rstrip(" ?.!")
