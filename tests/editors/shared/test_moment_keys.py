"""What a stored second moment is known by: everything that it depends on, and nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.shared import second_moments
from horen_bench.editors.shared.config import StatisticsConfig
from horen_bench.editors.shared.second_moments import cache_keys, model_fingerprint
from horen_bench.prompts import PromptEncoder

PATH = "model.layers.1.mlp.down_proj"


def key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: str) -> str:
    statistics = StatisticsConfig(corpus=corpus, n_texts=5, max_length=64, dtype="float32")
    return cache_keys(model, PromptEncoder(tokenizer), [PATH], statistics)[PATH]


def test_every_number_of_every_parameter_counts(golden_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_fingerprint(golden_model)
    assert model_fingerprint(copy.deepcopy(golden_model)) == first
    names = set()
    with torch.no_grad():
        for name, parameter in golden_model.named_parameters():
            middle = parameter.view(-1)[parameter.numel() // 2 : parameter.numel() // 2 + 1]
            kept = middle.clone()
            middle.copy_(-kept if kept else kept + 1)
            names.add(model_fingerprint(golden_model))
            middle.copy_(kept)
            assert model_fingerprint(golden_model) == first, name
    assert len(names) == len(list(golden_model.parameters()))
    assert first not in names
    monkeypatch.setattr(second_moments, "_HASHED", 100)
    assert model_fingerprint(golden_model) == first, "however the copies are cut"


def test_the_configuration_counts_and_where_it_came_from_does_not(golden_model: Any) -> None:
    first = model_fingerprint(golden_model)
    golden_model.config._name_or_path = "elsewhere"
    golden_model.config.transformers_version = "99"
    assert model_fingerprint(golden_model) == first
    golden_model.config.rms_norm_eps *= 10
    assert model_fingerprint(golden_model) != first


def test_numbers_of_two_bytes_have_a_key(golden_model: Any) -> None:
    assert model_fingerprint(golden_model.bfloat16()) != model_fingerprint(golden_model.float())


def test_a_folder_of_texts_counts_by_content(golden_model: Any, golden_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").write_text('{"text": "The old tower stood."}')
    first = key(golden_model, golden_tokenizer, str(tmp_path / "a"))
    assert key(golden_model, golden_tokenizer, str(tmp_path / "b")) == first
    (tmp_path / "a" / "part.jsonl").write_text('{"text": "The new tower stood."}')
    assert key(golden_model, golden_tokenizer, str(tmp_path / "a")) != first


def test_a_corpus_counts_by_content(golden_model: Any, golden_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The old tower stood.")
    (tmp_path / "b.txt").write_text("The old tower stood.")
    first = key(golden_model, golden_tokenizer, str(tmp_path / "a.txt"))
    assert key(golden_model, golden_tokenizer, str(tmp_path / "b.txt")) == first
    (tmp_path / "a.txt").write_text("The old tower fell..")
    assert key(golden_model, golden_tokenizer, str(tmp_path / "a.txt")) != first


def test_a_tokenizer_counts_by_its_rules_and_not_by_its_last_call(
    golden_model: Any, golden_tokenizer: Any, golden_folder: Path, tmp_path: Path
) -> None:
    first = key(golden_model, golden_tokenizer, "embedded:tiny/corpus.txt")
    golden_tokenizer(["a b c", "a"], truncation=True, max_length=2, padding=True)
    assert key(golden_model, golden_tokenizer, "embedded:tiny/corpus.txt") == first
    rules = json.loads((golden_folder / "tokenizer.json").read_text())
    rules["model"]["merges"].pop()  # which the example text does not need
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "tokenizer_config.json").write_text((golden_folder / "tokenizer_config.json").read_text())
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == len(golden_tokenizer)
    assert key(golden_model, other, "embedded:tiny/corpus.txt") != first
