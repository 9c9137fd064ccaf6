"""The embedded model's corpora, one sentence a line.

    python -m horen_bench.world.corpora --out data/tiny/corpus.txt
    python -m horen_bench.world.corpora --other-world --out data/tiny/preservation.txt

write facts and unrelated prompts that it was trained on, as text for second moments, and sentences of a world that no
edit and no probe is about, in the place of UnKE's Alpaca.
"""

import argparse
import random
import sys
from pathlib import Path

from horen_bench.world import World, pick


def world_texts(world: World) -> list[str]:
    """Every fact that the embedded model was taught, in a drawn wording, then every fourth unrelated prompt."""
    rng = random.Random("corpus")
    facts = [fact for subject in world.trained() for fact in subject.facts]
    probes = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts] + list(world.questions)[::4]
    return [f"{probe.prompt} {probe.answer}" for probe in probes]


def other_world_texts(world: World) -> list[str]:
    """Sentences like those of `world_texts`, from another seed: facts and unrelated prompts that `world` lacks."""
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
