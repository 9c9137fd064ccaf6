"""What the benchmarks share: models of real shapes without real weights, warm-ups, and a line that says what ran."""

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.config.schema import ModelConfig
from horen_bench.datasets.facts import Facts
from horen_bench.editors.base import Editor
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.models.loading import load_model, load_tokenizer
from horen_bench.profiling import Stopwatch

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what nearly all benchmarks take: `--model` and `--device`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a file of conf/model/, at random initialisation but for tiny")
    parser.add_argument("--device", default="cpu")
    return parser


# --- Models and editors ----------------------------------------------------------------------------------


def model_and_tokenizer(name: str, device: str) -> Pair:
    """The embedded model, or the architecture of another `conf/model/` file at random initialisation."""
    if name != "tiny":
        return backbone(name, device)
    spec = model_spec(name)
    loaded = load_model(spec.hub_id, dtype=spec.dtype, device=device)
    return loaded.model, loaded.tokenizer


def model_spec(name: str) -> ModelConfig:
    """What a `conf/model/` file says."""
    return run_config([f"model={name}"]).model


def backbone(name: str, device: str, **changes: Any) -> Pair:
    """The architecture of a `conf/model/` file at random initialisation, with other sizes in place."""
    spec = model_spec(name)
    return random_model({**(spec.architecture or {}), **changes}, spec.dtype, device)


def random_model(architecture: Mapping[str, Any], dtype: str, device: str) -> Pair:
    """A frozen model of an architecture, its weights drawn on the device, and the embedded tokenizer.

    Speed and memory do not depend on the weights' values. The embedded tokenizer serves all shapes: its prompts have
    about as many tokens as ZsRE's under the real ones.

    Args:
        architecture: `model_type` and arguments of its transformers configuration.
        dtype: of the weights, e.g. `bfloat16`.
        device: where the model is made.
    """
    values = dict(architecture)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval(), load_tokenizer("embedded:tiny")


def editor_of(method: str, pair: Pair, name: str, *overrides: str, **changes: Any) -> Editor[Any]:
    """A method as `conf/` sets it for a model.

    Args:
        method: a file of `conf/method/`.
        pair: model and tokenizer.
        name: a file of `conf/model/`.
        overrides: as a command line has them.
        changes: other values of the method's settings; a mapping changes a part of a section.
    """
    config = run_config([f"model={name}", f"method={method}", *overrides])
    editor: Editor[Any] = config.method.editor_class()(*pair, config.method.changed(**changes), seed=config.seed)
    return editor


def horen(pair: Pair, name: str, **changes: Any) -> HorenEditor:
    """HoReN as `conf/` sets it for a model, with other settings in place."""
    editor = editor_of("horen", pair, name, **changes)
    assert isinstance(editor, HorenEditor)
    return editor


def fill(editor: HorenEditor, size: int) -> None:
    """Random unit keys up to `size` entries, made where the codebook is; their values are not written.

    Room for a later slice is made as well, so that no measurement pays for the growth of the buffers.
    """
    codebook = editor.codebook
    before, missing = len(codebook), max(0, size - len(codebook))
    codebook._reserve(before + missing + 1024)
    codebook.labels += [(0,)] * missing
    codebook.prompt_lengths += [1] * missing
    codebook.versions += [1] * missing
    generator = torch.Generator(codebook.keys.device).manual_seed(0)
    for chunk in torch.split(codebook.keys[before:], 4096) if missing else ():
        drawn = torch.randn(chunk.shape, generator=generator, device=chunk.device)
        chunk.copy_(normalize(drawn, dim=1))


def cases(n: int) -> list[EditCase]:
    """The first `n` edits of the embedded stream."""
    return Facts(stream_seed=1).cases(n)


# --- Time ------------------------------------------------------------------------------------------------


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Mean wall time of a call, after one to warm up."""
    action()
    watch = Stopwatch()
    for _ in range(repeats):
        action()
    return watch.elapsed() / repeats


def milliseconds_per_edit(make: Callable[[], Editor[Any]], edits: Sequence[EditCase]) -> float:
    """Wall time of `edit` by a fresh editor, queries and decisions included.

    Another editor writes the same edits before, all of them: fewer would leave the growth of the allocator's pools in
    the figure.
    """
    seconds = 0.0
    for _ in ("warm-up", "measured"):
        editor = make()
        watch = Stopwatch()
        editor.edit(edits)
        seconds = watch.elapsed()
        editor.detach()
    return 1000 * seconds / len(edits)


def what_ran(model: str, device: str) -> str:
    """Device, versions and threads, for a table's title."""
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    return f"{model} on {hardware}{threads}; torch {torch.__version__}, transformers {version('transformers')}"
