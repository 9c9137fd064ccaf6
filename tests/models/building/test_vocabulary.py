"""A model with a part of its vocabulary says of the kept tokens what the whole model says."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from horen_bench.errors import UserError
from horen_bench.models.building.vocabulary import closed, keep_tokens, read_kept, write_kept
from horen_bench.models.pretrained import whole_model

TEXT = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "thethe"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def whole(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model of two layers with a tokenizer of byte pairs."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=request.param,
        initializer_range=0.3,
    )
    folder = tmp_path / "whole"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _kept(whole: Path) -> list[int]:
    """Special tokens, and all that "the cat sat" is made of and through; `<unk>` is not the last id, so ids move."""
    rules = json.loads((whole / "tokenizer.json").read_text())
    ids = rules["model"]["vocab"]
    tokens = Tokenizer.from_file(str(whole / "tokenizer.json")).encode("the cat sat").tokens
    return sorted({0, 1, 2, 3} | {ids[token] for token in closed(rules, tokens) if token in ids})


def test_logits_of_kept_tokens_are_those_of_the_whole_model(whole: Path, tmp_path: Path) -> None:
    kept, folder = _kept(whole), tmp_path / "smaller"
    folder.mkdir()
    keep_tokens(whole, kept, folder)
    smaller = whole_model(AutoModelForCausalLM, folder)
    ids = AutoTokenizer.from_pretrained(folder)("the cat sat", return_tensors="pt").input_ids
    old = AutoTokenizer.from_pretrained(whole)("the cat sat", return_tensors="pt").input_ids
    assert [kept[token] for token in ids[0].tolist()] == old[0].tolist()
    assert len(kept) < 60
    with torch.no_grad():
        expected = whole_model(AutoModelForCausalLM, whole)(input_ids=old).logits[..., kept]
        torch.testing.assert_close(smaller(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_settings_name_special_tokens_by_their_new_ids(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smaller"
    folder.mkdir()
    kept = [token for token in _kept(whole) if token != 3]  # every id behind it moves down
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, kept[-1]]}))
    keep_tokens(whole, kept, folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, len(kept) - 1]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(kept)


def test_a_special_token_cannot_be_left_out(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smaller"
    folder.mkdir()
    with pytest.raises(UserError, match=r"token 2 .* must be kept"):
        keep_tokens(whole, [0, 1, 3, 5], folder)


def test_the_way_to_a_token_is_kept() -> None:
    """`abc` is made of `ab` and `c`; `bc` is not on the way."""
    rules = {"model": {"merges": [["a", "b"], ["b", "c"], ["ab", "c"]]}}
    assert closed(rules, ["abc"]) == {"a", "b", "c", "ab", "abc"}


@given(st.sets(st.integers(0, 99), min_size=1))
def test_a_list_of_kept_tokens_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, kept: set[int]
) -> None:
    path = tmp_path_factory.mktemp("kept") / "kept.json"
    write_kept(path, kept, 100, "drawn at random")
    assert read_kept(path) == sorted(kept)
