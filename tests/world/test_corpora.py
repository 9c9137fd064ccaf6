"""The embedded model's corpora are what their command writes."""

from horen_bench.paths import resource
from horen_bench.world import World
from horen_bench.world.corpora import other_world_texts, world_texts


def test_embedded_corpora_are_what_their_command_writes() -> None:
    folder = resource("data") / "tiny"
    for name, texts in (("corpus", world_texts(World())), ("preservation", other_world_texts(World()))):
        assert (folder / f"{name}.txt").read_text(encoding="utf-8") == "\n".join(texts) + "\n"
