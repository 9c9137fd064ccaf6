"""Second moments: the definition, their cache, and the corpora that they are taken over."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import datasets
from horen_bench.editors.shared import second_moments as statistics
from horen_bench.editors.shared.config import StatisticsConfig
from horen_bench.editors.shared.corpora import read_corpus
from horen_bench.editors.shared.second_moments import (
    MomentSums,
    SecondMoment,
    accumulate,
    cholesky,
    read_published,
    second_moments,
)
from horen_bench.errors import UserError
from horen_bench.models.hooks import inputs_of
from horen_bench.prompts import PromptEncoder

PATHS = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
TEXTS = ["The old tower stood.", "Who founded Brightwater?", "A long walk along the river Sanderling in late May."]
CPU = torch.device("cpu")


@pytest.fixture
def encoder(golden_tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(golden_tokenizer)


def text_by_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[Tensor, int]:
    """The definition: every token of every text, one text at a time."""
    total, n_tokens = torch.zeros(176, 176), 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad(), inputs_of({path: model.get_submodule(path)}) as inputs:
            model(ids)
        for x in inputs[path][0]:
            total += torch.outer(x, x)
            n_tokens += 1
    return total, n_tokens


def over(folder: Path, corpus: str, **changes: Any) -> StatisticsConfig:
    settings: dict[str, Any] = {"corpus": corpus, "n_texts": 50, "max_length": 64, "dtype": "float32"}
    return StatisticsConfig(**{**settings, "folder": str(folder), **changes})


def test_moment_is_the_sum_over_all_tokens_bos_included(golden_model: Any, encoder: PromptEncoder) -> None:
    moments = accumulate(golden_model, encoder, PATHS, TEXTS, max_length=64, dtype=torch.float64)
    for path in PATHS:
        total, n_tokens = text_by_text(golden_model, encoder.tokenizer, path)
        assert moments[path].n_tokens == n_tokens
        torch.testing.assert_close(moments[path].total.float(), total, rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_whole(golden_model: Any, encoder: PromptEncoder) -> None:
    whole, first, rest = (
        accumulate(golden_model, encoder, PATHS[:1], texts, max_length=64)[PATHS[0]]
        for texts in (TEXTS, TEXTS[:1], TEXTS[1:])
    )
    both = first + rest
    assert both.n_tokens == whole.n_tokens
    torch.testing.assert_close(both.mean, whole.mean, rtol=1e-5, atol=1e-6)


def test_second_call_reads_the_cache_and_another_model_or_corpus_does_not(
    golden_model: Any, encoder: PromptEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "texts.json"
    corpus.write_text(json.dumps(TEXTS))
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> dict[str, SecondMoment]:
        calls.append(1)
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(statistics, "accumulate", counting)
    settings = over(tmp_path / "cache", str(corpus))
    first = second_moments(golden_model, encoder, PATHS, settings)
    again = second_moments(golden_model, encoder, PATHS, settings)
    assert len(calls) == 1
    assert all(torch.equal(first[path].total, again[path].total) for path in PATHS)
    second_moments(golden_model, encoder, PATHS, over(tmp_path / "cache", str(corpus), n_texts=2))
    assert len(calls) == 2
    with torch.no_grad():
        golden_model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    second_moments(golden_model, encoder, PATHS, settings)
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    second_moments(golden_model, encoder, PATHS, settings)
    assert len(calls) == 4


@pytest.mark.parametrize("stop", [1, 2])
def test_a_pass_that_was_stopped_goes_on_with_the_same_sums(
    stop: int, golden_model: Any, encoder: PromptEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "texts.json"
    corpus.write_text(json.dumps(TEXTS))
    monkeypatch.setattr(statistics, "_GROUP", 1)
    monkeypatch.setattr(statistics, "_SAVE_EVERY", -1e9)  # after every text
    straight = second_moments(golden_model, encoder, PATHS, over(tmp_path / "straight", str(corpus)))
    attended, calls = statistics._attended, [0]

    def stopping(*args: Any) -> dict[str, Tensor]:
        if calls[0] == stop:
            raise KeyboardInterrupt
        calls[0] += 1
        return attended(*args)

    settings = over(tmp_path / "cache", str(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_attended", stopping)
        with pytest.raises(KeyboardInterrupt):
            second_moments(golden_model, encoder, PATHS, settings)
        (unfinished,) = (tmp_path / "cache").iterdir()
        assert MomentSums.load(unfinished).n_texts == stop
        calls[0] = stop + 1 - len(TEXTS)  # the texts that are left, and no more
        resumed = second_moments(golden_model, encoder, PATHS, settings)
    for path in PATHS:
        assert torch.equal(resumed[path].total, straight[path].total)
        assert resumed[path].n_tokens == straight[path].n_tokens
    assert len(list((tmp_path / "cache").iterdir())) == len(PATHS)


def test_a_damaged_save_is_no_save(tmp_path: Path) -> None:
    saved = tmp_path / "unfinished.safetensors"
    MomentSums({"a": torch.eye(2)}, 100, 7, 1).save(saved)
    assert MomentSums.load(saved).totals["a"].equal(torch.eye(2))
    assert (MomentSums.load(saved).n_texts, MomentSums.load(saved).n_tokens, MomentSums.load(saved).n_bad) == (
        100,
        7,
        1,
    )
    saved.write_bytes(b"damaged")
    assert MomentSums.load(saved) == MomentSums.load(None) == MomentSums()


def test_published_statistics_can_be_used(golden_model: Any, encoder: PromptEncoder, tmp_path: Path) -> None:
    total = torch.eye(176) * 6
    saved = {"mom2.mom2": total.numpy(), "mom2.count": np.int64(3), "mom2.constructor": "any()"}
    np.savez(tmp_path / f"{PATHS[0]}_float32_mom2_100.npz", **saved)  # type: ignore[arg-type]
    assert torch.equal(read_published(tmp_path, PATHS[0]).mean, torch.eye(176) * 2)
    settings = over(tmp_path, "unused", published=str(tmp_path))
    assert second_moments(golden_model, encoder, PATHS[:1], settings)[PATHS[0]].n_tokens == 3
    with pytest.raises(UserError, match=r"there is no model\.layers\.2"):
        second_moments(golden_model, encoder, PATHS, settings)


def test_too_little_text_is_refused(golden_model: Any, encoder: PromptEncoder) -> None:
    moment = accumulate(golden_model, encoder, PATHS[:1], TEXTS, max_length=64)[PATHS[0]]
    with pytest.raises(UserError, match="not positive definite; take more text"):
        cholesky(moment, 0.0, CPU)
    factor = cholesky(moment, 1e-3, CPU)
    ridge = 1e-3 * float(moment.mean.diagonal().mean())
    torch.testing.assert_close((factor @ factor.T).float(), moment.mean + ridge * torch.eye(176), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("text", "sentence"), [("", "it holds no text"), (None, "cannot be read")])
def test_a_corpus_without_text_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "texts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_corpus(str(path), 5)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_only_a_line_break_ends_a_text_and_a_byte_order_mark_is_none_of_it(
    tmp_path: Path, separator: str, encoding: str
) -> None:
    texts = [f"first{separator}line", "second line"]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding)
    (tmp_path / "a.json").write_text(json.dumps(texts), encoding)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding)
    for name in ("a.txt", "a.json", "a.jsonl"):
        assert sorted(read_corpus(str(tmp_path / name), 5)) == texts


def test_formats_of_a_corpus_agree_and_the_sample_is_fixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    samples = [read_corpus(str(tmp_path / name), 2) for name in ("a.txt", "a.json", "a.jsonl")]
    assert samples[0] == samples[1] == samples[2]
    assert len(samples[0]) == 2


def test_a_hub_corpus_is_read_by_its_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"id": i, "text": text} for i, text in enumerate([*TEXTS, " "])])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(read_corpus("some/corpus:20231101.en", 10)) == sorted(TEXTS)
    assert set(read_corpus("some/corpus", 3)) < set(TEXTS) | {" "}
    assert calls == [(("some/corpus", "20231101.en"), {"split": "train"}), (("some/corpus", None), {"split": "train"})]


def test_a_hub_corpus_that_cannot_be_had_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> datasets.Dataset:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        read_corpus("some/corpus", 10)
    advice = "give a local .txt, .jsonl or .json file instead"
    assert str(caught.value) == f"method.statistics.corpus=some/corpus cannot be loaded (no route); {advice}"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=f"pip install datasets, or {advice}"):
        read_corpus("some/corpus", 10)


def test_a_hub_corpus_without_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"body": "A text."}]))
    with pytest.raises(UserError, match="every item must be a text or have a field 'text'"):
        read_corpus("some/corpus", 10)
