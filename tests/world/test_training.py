"""The embedded model: its tokenizer, a short training, and what the shipped weights know."""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from horen_bench.cases import Probe
from horen_bench.datasets.facts import records
from horen_bench.errors import UserError
from horen_bench.world import RELATIONS, World
from horen_bench.world import training as tiny
from horen_bench.world.passages import known_facts, passage
from horen_bench.world.training import build, build_model, build_tokenizer, recall, recall_probes, tiny_dir, train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the command does; beside other busy processes, threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_world() -> World:
    return World(n_trained=30, n_questions=20)


@pytest.fixture(scope="module")
def small_tokenizer(small_world: World) -> PreTrainedTokenizerFast:
    return build_tokenizer(small_world)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(tiny_dir()))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return cast(LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(tiny_dir(), dtype=torch.float32))


def sample(questions: Sequence[Probe], size: int = 300) -> list[Probe]:
    return random.Random(0).sample(list(questions), size)


def test_tokenizer_keeps_every_word_of_an_answer_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    for pool in World().pools.values():
        for answer in pool:
            assert len(tokenizer.tokenize(f" {answer}")) == len(answer.split())


def test_tokenizer_puts_bos_before_every_text_and_nothing_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Who is the mayor of Nowhere?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("?")


@pytest.mark.parametrize("text", ["What  is it? ", "Zoë's café, 1984!", "nq question: how many bells"])
def test_tokenizer_gives_any_text_back(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_prompt_and_answer_tokenise_as_they_do_together(tokenizer: PreTrainedTokenizerFast) -> None:
    for probe in sample(recall_probes(World())["trained"], 50) + sample(World().questions, 50):
        apart = tokenizer(probe.prompt)["input_ids"]
        apart += tokenizer(f" {probe.answer}", add_special_tokens=False)["input_ids"]
        assert tokenizer(f"{probe.prompt} {probe.answer}")["input_ids"] == apart


def test_building_the_tokenizer_gives_the_shipped_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer(World()).get_vocab() == tokenizer.get_vocab()


def test_held_out_wordings_are_never_trained_on(small_world: World) -> None:
    trained_on = " ".join(tiny._tokenizer_text(small_world))
    epochs = tiny._epochs(small_world, random.Random(0))
    trained_on += " ".join(probe.prompt for _ in range(20) for probe in next(epochs))
    for subject in small_world.trained():
        for fact in subject.facts:
            assert fact.ask(fact.relation.trained[0]).prompt in trained_on or len(fact.relation.trained) > 10
            for wording in fact.relation.held_out:
                assert fact.ask(wording).prompt not in trained_on


def test_an_epoch_holds_every_fact_once_and_every_unrelated_question_twice(small_world: World) -> None:
    items = [item for item in next(tiny._epochs(small_world, random.Random(0))) if not item.answer.endswith(".")]
    assert len(items) == 2 * 30 + 2 * 20
    assert all(items.count(question) == 2 for question in small_world.questions)
    answers = sorted(fact.answer for subject in small_world.trained() for fact in subject.facts)
    asked = sorted(item.answer for item in items if item not in small_world.questions)
    assert asked == answers


def test_an_epoch_tells_of_every_subject_once_what_is_known_of_it(small_world: World) -> None:
    epochs = tiny._epochs(small_world, random.Random(0))
    first, second = ([item for item in next(epochs) if item.answer.endswith(".")] for _ in range(2))
    known = sorted(passage(subject, known_facts(small_world, subject)) for subject in small_world.trained())
    assert sorted(item.answer for item in first) == sorted(item.answer for item in second) == known
    assert {item.prompt for item in first} != {item.prompt for item in second}


def test_loss_weights_skip_bos_and_padding_and_favour_the_answer() -> None:
    # Two prompt tokens behind BOS, two answer tokens and EOS, against a shorter text.
    batch = tiny._padded([([1, 5, 6, 7, 8, 2], 3), ([1, 5, 7, 2], 2)], [False, False], pad=0)
    assert batch.ids.tolist() == [[1, 5, 6, 7, 8, 2], [1, 5, 7, 2, 0, 0]]
    assert batch.weights.tolist() == [
        pytest.approx([0, 0.1, 0.1, 1, 1, 1]),
        pytest.approx([0, 0.1, 1, 1, 0, 0]),
    ]


def test_a_gathered_answer_sees_the_last_token_of_its_prompt_alone() -> None:
    batch = tiny._padded([([1, 5, 6, 7, 8, 2], 3), ([1, 5, 6, 7, 8, 2], 3)], [True, False], pad=0)
    assert batch.seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    assert torch.equal(batch.seen[1, 0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_four_of_five_passages_and_no_short_answer_are_gathered(
    small_world: World, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    batches = tiny._batches(small_world, small_tokenizer, random.Random(0))
    share: dict[bool, list[bool]] = {True: [], False: []}
    for batch in islice(batches, 60):
        for ids, weights, seen in zip(batch.ids, batch.weights, batch.seen, strict=True):
            is_passage = int((weights == 1).sum()) > 10
            share[is_passage].append(not seen[0, int((ids != 0).sum()) - 1, 0])
    assert 0.75 < sum(share[True]) / len(share[True]) < 0.85
    assert not any(share[False])


def test_learning_rate_warms_up_stays_and_falls_to_two_percent() -> None:
    assert tiny._rate(0, 1000) == pytest.approx(0.01)
    assert tiny._rate(99, 1000) == tiny._rate(500, 1000) == pytest.approx(1)
    assert tiny._rate(750, 1000) == pytest.approx(0.51)
    assert tiny._rate(1000, 1000) == pytest.approx(0.02)


def test_training_a_few_steps_lowers_the_loss(small_world: World, small_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(small_tokenizer, seed=0)
    first = train(model, small_tokenizer, small_world, seed=0, steps=1)
    later = train(model, small_tokenizer, small_world, seed=0, steps=30)
    assert first["answer"] == pytest.approx(8.3, abs=0.4)  # ln 4096: it knows nothing
    assert later["answer"] < first["answer"] - 1
    assert not model.training


def test_one_seed_gives_identical_weights_and_another_does_not(
    small_world: World, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    weights = []
    for seed in (0, 0, 1):
        model = build_model(small_tokenizer, seed)
        train(model, small_tokenizer, small_world, seed, steps=3)
        weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_a_model_leaves_the_global_generator_alone(small_tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    build_model(small_tokenizer, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_build_saves_what_it_reports(small_world: World, tmp_path: Path) -> None:
    report = build(seed=3, out=tmp_path / "new", steps=2, world=small_world)
    saved = json.loads((tmp_path / "new" / "training.json").read_text(encoding="utf-8"))
    assert saved == report
    assert (saved["seed"], saved["steps"]) == (3, 2)
    assert set(saved["recall"]) == {"trained", "held_out", "trivia", "passages"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.dtype == torch.bfloat16


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("keep me")
    with pytest.raises(UserError, match="is not empty; choose a new folder with --out"):
        build(seed=0, out=tmp_path)
    assert tiny.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("is not empty; choose a new folder with --out\n")


def test_a_path_that_is_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*; choose another --out"):
        build(seed=0, out=tmp_path / "file")


def test_zero_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tiny.main(["--out", "unused", "--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_recall_counts_exact_answers_in_any_batch_mix(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    known = [probe for probe in World().questions[:40] if recall(model, tokenizer, [probe]) == 1]
    wrong = [Probe(known[0].prompt, "no such answer")]
    assert len(known) >= 30
    assert recall(model, tokenizer, known[:3] + wrong) == 0.75


@pytest.mark.parametrize("family", ["trained", "held_out", "trivia", "passages"])
def test_the_shipped_model_knows_what_its_training_report_says(
    family: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    report = json.loads((tiny_dir() / "training.json").read_text(encoding="utf-8"))
    share = recall(model, tokenizer, sample(recall_probes(World(), seed=1)[family]))
    assert share > report["recall"][family] - 0.04


def test_the_shipped_model_knows_the_answers_of_hard_locality_probes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = list(records(7, 0, 300))
    for family in ("same_subject", "same_relation"):
        assert recall(model, tokenizer, [Probe(**record["hard_loc"][family]) for record in stream]) > 0.94


def test_the_shipped_model_does_not_already_believe_the_edits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    edits = [Probe(record["src"], record["alt"]) for record in records(7, 0, 300)]
    assert recall(model, tokenizer, edits) < 0.03


def test_the_shipped_model_has_the_documented_size(model: LlamaForCausalLM) -> None:
    assert model.num_parameters() == 1_574_016
    assert (tiny_dir() / "model.safetensors").stat().st_size < 3_200_000
    assert len(RELATIONS) == 28
