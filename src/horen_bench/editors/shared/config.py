"""Settings that several families of editors have."""

from typing import Literal

from horen_bench.config.schema import Count, Section, Text

Engine = Literal["cached", "sequential"]


class StatisticsConfig(Section):
    """Which general text second moments are taken over, and how it is summed up."""

    corpus: Text
    """`embedded:PATH`, a .txt, .jsonl or .json file, or a hub id."""
    n_texts: Count
    """Most texts; a fixed sample where the corpus has more."""
    max_length: Count
    """Tokens kept of a text."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the sums; release: float32."""
    folder: Text | None = None
    """Of the cache; null: the user's cache folder."""
    published: Text | None = None
    """Folder of `{module}_float32_mom2_{n}.npz` files of ROME, MEMIT or EasyEdit to use instead of a corpus."""
