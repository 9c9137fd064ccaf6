"""What the release does where it errs (ha11ucin8/HoReN @38bbf34); `compat=release` or a setting chooses it.

Numbers of deviations are those of `baselines/horen/CARD.md` and `baselines/grace/CARD.md`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from horen_bench.editors.codebook.entries import Codebook
from horen_bench.prompts import EncodedEdit


def same_row_mean(codebook: Codebook, entry: int, edit: EncodedEdit) -> bool:
    """Targets agree if their label rows have one mean (HoReN's deviation 1, GRACE's 2).

    So a target behind a longer prompt disagrees with itself, and agrees with its tokens in another order.
    """
    own = _row_mean(codebook.labels[entry], codebook.prompt_lengths[entry])
    return own == _row_mean(edit.target, len(edit.prompt))


def same_row_mean_reversed(codebook: Codebook, entry: int, edit: EncodedEdit) -> bool:
    """The same, of another entry's label (GRACE's deviation 3).

    The release puts labels at the front of its list and everything else at the end, so that it reads entry `j`'s
    label at row `C - 1 - j`.
    """
    return same_row_mean(codebook, len(codebook) - 1 - entry, edit)


def exact_reach(distance: np.float32, rounding: np.float32) -> tuple[bool, np.float32]:
    """A query on a key is like any other, and a ball expanded to a query ends exactly there (GRACE's 4 and 5)."""
    return False, distance


def _row_mean(target: Sequence[int], prompt_length: int) -> float:
    """Mean of a label row as the release builds it: -100 on the prompt, then the target ids."""
    return torch.tensor([-100] * prompt_length + list(target)).float().mean().item()
