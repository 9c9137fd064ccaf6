"""Settings of MEMIT."""

from typing import ClassVar

from horen_bench.config.schema import NonNegative, Positive
from horen_bench.editors.locate_edit.config import WindowConfig


class MemitConfig(WindowConfig):
    """MEMIT."""

    editor: ClassVar[str] = "horen_bench.editors.memit.editor:MemitEditor"

    moment_weight: Positive
    """lambda, what general text counts beside the keys of a turn."""
    ridge: NonNegative = 0.0
    """Share of `trace(C)/m` added to the diagonal of `C`; only where the text is too little."""
