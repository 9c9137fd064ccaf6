"""Settings of ROME."""

from typing import ClassVar, Literal

from horen_bench.config.schema import ModulePath, NonNegative
from horen_bench.editors.locate_edit.config import LocateEditConfig


class RomeConfig(LocateEditConfig):
    """ROME; the target vector belongs to the down-projection's output."""

    editor: ClassVar[str] = "horen_bench.editors.rome.editor:RomeEditor"
    where: ClassVar[str] = "method.module"

    module: ModulePath
    """Dotted path of the down-projection, e.g. `model.layers.5.mlp.down_proj`."""
    covariance: bool = True
    """`u = C^-1 k`, as the paper has it; false: `u = k`, as EasyEdit does."""
    key_mode: Literal["release", "mean", "prompt"] = "release"
    """`release`: the mean key over contexts gives `u`, the bare prompt's scales `v`; else one key in both places."""
    ridge: NonNegative = 0.0
    """Share of `trace(C)/m` added to the diagonal of `C`; only where the text is too little."""
    arithmetic: Literal["float32", "model"] = "float32"
    """Of `u`, `v` and their product; `model`: the release's, inverse, keys and values rounded to the model's dtype."""

    @property
    def projections(self) -> list[str]:
        """See `LocateEditConfig`."""
        return [self.module]
