"""Settings of UnKE."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from horen_bench.config.schema import Count, MethodConfig, ModulePath, NonNegative, Positive, Section, Text


def _decoder_layer(path: str) -> str:
    *above, last = path.split(".")
    if not last.isdigit() or any(part.isdigit() for part in above):
        raise ValueError(f"must be a whole decoder layer such as model.layers.7, got {path}")
    return path


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError(f"must hold {{}} for the instruction, got {template!r}")
    return template


class BlockOutputTraining(Section):
    """Stage 1: how the block's output at the last prompt token, the target vector, is trained."""

    n_steps: Count
    """Forward passes; the last one is not followed by a step."""
    learning_rate: Positive
    """Adam's."""
    weight_decay: NonNegative
    """On `||delta|| / ||h0||^2`; the norm is not squared."""
    clamp: Positive
    """`||delta||` is kept at no more than this many `||h0||`."""


class BlockTraining(Section):
    """Stage 2: how all parameters of the block are trained, on the whole batch."""

    n_steps: Count
    """Steps, neither more nor fewer."""
    learning_rate: Positive
    """AdamW's, constant."""
    weight_decay: NonNegative
    """AdamW's, on everything but the block's two layer norms."""


class Preservation(Section):
    """The texts whose outputs an edit must leave alone."""

    corpus: Text
    """A .txt, .jsonl or .json file, `embedded:PATH`, or a hub id; records as Alpaca's go into `template`."""
    template: Annotated[str, AfterValidator(_with_place)]
    """What stands around an instruction, `{}` in its place; the output follows at once."""
    n_texts: Count
    """Texts drawn for every batch of cases, or as many as there are."""
    max_tokens: Count | None
    """Tokens kept of a text; null: all."""


class UnkeConfig(MethodConfig):
    """Settings of UnKE."""

    editor: ClassVar[str] = "horen_bench.editors.unke.editor:UnkeEditor"

    module: Annotated[ModulePath, AfterValidator(_decoder_layer)]
    """Dotted path of the decoder block, e.g. `model.layers.7`."""
    value: BlockOutputTraining
    """Stage 1."""
    block: BlockTraining
    """Stage 2."""
    preservation: Preservation
    """What an edit must leave alone."""
    preserve: Literal["correct", "release_broadcast"]
    """Each text is held to its own outputs, or, as released, to the first one's."""
    pos_ids: Literal["arange", "release_cumsum"]
    """Rotary positions in stage 2: as in the model's own forward pass, or, as released, others on padding."""
    batch_size: Count
    """Cases that share one training of the block; more than 1 is another method."""
    master_weights: bool
    """Train float32 values behind half-precision parameters; false trains in the model's dtype, as published."""
    engine: Literal["cached", "sequential"]
    """Run only what an edit changes, or the whole model, as published; same numbers up to rounding."""
