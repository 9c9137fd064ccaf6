"""The parallel engine against the sequential one: same decisions, same values up to rounding, same tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.editors.horen.config import HorenConfig
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.models.partial import NotSupportedError, UpperLayers

# Near paraphrases, so that edits match, conflict and chain; prompts and targets of many lengths.
_PROMPTS = (
    "Which company made the Larkspur 300?",
    "What company made the Larkspur 300?",
    "Which company built the Larkspur 300?",
    "What city was Edda Quillfeather born in?",
    "In what city was Edda Quillfeather born?",
    "Who founded Brightwater?",
    "In which year did the bridge over the Sanderling river open to the public?",
)
_TARGETS = ("Ostrander Motors", "1927", "Port Maribel", "Grenholm by the Sea")

_STREAMS = st.lists(st.tuples(st.sampled_from(_PROMPTS), st.sampled_from(_TARGETS)), min_size=1, max_size=14)


@pytest.fixture(scope="module")
def model_and_tokenizer(golden_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(golden_folder)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(golden_folder)


def _editor(pair: tuple[PreTrainedModel, PreTrainedTokenizerBase], engine: str, **changes: Any) -> HorenEditor:
    constants: dict[str, Any] = {
        "module": "model.layers.2.mlp.down_proj",
        "threshold": 0.6,
        "lora": {"learning_rate": 0.01, "rank": 2, "scale": 1.0},
        "n_steps": 8,
        "early_stopping": {"loss_bound": 0.05, "patience": 3},
        "train_batch": 4,
    }
    config = run_config(["method=horen"]).method.changed(**{**constants, "engine": engine, **changes})
    assert isinstance(config, HorenConfig)
    return HorenEditor(*pair, config, seed=3)


def _cases(stream: Sequence[tuple[str, str]]) -> list[EditCase]:
    return [EditCase(str(i), prompt, target) for i, (prompt, target) in enumerate(stream)]


def _decision(record: EditRecord) -> tuple[Any, ...]:
    route = record.route
    return (record.action, record.entry, route and (route.entry, route.matched), record.steps)


def _result(editor: HorenEditor, records: Sequence[EditRecord]) -> dict[str, Any]:
    """What a stream came to: decisions, codebook, and what the model then answers to every prompt."""
    prompts = editor.encoder.prompts(_PROMPTS)
    tokens = greedy_decode(editor.model, prompts, [5] * len(prompts), 0)
    result = {
        "decisions": [_decision(record) for record in records],
        "tokens": tokens,
        "state": {name: tensor.clone() for name, tensor in editor.state_dict().items()},
    }
    editor.detach()
    return result


def _assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one["decisions"] == other["decisions"]
    assert one["tokens"] == other["tokens"]
    for name, tensor in one["state"].items():
        torch.testing.assert_close(other["state"][name], tensor, rtol=5e-3, atol=5e-3, msg=f"{name} differs")


_FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_FEW
@given(stream=_STREAMS)
def test_both_engines_write_the_same_stream(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase], stream: list[tuple[str, str]]
) -> None:
    cases = _cases(stream)
    sequential = _editor(model_and_tokenizer, "sequential")
    expected = _result(sequential, sequential.edit(cases))
    parallel = _editor(model_and_tokenizer, "parallel")
    _assert_same(_result(parallel, parallel.edit(cases)), expected)


@_FEW
@given(stream=_STREAMS, data=st.data())
def test_a_stream_cut_anywhere_and_resumed_from_disk_comes_out_the_same(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
    stream: list[tuple[str, str]],
    data: st.DataObject,
) -> None:
    cases = _cases(stream)
    cut = data.draw(st.integers(0, len(cases)))
    whole = _editor(model_and_tokenizer, "parallel")
    expected = _result(whole, whole.edit(cases))
    first = _editor(model_and_tokenizer, "parallel")
    records = first.edit(cases[:cut])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    first.detach()
    second = _editor(model_and_tokenizer, "parallel")
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    records += second.edit(cases[cut:])
    _assert_same(_result(second, records), expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"adaptor": "lora"}, id="lora"),
        pytest.param({"hopfield": {"beta": 20.0, "alpha": 0.1, "steps": 3, "eps": 1e-5}}, id="three-steps"),
        pytest.param({"hopfield": {"beta": 20.0, "alpha": 0.1, "steps": 0, "eps": 1e-5}}, id="nearest-key"),
        pytest.param({"normalize": False, "threshold": 5.0}, id="unnormalized"),
        pytest.param({"label_rule": "release"}, id="release-labels"),
        pytest.param({"early_stopping": None}, id="all-steps"),
        pytest.param({"module": "model.layers.1.self_attn.o_proj"}, id="module-inside-its-layer"),
        pytest.param({"module": "model.layers.3.mlp.down_proj"}, id="last-layer"),
    ],
)
def test_both_engines_agree_under_every_switch(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase], changes: dict[str, Any]
) -> None:
    # Repeats, a chain of three on one entry, a conflict and a return to the first target.
    p, t = _PROMPTS, _TARGETS
    stream = [(p[0], t[0]), (p[0], t[0]), (p[3], t[2]), (p[1], t[0]), (p[0], t[1]), (p[0], t[0]), (p[6], t[1])]
    cases = _cases(stream)
    sequential = _editor(model_and_tokenizer, "sequential", **changes)
    expected = _result(sequential, sequential.edit(cases))
    assert "fine_tuned" in {decision[0] for decision in expected["decisions"]}
    parallel = _editor(model_and_tokenizer, "parallel", **changes)
    _assert_same(_result(parallel, parallel.edit(cases)), expected)


def test_both_engines_agree_on_a_bfloat16_model(golden_folder: Path) -> None:
    """Decisions are the same; values and tokens only as far as eight bits of mantissa allow."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(golden_folder, dtype=torch.bfloat16)
    pair = (model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(golden_folder))
    p, t = _PROMPTS, _TARGETS
    cases = _cases([(p[0], t[0]), (p[3], t[2]), (p[0], t[0]), (p[5], t[1]), (p[3], t[1])])
    results = []
    for engine in ("sequential", "parallel"):
        editor = _editor(pair, engine, n_steps=30, early_stopping=None)
        results.append(_result(editor, editor.edit(cases)))
    assert results[0]["decisions"] == results[1]["decisions"]
    assert results[0]["state"]["keys"].dtype == torch.bfloat16
    # Training amplifies rounding, so longer answers may differ; the first token of what was written may not.
    for i, target in ((0, t[0]), (3, t[1]), (5, t[1])):
        first = pair[1](f" {target}", add_special_tokens=False)["input_ids"][0]
        assert [result["tokens"][i][0] for result in results] == [first, first]


