"""Settings of AlphaEdit."""

from typing import ClassVar

from horen_bench.config.schema import Positive
from horen_bench.editors.locate_edit.config import WindowConfig


class AlphaEditConfig(WindowConfig):
    """AlphaEdit."""

    editor: ClassVar[str] = "horen_bench.editors.alphaedit.editor:AlphaEditEditor"

    nullspace_threshold: Positive
    """Eigenvalues of `C` strictly below it span the null space; absolute."""
    l2: Positive
    """lambda_2, how far a layer holds back; the paper's equation has 1."""
