"""General text for second moments: a file, a text corpus that comes with the package, or a data set of the hub.

    python -m horen_bench.editors.rewriting.corpus --out data/tiny/corpus.txt

writes the embedded model's: what it was trained on, one sentence a line.
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
from horen_bench.resources import resource
from horen_bench.world import World, pick

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
    rows = _rows(source)
    order = list(range(len(rows)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    texts = [text for i in order[:n_texts] if (text := _text(rows[i])).strip()]
    if not texts:
        raise UserError(f"method.statistics.corpus={source}: it holds no text")
    return texts


def _rows(source: str) -> Sequence[Any]:
    if source.startswith(EMBEDDED):
        return _read_file(resource("data") / source.removeprefix(EMBEDDED), source)
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".json", ".jsonl"):
        return _read_file(path, source)
    return _load_from_hub(source)


def _read_file(path: Path, source: str) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows: list[Any] = json.loads(text)
            return rows
        lines = [line for line in text.splitlines() if line.strip()]
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise UserError(f"method.statistics.corpus={source} cannot be read ({error})") from error


def _load_from_hub(source: str) -> Sequence[Any]:
    name, _, configuration = source.partition(":")
    advice = "give a local .txt, .jsonl or .json file instead"
    try:
        from datasets import load_dataset  # noqa: PLC0415 - only whoever asks for a hub corpus needs it
    except ImportError as error:
        raise UserError(
            f"method.statistics.corpus={source} is read with the package datasets; pip install datasets, or {advice}"
        ) from error
    try:
        rows: Sequence[Any] = load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the hub's client raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"method.statistics.corpus={source} cannot be loaded ({reason}); {advice}") from error
    return rows


def _text(row: Any) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise UserError("method.statistics.corpus: every item must be a text or have a field 'text'")
    return text


def world_texts(world: World) -> list[str]:
    """Every fact that the embedded model was taught, in a drawn wording, then every fourth unrelated question."""
    rng = random.Random("corpus")
    facts = [fact for subject in world.trained() for fact in subject.facts]
    probes = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts] + list(world.questions)[::4]
    return [f"{probe.prompt} {probe.answer}" for probe in probes]


def main() -> None:
    """Write the embedded model's corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    texts = world_texts(World())
    out.write_text("\n".join(texts) + "\n", encoding="utf-8")
    sys.stderr.write(f"{len(texts)} texts, {out.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
