"""The settings that every codebook editor has."""

from typing import ClassVar, Literal

from horen_bench.config.schema import (
    Count,
    MethodConfig,
    Mode,
    ModulePath,
    NonNegative,
    NonNegativeCount,
    Positive,
    Section,
    Share,
)

Engine = Literal["parallel", "sequential"]
LabelRule = Literal["tokens", "original", "release"]


class VectorValue(Section):
    """Values that are a vector."""

    learning_rate: Positive
    """Adam's."""


class EarlyStopping(Section):
    """When to stop the training of a value before its last step."""

    loss_bound: NonNegative
    """Stop once the mean token cross-entropy is below this, nats."""
    patience: Count
    """Stop after this many steps in a row without a new lowest loss."""


class CodebookConfig(MethodConfig):
    """What a codebook editor needs to know, however it routes."""

    release_mode: ClassVar[Mode] = "generate"

    module: ModulePath
    """Dotted path of the hooked linear module, e.g. `model.layers.29.mlp.down_proj`."""
    pooling_ratio: Share
    """rho; share of the prompt's tokens, from the end and rounded up, whose mean is the query; 0: the last token."""
    normalize: bool
    """Queries and keys on the unit sphere."""
    vector: VectorValue
    """How vectors are trained."""
    n_steps: NonNegativeCount
    """Most Adam steps per edit."""
    early_stopping: EarlyStopping | None
    """Null takes all steps, as the release does."""
    label_rule: LabelRule
    """Which targets agree: `tokens`: equal token ids; others: equal means of the release's label rows."""
    engine: Engine
    """`parallel` trains many values at once above the module, `sequential` one by one; equal up to rounding."""
    train_batch: Count | None
    """Values trained side by side; null finds it from the model's shape and the size of a GPU's memory."""
