"""Second moments: the definition, their cache, and what is derived from them."""

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
from horen_bench.editors.locate_edit.null_space import KeyMemory, NullSpace, null_space
from horen_bench.editors.locate_edit.target_vector import inputs_of
from horen_bench.editors.shared import second_moments as statistics
from horen_bench.editors.shared.corpora import read_corpus, world_texts
from horen_bench.editors.shared.second_moments import (
    Pass,
    Recipe,
    SecondMoment,
    accumulate,
    cholesky,
    read_published,
    second_moments,
)
from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.world import World

PATHS = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
TEXTS = ["The old tower stood.", "Who founded Brightwater?", "A long walk along the river Sanderling in late May."]
CPU = torch.device("cpu")


def one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[Tensor, int]:
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


def recipe(folder: Path, corpus: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"corpus": corpus, "n_texts": 50, "max_length": 64, "dtype": "float32"}
    return Recipe(**{**settings, "folder": str(folder), **changes})


def test_moment_is_the_sum_over_all_tokens_bos_included(golden_model: Any, golden_tokenizer: Any) -> None:
    found = accumulate(golden_model, golden_tokenizer, PATHS, TEXTS, max_length=64, dtype=torch.float64)
    for path in PATHS:
        total, n_tokens = one_by_one(golden_model, golden_tokenizer, path)
        assert found[path].n_tokens == n_tokens
        torch.testing.assert_close(found[path].total.float(), total, rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_whole(golden_model: Any, golden_tokenizer: Any) -> None:
    whole, first, rest = (
        accumulate(golden_model, golden_tokenizer, PATHS[:1], texts, max_length=64)[PATHS[0]]
        for texts in (TEXTS, TEXTS[:1], TEXTS[1:])
    )
    both = first + rest
    assert both.n_tokens == whole.n_tokens
    torch.testing.assert_close(both.mean, whole.mean, rtol=1e-5, atol=1e-6)


def test_second_call_reads_the_cache_and_another_model_or_corpus_does_not(
    golden_model: Any, golden_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "texts.json"
    corpus.write_text(json.dumps(TEXTS))
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> dict[str, SecondMoment]:
        calls.append(1)
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(statistics, "accumulate", counting)
    settings = recipe(tmp_path / "cache", str(corpus))
    first = second_moments(golden_model, golden_tokenizer, PATHS, settings)
    again = second_moments(golden_model, golden_tokenizer, PATHS, settings)
    assert len(calls) == 1
    assert all(torch.equal(first[path].total, again[path].total) for path in PATHS)
    second_moments(golden_model, golden_tokenizer, PATHS, recipe(tmp_path / "cache", str(corpus), n_texts=2))
    assert len(calls) == 2
    with torch.no_grad():
        golden_model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    second_moments(golden_model, golden_tokenizer, PATHS, settings)
    assert len(calls) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    second_moments(golden_model, golden_tokenizer, PATHS, settings)
    assert len(calls) == 4


@pytest.mark.parametrize("stop", [1, 2])
def test_a_pass_that_was_stopped_goes_on_with_the_same_sums(
    stop: int, golden_model: Any, golden_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "texts.json"
    corpus.write_text(json.dumps(TEXTS))
    monkeypatch.setattr(statistics, "_GROUP", 1)
    monkeypatch.setattr(statistics, "_SAVE_EVERY", -1e9)  # after every text
    straight = second_moments(golden_model, golden_tokenizer, PATHS, recipe(tmp_path / "straight", str(corpus)))
    attended, calls = statistics._attended, [0]

    def stopping(*args: Any) -> dict[str, Tensor]:
        if calls[0] == stop:
            raise KeyboardInterrupt
        calls[0] += 1
        return attended(*args)

    settings = recipe(tmp_path / "cache", str(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_attended", stopping)
        with pytest.raises(KeyboardInterrupt):
            second_moments(golden_model, golden_tokenizer, PATHS, settings)
        (unfinished,) = (tmp_path / "cache").iterdir()
        assert Pass.load(unfinished).n_texts == stop
        calls[0] = stop + 1 - len(TEXTS)  # the texts that are left, and no more
        resumed = second_moments(golden_model, golden_tokenizer, PATHS, settings)
    for path in PATHS:
        assert torch.equal(resumed[path].total, straight[path].total)
        assert resumed[path].n_tokens == straight[path].n_tokens
    assert len(list((tmp_path / "cache").iterdir())) == len(PATHS)


def test_a_damaged_save_is_no_save(tmp_path: Path) -> None:
    saved = tmp_path / "unfinished.safetensors"
    Pass({"a": torch.eye(2)}, 100, 7, 1).save(saved)
    assert Pass.load(saved).totals["a"].equal(torch.eye(2))
    assert (Pass.load(saved).n_texts, Pass.load(saved).n_tokens, Pass.load(saved).n_bad) == (100, 7, 1)
    saved.write_bytes(b"damaged")
    assert Pass.load(saved) == Pass.load(None) == Pass()


def test_published_statistics_can_be_used(golden_model: Any, golden_tokenizer: Any, tmp_path: Path) -> None:
    total = torch.eye(176) * 6
    saved = {"mom2.mom2": total.numpy(), "mom2.count": np.int64(3), "mom2.constructor": "any()"}
    np.savez(tmp_path / f"{PATHS[0]}_float32_mom2_100.npz", **saved)  # type: ignore[arg-type]
    assert torch.equal(read_published(tmp_path, PATHS[0]).mean, torch.eye(176) * 2)
    settings = recipe(tmp_path, "unused", published=str(tmp_path))
    assert second_moments(golden_model, golden_tokenizer, PATHS[:1], settings)[PATHS[0]].n_tokens == 3
    with pytest.raises(UserError, match=r"there is no model\.layers\.2"):
        second_moments(golden_model, golden_tokenizer, PATHS, settings)


def test_too_little_text_is_said(golden_model: Any, golden_tokenizer: Any) -> None:
    moment = accumulate(golden_model, golden_tokenizer, PATHS[:1], TEXTS, max_length=64)[PATHS[0]]
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


def test_formats_of_a_corpus_agree_and_the_sample_is_fixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    found = [read_corpus(str(tmp_path / name), 2) for name in ("a.txt", "a.json", "a.jsonl")]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


def test_a_hub_corpus_is_read_by_its_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"id": i, "text": text} for i, text in enumerate([*TEXTS, " "])])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(read_corpus("some/corpus:20231101.en", 10)) == sorted(TEXTS)
    assert set(read_corpus("some/corpus", 3)) < set(TEXTS) | {" "}
    assert asked == [(("some/corpus", "20231101.en"), {"split": "train"}), (("some/corpus", None), {"split": "train"})]


def test_a_hub_corpus_that_cannot_be_had_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_embedded_corpus_is_what_its_command_writes() -> None:
    text = (resource("data") / "tiny" / "corpus.txt").read_text(encoding="utf-8")
    assert text == "\n".join(world_texts(World())) + "\n"


# --- Null space ------------------------------------------------------------------------------------------


def moment_with(values: list[float]) -> tuple[SecondMoment, Tensor]:
    """A moment with given eigenvalues, and its eigenvectors."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(1))).Q
    return SecondMoment(q @ torch.diag(torch.tensor(values)) @ q.T * 10, 10), q


def test_null_space_is_spanned_by_eigenvectors_below_the_threshold(tmp_path: Path) -> None:
    moment, q = moment_with([5.0, 1.0, 0.01, 0.001])
    file = tmp_path / "space.safetensors"
    for _ in range(2):  # the second time from the file
        space = null_space(moment, 0.5, file, CPU)
        assert space.rank == 2
        torch.testing.assert_close(space.matrix(), q[:, 2:] @ q[:, 2:].T, rtol=0, atol=1e-5)
        rows = torch.randn(3, 4)
        torch.testing.assert_close(space.project(rows), rows @ space.matrix(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no eigenvalue of the second moment is below"):
        null_space(moment, 1e-4, None, CPU)


def test_key_memory_solves_the_published_system_at_every_turn() -> None:
    generator = torch.Generator().manual_seed(2)
    space = NullSpace(torch.linalg.qr(torch.randn(12, 5, generator=generator)).Q)
    memory, p = KeyMemory(space, 0.7), space.matrix().double()
    for n in (1, 3, 1, 2, 9, 1):  # more keys in the end than the null space has directions
        keys, residual = torch.randn(n, 12, generator=generator), torch.randn(n, 6, generator=generator)
        k = keys.double().T
        system = p @ (k @ k.T + memory.moment().double()) + 0.7 * torch.eye(12)
        expected = torch.linalg.solve(system, p @ k @ residual.double()).T
        torch.testing.assert_close(memory.update(keys, residual).double(), expected, rtol=1e-4, atol=1e-5)
        memory.append(keys)
    a = memory.keys @ p.float()
    torch.testing.assert_close(
        memory.factor @ memory.factor.T, (a @ a.T + 0.7 * torch.eye(17)).double(), rtol=1e-4, atol=1e-4
    )