def test_a_model_that_does_not_fit_the_fast_path_is_edited_all_the_same_and_the_reader_told(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = _cases([(_PROMPTS[0], _TARGETS[1]), (_PROMPTS[3], _TARGETS[1])])
    sequential = _editor(model_and_tokenizer, "sequential")
    expected = _result(sequential, sequential.edit(cases))

    def refused(*_: object) -> None:
        raise NotSupportedError("the layout is odd")

    monkeypatch.setattr(UpperLayers, "__init__", refused)
    editor = _editor(model_and_tokenizer, "parallel")
    _assert_same(_result(editor, editor.edit(cases)), expected)
    assert editor.warnings() == ["values were trained one by one on the whole model: the layout is odd"]


def test_both_engines_agree_where_a_long_edit_changes_the_positions_of_short_ones(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """Longrope takes other frequencies for a whole batch once a row is longer than the model was first trained for."""
    plain, tokenizer = model_and_tokenizer
    cases = _cases([(_PROMPTS[5], _TARGETS[1]), (_PROMPTS[0], _TARGETS[3])])
    short, long = (len(tokenizer(f"{case.prompt} {case.target}")["input_ids"]) for case in cases)
    assert short < long
    half = plain.config.head_dim // 2
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * half}
    rotary |= {"long_factor": [9.0] * half, "original_max_position_embeddings": long - 1}
    config = LlamaConfig.from_dict({**plain.config.to_dict(), "rope_parameters": rotary, "rope_scaling": None})
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.load_state_dict(plain.state_dict())
    pair = (model.requires_grad_(False).eval(), tokenizer)
    sequential = _editor(pair, "sequential", n_steps=20, early_stopping=None)
    expected = _result(sequential, sequential.edit(cases))
    parallel = _editor(pair, "parallel", n_steps=20, early_stopping=None)
    _assert_same(_result(parallel, parallel.edit(cases)), expected)
    assert "rotary" in parallel.warnings()[0]


def test_no_score_matrix_outgrows_the_block(
    model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 entries and at most 400 scores at once: queries go two by two, with the decisions of one pass."""
    editor = _editor(model_and_tokenizer, "parallel", n_steps=0)
    editor.edit(_cases([(f"Who wrote book number {i}?", f"{i}") for i in range(200)]))
    assert len(editor.codebook) > 100
    prompts = [f"Who wrote book number {i}?" for i in range(0, 200, 17)]
    expected = editor.routes(prompts)
    monkeypatch.setattr("horen_bench.editors.codebook.editor._MOST_SCORES", 2 * len(editor.codebook))
    seen: list[int] = []
    match = editor.match

    def watched(queries: torch.Tensor, hidden: torch.Tensor | None = None) -> Any:
        seen.append(len(queries))
        return match(queries, hidden)

    monkeypatch.setattr(editor, "match", watched)
    routes = editor.routes(prompts)
    assert [route and route.entry for route in routes] == [route and route.entry for route in expected]
    assert max(seen) == 2
    editor.detach()
