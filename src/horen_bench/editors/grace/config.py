"""Settings of GRACE (arXiv 2211.11031) and GRACE+Norm (arXiv 2605.08143, Appendix H.1)."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from horen_bench.config.schema import Cosine, Positive
from horen_bench.editors.codebook.config import CodebookConfig


class GraceConfig(CodebookConfig):
    """GRACE: a codebook of balls whose values take the output's place."""

    editor: ClassVar[str] = "horen_bench.editors.grace.editor:GraceEditor"

    eps: Positive
    """Radius of a new ball, in units of the query."""
    threshold: Cosine | None
    """A cosine: every ball is what lies strictly above it, none is split or expanded; null: radii follow the rule."""
    label_rule: Literal["tokens", "original", "release"]
    """`tokens`: equal token ids; `original`: equal means of the label row; `release`: of the reversed label's row."""
    same_key: Literal["update", "release"]
    """A query within rounding of a key rewrites that entry (`update`), or is like any other (`release`)."""
    value_init: Literal["cold", "warm"]
    """`cold`: i.i.d. Uniform[0, 1); `warm`: the module's output."""
    replacement: Literal["replace_last", "replace_all", "replace_prompt"]
    """Prompt positions replaced: the last, all, or all but the last; the latter two train one by one, whole model."""
    decode_lookup: bool
    """Look up each generated token as well when decoding with a KV cache, as the release does."""

    @model_validator(mode="after")
    def _threshold_suits_the_rest(self) -> Self:
        if self.threshold is not None and not self.normalize:
            raise ValueError(
                "method.threshold is a cosine and needs method.normalize=true; without it balls have radii"
            )
        if self.threshold is not None and self.same_key != "update":
            raise ValueError("method.threshold needs method.same_key=update; of two balls on one key one is never met")
        return self

    @property
    def splits(self) -> bool:
        """Whether balls are split and expanded."""
        return self.threshold is None
