"""Calling a model: by keyword alone, and with nothing that it does not take.

What stands second in a signature is the attention mask in one architecture and the cache in the next, and a model
without position embeddings has no `position_ids`.
"""

import inspect
from typing import Any

from torch import nn

from horen_bench.prompts import Batch


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's `forward` names this argument; `**kwargs` does not count, which may drop it in silence."""
    return name in inspect.signature(type(module).forward).parameters


def run(module: nn.Module, batch: Batch, **more: Any) -> Any:
    """The output of a model or its decoder for whole sequences, without a cache.

    Args:
        module: takes `input_ids` and `attention_mask`.
        batch: the sequences; positions are counted over real tokens where the module takes positions at all.
        more: further arguments, which must be the module's.
    """
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if takes(module, "position_ids"):
        arguments["position_ids"] = batch.position_ids
    return module(**arguments, use_cache=False, **more)
