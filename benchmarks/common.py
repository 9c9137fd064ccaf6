"""What the benchmarks share: models of real shapes without real weights, and a line that says what ran on what."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.datasets.facts import Facts
from horen_bench.editors.base import Editor
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.models.loading import load_model, load_tokenizer
from horen_bench.paths import resource
from horen_bench.profiling import Stopwatch


def model_and_tokenizer(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, or the architecture of another `conf/model/` file at random initialisation.

    Speed and memory do not depend on the weights' values. The embedded tokenizer serves all: its prompts have about as
    many tokens as ZsRE's under the real ones.
    """
    spec: Any = OmegaConf.to_container(OmegaConf.load(resource("conf") / "model" / f"{name}.yaml"))
    if name == "tiny":
        loaded = load_model(spec["hub_id"], dtype=spec["dtype"], device=device)
        return loaded.model, loaded.tokenizer
    architecture = dict(spec["architecture"])
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec["dtype"]))
    return model.requires_grad_(False).eval(), load_tokenizer("embedded:tiny")


def horen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, engine: str, **changes: Any
) -> HorenEditor:
    """HoReN as `conf/method/horen.yaml` sets it for a model."""
    method = OmegaConf.load(resource("conf") / "method" / "horen.yaml")
    spec = OmegaConf.load(resource("conf") / "model" / f"{name}.yaml")
    values: Any = OmegaConf.to_container(OmegaConf.create({"method": method, "model": spec}), resolve=True)
    constants = {k: v for k, v in values["method"].items() if k not in ("_target_", "name", "label")}
    return HorenEditor(model, tokenizer, seed=42, **{**constants, "engine": engine, **changes})


def milliseconds_per_edit(make: Callable[[], Editor], edits: list[EditCase]) -> float:
    """Wall time of `edit`, queries and decisions included, after a warm-up of a fresh editor on a few edits."""
    for chosen in (edits[:4], edits):
        editor = make()
        watch = Stopwatch()
        editor.edit(chosen)
        seconds = watch.elapsed()
        editor.detach()
    return 1000 * seconds / len(edits)


def cases(n: int) -> list[EditCase]:
    """The first `n` edits of the embedded stream."""
    return Facts(1).cases(n)


def what_ran(model: str, device: str) -> str:
    """Device, versions and threads, for a table's title."""
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    return f"{model} on {hardware}{threads}; torch {torch.__version__}, transformers {version('transformers')}"
