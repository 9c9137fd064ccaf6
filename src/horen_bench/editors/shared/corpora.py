"""General text for second moments: a file, a text corpus that comes with the package, or a data set of the hub.

    python -m horen_bench.editors.shared.corpora --out data/tiny/corpus.txt
    python -m horen_bench.editors.shared.corpora --other-world --out data/tiny/preservation.txt

write the embedded model's: facts and questions that it was trained on, and as UnKE's Alpaca, sentences of a world that
no edit and no question is about; one sentence a line.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horen_bench.errors import UserError
from horen_bench.models.loading import EMBEDDED
from horen_bench.paths import resource
from horen_bench.world import World, pick

_WHERE = "method.statistics.corpus"
_SAMPLE_SEED = 1  # the published code's, whatever the run's seed


def read_corpus(source: str, n_texts: int) -> list[str]:
    """The texts of a corpus, or a fixed sample of `n_texts` of them, in the order of the sample.

    Args:
        source: `embedded:PATH` inside the package's data; a local `.txt` (one text a line), `.jsonl` (field `text`) or
            `.json` (a list of strings); or a hub id, with a configuration behind a colon, e.g.
            `wikimedia/wikipedia:20231101.en` (field `text`, split `train`).
        n_texts: most texts.

    Raises:
        UserError: no such corpus, or it holds no text.
    """
    rows = read_rows(source, _WHERE)
    order = list(range(len(rows)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    texts = [text for i in order[:n_texts] if (text := text_of(rows[i], _WHERE)).strip()]
    if not texts:
        raise UserError(f"{_WHERE}={source}: it holds no text")
    return texts


def read_rows(source: str, where: str) -> Sequence[Any]:
    """The items of a corpus in its own order: strings, or mappings with a text in some of their fields.

    Args:
        source: as for `read_corpus`.
        where: the configuration key that holds it, for messages.

    Raises:
        UserError: no such corpus.
    """
    if source.startswith(EMBEDDED):
        return _read_file(resource("data") / source.removeprefix(EMBEDDED), f"{where}={source}")
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".json", ".jsonl"):
        return _read_file(path, f"{where}={source}")
    return _load_from_hub(source, f"{where}={source}")


def text_of(row: Any, where: str) -> str:
    """The text of an item.

    Raises:
        UserError: it is neither a string nor a mapping with a field `text`.
    """
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError(f"{where}: every item must be a text or have a field 'text'")
    return text


def _read_file(path: Path, named: str) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows: list[Any] = json.loads(text)
            return rows
        lines = [line for line in text.splitlines() if line.strip()]
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise UserError(f"{named} cannot be read ({error})") from error


def _load_from_hub(source: str, named: str) -> Sequence[Any]:
    name, _, configuration = source.partition(":")
    advice = "give a local .txt, .jsonl or .json file instead"
    try:
        from datasets import load_dataset  # noqa: PLC0415 - only whoever asks for a hub corpus needs it
    except ImportError as error:
        raise UserError(f"{named} is read with the package datasets; pip install datasets, or {advice}") from error
    try:
        rows: Sequence[Any] = load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the hub's client raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{named} cannot be loaded ({reason}); {advice}") from error
    return rows


def world_texts(world: World) -> list[str]:
    """Every fact that the embedded model was taught, in a drawn wording, then every fourth unrelated question."""
    rng = random.Random("corpus")
    facts = [fact for subject in world.trained() for fact in subject.facts]
    probes = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts] + list(world.questions)[::4]
    return [f"{probe.prompt} {probe.answer}" for probe in probes]


def other_world_texts(world: World) -> list[str]:
    """Sentences like those of `world_texts`, from another seed: facts and unrelated questions that `world` lacks."""
    other = World(world.seed + 1, n_trained=100, n_questions=200)
    known = {subject.name for subject in world.trained()} | {probe.prompt for probe in world.questions}
    rng = random.Random("preservation")
    facts = [fact for subject in other.trained() if subject.name not in known for fact in subject.facts]
    probes = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts]
    probes += [probe for probe in other.questions if probe.prompt not in known]
    return [f"{probe.prompt} {probe.answer}" for probe in probes]


def main() -> None:
    """Write one of the embedded model's corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--other-world", action="store_true", help="what the model was not trained on")
    options = parser.parse_args()
    texts = other_world_texts(World()) if options.other_world else world_texts(World())
    out: Path = options.out
    out.write_text("\n".join(texts) + "\n", encoding="utf-8")
    sys.stderr.write(f"{len(texts)} texts, {out.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
