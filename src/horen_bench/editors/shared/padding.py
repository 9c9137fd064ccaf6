"""Methods that run sentences of different lengths in one batch need a model that looks at the attention mask."""

from transformers import PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.models.padding import pads_safely


def check_padding(model: PreTrainedModel) -> None:
    """Refuse a model to which padding is text; tried on the model as it is, once.

    Raises:
        UserError: it is.
    """
    if not pads_safely(model):
        raise UserError(
            f"{type(model).__name__} does not look at the attention mask, so that padding is text to it, and this "
            "method runs sentences of different lengths side by side; take one that runs them one by one, or another "
            "model"
        )
