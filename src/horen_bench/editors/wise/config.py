"""Settings of WISE and of REPAIR, and of the side memory that both have."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from horen_bench.config.schema import (
    Count,
    MethodConfig,
    ModulePath,
    NonNegative,
    NonNegativeCount,
    Positive,
    Section,
    Share,
)

PositiveShare = Annotated[float, Field(gt=0, le=1)]
Margins = Annotated[list[float], Field(min_length=3, max_length=3)]


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError(f"must hold '{{}}', where the prompt goes, got {template!r}")
    return template


class SideStopping(Section):
    """Training of an edit stops once both hold, on the loss of the step before."""

    loss: float
    """Edit loss plus activation loss, nats, at most this."""
    change: NonNegative
    """From one step to the next, nats, at most this."""


class SideMemoryConfig(Section):
    """How side weights are trained, stored, merged, and routed to."""

    retrieve: bool
    """Route among all merged memories (WISE-Retrieve); false: one merged weight (WISE-Merge)."""
    templates: Annotated[list[Annotated[str, AfterValidator(_with_place)]], Field(min_length=1)] | None
    """Contexts with a `{}` each, where the prompt goes; null: ten, written greedily by the unedited model."""
    learning_rate: Positive
    """Of SGD without momentum."""
    weight_decay: NonNegative
    """Of SGD; added to the gradient behind the mask, so that it reaches every element."""
    n_steps: Count
    """Most steps per edit."""
    early_stopping: SideStopping
    """When to stop before."""
    act_margin: Margins
    """alpha, beta, gamma of the activation loss: irrelevant prompts below, edits above, and between the two."""
    act_ratio: Positive
    """A routing threshold is this times the smallest activation of a memory's edits."""
    mask_ratio: PositiveShare
    """Share of the elements that a shard trains."""
    norm_constraint: Positive | None
    """Farthest that an element may be from the module's own weight; null: any."""
    save_freq: Count
    """Edits per shard; in REPAIR per batch."""
    merge_freq: Count
    """Edits per merge, a multiple of `save_freq`; in REPAIR per window."""
    density: PositiveShare
    """Share of a shard's difference that TIES keeps."""
    loc_source: Literal["disjoint", "release"]
    """Irrelevant prompts come in turn from a list apart from the dataset; `release`: a case's own locality prompt."""
    irrelevant_prompts: str | None
    """Text file with a prompt a line, for `loc_source=disjoint`; null: a built-in list."""
    add_bias: bool
    """A side weight's output gets the module's bias; false drops it, as published."""
    shards_at_once: Count
    """Most shards that are trained side by side; above 1 cases are handed over by so many whole shards."""
    engine: Literal["cached", "sequential"]
    """Compute what lies below the module once per edit, or run the whole model at every step; same up to rounding."""

    @field_validator("merge_freq")
    @classmethod
    def _whole_shards(cls, merge_freq: int, info: ValidationInfo) -> int:
        save_freq = info.data.get("save_freq", 1)
        if merge_freq % save_freq:
            raise ValueError(
                f"must be a multiple of save_freq, got {merge_freq} and {save_freq}; whole shards are merged"
            )
        return merge_freq


class WiseConfig(SideMemoryConfig, MethodConfig):
    """Settings of WISE."""

    editor: ClassVar[str] = "horen_bench.editors.wise.editor:WiseEditor"
    act_weight: ClassVar[float] = 1.0

    module: ModulePath
    """Dotted path of the linear module that gets side weights."""

    @property
    def side(self) -> SideMemoryConfig:
        """The side memory's settings, which WISE has at its top."""
        return self


class RepairConfig(MethodConfig):
    """Settings of REPAIR."""

    editor: ClassVar[str] = "horen_bench.editors.wise.repair:RepairEditor"

    module: ModulePath
    """Dotted path of the linear module that gets side weights."""
    mode: Literal["paper", "released"]
    """What the paper says where it is definite, or what the code does: WISE with other constants."""
    act_weight: NonNegative
    """Weight of the activation loss."""
    distill: Literal["logit", "feature", "none"]
    """What the others of a batch learn from its first edit: logits, or the direction of a hidden state (Eq. 4)."""
    distill_lambda: NonNegative
    """Weight of the distillation."""
    temperature: Positive
    """Of `distill=logit`."""
    distill_spread: NonNegative
    """Weight of the squared distance to the batch's mean, of `distill=feature`."""
    consistency: Annotated[float, Field(gt=0, le=2)] | None
    """An edit at least this cosine distance from its batch's seed waits for the next window, once; null: none does."""
    error_threshold: Share
    """An edit with at most this share of its target tokens right has failed."""
    prune_threshold: Share
    """A shard with a larger share of failures is trained again."""
    prune_noise: NonNegative
    """Standard deviation of what is added to the module's weight where a training is repeated."""
    pool_limit: NonNegativeCount | None
    """A shard is trained again, too, where more failures than this wait; null: `side.merge_freq`."""
    max_rounds: NonNegativeCount
    """Repairs per window."""
    max_retries: NonNegativeCount
    """Times that one edit is trained again."""
    max_trainings: NonNegativeCount
    """Trainings of the whole stream, first ones not limited."""
    loss_sensitivity: NonNegative
    """kappa of the merging: 0 lets all shards count alike, above it those of lower loss more."""
    side: SideMemoryConfig
    """The side memory."""

    @model_validator(mode="after")
    def _modes_have_what_they_use(self) -> Self:
        if not self.side.retrieve:
            raise ValueError("method.side.retrieve must be true; REPAIR routes among memories")
        if self.mode == "paper":
            return self
        if self.distill == "feature" or self.consistency is not None:
            raise ValueError("method.mode=released has neither distill=feature nor consistency; set method.mode=paper")
        if self.distill == "logit" and self.side.engine == "cached":
            raise ValueError("method.mode=released distills all positions; set method.side.engine=sequential")
        return self
