"""Settings of FT-L and FT-M."""

from typing import ClassVar, Literal

from horen_bench.config.schema import Count, MethodConfig, ModulePath, NonNegative, Positive
from horen_bench.editors.shared.config import Engine


class FineTuningConfig(MethodConfig):
    """FT-L or FT-M, which differ in their objective."""

    editor: ClassVar[str] = "horen_bench.editors.ft.editor:FineTuningEditor"

    module: ModulePath
    """Dotted path of the trained module, e.g. `model.layers.21.mlp.down_proj`."""
    objective: Literal["prompt_last", "target_new"]
    """FT-L: all target tokens from the last prompt position; FT-M: the target as it follows the prompt."""
    learning_rate: Positive
    """Of Adam."""
    weight_decay: NonNegative = 0.0
    """Of Adam, added to the gradient."""
    n_steps: Count
    """Most Adam steps per edit."""
    loss_bound: float
    """No further step once the loss (nats per token) is below it."""
    norm_constraint: Positive | None = None
    """Each entry stays within this distance of its value before the edit; null: anywhere."""
    master_weights: bool = True
    """Float32 values behind a half-precision weight; false: as published, most of a small step is rounded away."""
    engine: Engine = "cached"
    """`cached` runs the layers above the module on cached states, `sequential` the whole model."""
