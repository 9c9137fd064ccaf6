"""How a model is evaluated, on models whose every next token is set by hand and on the reference model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Mode
from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.probes import CaseProbe, probes_of, sample
from horen_bench.evaluation.token_match import TokenMatchEvaluator, TokenMatchProtocol, protocol_of
from horen_bench.prompts import PromptEncoder, prompt_mask

VOCABULARY, EOS = 600, 0
MODES: tuple[Mode, ...] = ("generate", "teacher_forced")
GREEDY = TokenMatchProtocol("greedy", "generate")
RELEASE = protocol_of("release", "generate")
FORCED = TokenMatchProtocol("teacher_forced", "teacher_forced")


def bigram(likely: Mapping[int, Mapping[int, float]]) -> PreTrainedModel:
    """A Llama whose next-token logits depend on the current token alone: `likely[token][next]`, else 0.

    Every weight is zero but the embedding (the identity) and the output matrix, so a token without an
    entry is followed by id 0, which is EOS.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=VOCABULARY,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    for weight in model.parameters():
        weight.zero_()
    model.get_parameter("model.embed_tokens.weight").copy_(torch.eye(VOCABULARY))
    model.get_parameter("model.norm.weight").fill_(1)
    for token, successors in likely.items():
        for successor, logit in successors.items():
            model.get_parameter("lm_head.weight")[successor, token] = logit
    return model


def saying(tokenizer: PreTrainedTokenizerBase, replies: Mapping[str, list[int]]) -> PreTrainedModel:
    """A bigram model that continues each prompt with the given ids, and then with EOS."""
    likely: dict[int, dict[int, float]] = {}
    for prompt, ids in replies.items():
        chain = [tokenizer(prompt)["input_ids"][-1], *ids]
        for current, following in zip(chain, [*chain[1:], EOS], strict=True):
            assert likely.setdefault(current, {following: 1.0}) == {following: 1.0}, "replies contradict each other"
    return bigram(likely)


def cache_name(protocol: TokenMatchProtocol) -> str:
    model, encoder = cast(PreTrainedModel, None), cast(PromptEncoder, None)
    return TokenMatchEvaluator(model=model, encoder=encoder, protocol=protocol).cache_name


def evaluator_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: TokenMatchProtocol, batch_size: int = 64
) -> TokenMatchEvaluator:
    encoder = PromptEncoder(tokenizer)
    return TokenMatchEvaluator(model=model, encoder=encoder, protocol=protocol, batch_size=batch_size)


def probe_of(prompt: str, answer: str, family: str = "rel") -> CaseProbe:
    return CaseProbe(0, family, "base" if family == "loc" else "answer", prompt, answer)


def predicted_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: TokenMatchProtocol, probe: CaseProbe
) -> tuple[Prediction, float]:
    evaluator = evaluator_of(model, tokenizer, protocol)
    prediction = evaluator.predict([probe])[0]
    return prediction, evaluator.score(probe, prediction, prediction)


# --- What is evaluated -------------------------------------------------------------------------------------

CASES = [
    EditCase(
        "a",
        "P1",
        "T1",
        paraphrases=(Probe("Q1", "T1"), Probe(" ", "T1"), Probe("Q2", "T1")),
        locality=(Probe("L1", "x"), Probe("L2", "")),
        hard_locality={"same_subject": (Probe("H1", "y"),)},
        extras={"mhop": (Probe("M1", "z"), Probe("", "z"))},
    ),
    EditCase("b", "P2", "T2", extras={"personas": (Probe("X2", "w"),)}),
]


def test_every_probe_counts_in_its_family_and_empty_ones_are_left_out() -> None:
    assert [(p.case, p.family, p.reference, p.prompt, p.answer) for p in probes_of(CASES)] == [
        (0, "rel", "answer", "P1", "T1"),
        (0, "gen", "answer", "Q1", "T1"),
        (0, "gen", "answer", "Q2", "T1"),
        (0, "loc", "base", "L1", "x"),
        (0, "same_subject", "base", "H1", "y"),
        (0, "mhop", "answer", "M1", "z"),
        (1, "rel", "answer", "P2", "T2"),
        (1, "personas", "answer", "X2", "w"),
    ]


def test_a_probe_is_known_by_its_texts_alone() -> None:
    key = CaseProbe(0, "rel", "answer", "ab", "c").key
    assert CaseProbe(7, "loc", "base", "ab", "c").key == key
    assert CaseProbe(0, "rel", "answer", "a", "bc").key != key


@pytest.mark.parametrize(
    ("name", "release_mode", "expected"),
    [
        ("greedy", "teacher_forced", ("generate", "positionwise", "generated", False)),
        ("greedy", "generate", ("generate", "positionwise", "generated", False)),
        ("teacher_forced", "generate", ("teacher_forced", "positionwise", "generated", False)),
        ("release", "generate", ("generate", "all_or_nothing", "tail", True)),
        ("release", "teacher_forced", ("teacher_forced", "positionwise", "generated", False)),
    ],
)
def test_only_the_release_protocol_looks_at_the_method(
    name: str, release_mode: Mode, expected: tuple[str, str, str, bool]
) -> None:
    protocol = protocol_of(name, release_mode)
    rules = (protocol.mode, protocol.lengths, protocol.locality_window, protocol.checkpoint_settings)
    assert rules == expected
    assert protocol.name == name


def test_base_predictions_of_the_releases_two_modes_are_kept_apart() -> None:
    names = {cache_name(protocol_of(name, mode)) for name in ("greedy", "release") for mode in MODES}
    assert names == {"greedy-generate", "release-generate", "release-teacher_forced"}


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        protocol_of("generate", "generate")
    assert str(caught.value) == "protocol=generate compares no tokens; write one of greedy, teacher_forced, release"


# --- Greedy decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_decoding_equals_generate_one_prompt_at_a_time(golden_model: PreTrainedModel, batch_size: int) -> None:
    """Neither padding nor company nor the cache changes a token; EOS does not stop."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        [1, *torch.randint(2, 600, (int(n),), generator=generator).tolist()]
        for n in torch.randint(1, 40, (20,), generator=generator)
    ]
    n_tokens = [1 + i % 7 for i in range(20)]
    golden_model.generation_config.eos_token_id = None
    expected = [
        cast(Any, golden_model).generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, len(ids) :].tolist()
        for ids, n in zip(prompts, n_tokens, strict=True)
    ]
    with torch.no_grad():
        rows = [
            row
            for start in range(0, 20, batch_size)
            for row in greedy_decode(
                golden_model, prompts[start : start + batch_size], n_tokens[start : start + batch_size], pad_id=EOS
            )
        ]
    assert rows == expected
    assert len({tuple(row) for row in rows}) > 10


def test_decoding_goes_on_past_eos_for_as_many_tokens_as_it_is_given() -> None:
    model = bigram({5: {EOS: 1.0}, EOS: {7: 1.0}, 7: {8: 1.0}, 8: {EOS: 1.0}})
    assert greedy_decode(model, [[1, 5], [1, 9, 9, 7]], [4, 2], pad_id=EOS) == [[EOS, 7, 8, EOS], [8, EOS]]


def test_predictions_come_in_the_order_of_the_probes_whatever_the_batches(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    probes = [
        probe_of("Who founded Brightwater" + " by the river" * (i % 4) + "?" * (i % 3), "Lucan Vey") for i in range(11)
    ]
    probes += [probe_of("The bridge", "of the fair in Grenholm", "loc"), probe_of("The", "1927")]
    for protocol in (GREEDY, RELEASE, FORCED):
        alone = [evaluator_of(golden_model, golden_tokenizer, protocol).predict([probe])[0] for probe in probes]
        for batch_size in (1, 4, 64):
            counts: list[int] = []
            evaluator = evaluator_of(golden_model, golden_tokenizer, protocol, batch_size)
            assert evaluator.predict(probes, counts.append) == alone
            assert sum(counts) == len(probes)
    assert evaluator_of(golden_model, golden_tokenizer, GREEDY).predict([]) == []


# --- Scoring a generated answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answer", "greedy", "release"),
    [
        # " the fair" is 2 tokens, "the fair" is 3 (t, he, fair): given 2, scored over 3.
        ([260, 338], "the fair", 1.0, 1.0),
        # " Norrish" is 6 tokens, "Norrish" is 5 (N, or, ri, s, h).
        ([222, 47, 282, 274, 84, 73], "Norrish", 1.0, 1.0),
        # EOS early: " the" -> t, he of t, he, fair.
        ([260], "the fair", 2 / 3, 0.0),
        # EOS at once.
        ([], "the fair", 0.0, 0.0),
        # Too long: cut to the 6 tokens it is given, then to the 5 scored.
        ([222, 47, 282, 274, 84, 66], "Norrish", 0.8, 0.8),
        # "Norrishe", without a space: tokenised again as N, or, ri, she, so one position is missing.
        ([47, 282, 274, 84, 73, 70], "Norrish", 0.6, 0.0),
        # Two wrong words that happen to re-tokenise into as many tokens.
        ([503, 404], "the fair", 0.0, 0.0),
        # An answer with a space of its own in front: the release, which strips decoded text alone, never matches it.
        ([222, 260, 338], " the fair", 1.0, 0.0),
    ],
)
def test_decoded_text_is_stripped_and_tokenised_again_before_it_is_scored(
    golden_tokenizer: PreTrainedTokenizerBase, reply: list[int], answer: str, greedy: float, release: float
) -> None:
    probe = probe_of("Which one?", answer)
    model = saying(golden_tokenizer, {probe.prompt: reply})
    assert predicted_alone(model, golden_tokenizer, GREEDY, probe)[1] == pytest.approx(greedy)
    assert predicted_alone(model, golden_tokenizer, RELEASE, probe)[1] == pytest.approx(release)


def test_a_sentence_piece_answer_gets_as_many_tokens_as_it_has_behind_its_prompt() -> None:
    """ " Paris" alone is two tokens, a lone boundary and the word; behind "is?" the word is one."""
    pieces = ["<unk>", "▁", "▁is", "▁Paris", "?", "▁,"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    probe, model = probe_of("is?", "Paris"), bigram({4: {3: 1.0}, 3: {4: 1.0}})
    prediction, score = predicted_alone(model, tokenizer, GREEDY, probe)
    assert (prediction.ids, score) == ((3,), 1.0)
    # An answer with a space before its comma is compared as it was said.
    _, score = predicted_alone(bigram({4: {3: 1.0}, 3: {5: 1.0}}), tokenizer, GREEDY, probe_of("is?", "Paris ,"))
    assert score == 1.0


def test_a_prediction_is_shown_as_text(golden_tokenizer: PreTrainedTokenizerBase) -> None:
    probe = probe_of("Which one?", "the fair")
    evaluator = evaluator_of(saying(golden_tokenizer, {probe.prompt: [260, 338]}), golden_tokenizer, GREEDY)
    assert evaluator.text(evaluator.predict([probe])[0]) == "the fair"


def test_only_the_release_protocol_decodes_under_the_checkpoints_settings(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The prompt holds " Vey" (404); the model would repeat it, unless it is penalised for that."""
    prompt = "Lucan Vey?"
    last = golden_tokenizer(prompt)["input_ids"][-1]
    model = bigram({last: {404: 1.0, 338: 0.9}, 404: {260: 1.0}, 338: {260: 1.0}})
    settings: Any = model.generation_config
    settings.repetition_penalty = 1.5
    settings.eos_token_id = [EOS, 260]
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 0.6, 0.9, 20
    probe = probe_of(prompt, "of the fair", "loc")  # 3 tokens behind a prompt, 4 alone
    greedy = evaluator_of(model, golden_tokenizer, GREEDY).predict([probe])[0]
    release = evaluator_of(model, golden_tokenizer, RELEASE).predict([probe])[0]
    assert greedy.ids == (404,)  # no penalty; the second of its EOS ids ends a text here too
    assert release.ids[-2:] == (338, 260)  # stopped by the second of its EOS ids


# --- What locality compares --------------------------------------------------------------------------------


def test_release_locality_looks_at_the_end_of_prompt_and_output_so_that_prompt_tokens_leak_in(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Two models that agree on nothing: 0, but 2/3 in the release's window of |"the fair"| = 3."""
    probe = probe_of("nq question: where is the museum of clocks", "the fair", "loc")
    prompt = golden_tokenizer(probe.prompt)["input_ids"]
    base = saying(golden_tokenizer, {probe.prompt: []})  # EOS at once
    edited = saying(golden_tokenizer, {probe.prompt: [338]})

    silent = predicted_alone(base, golden_tokenizer, RELEASE, probe)[0]
    assert silent.ids == (*prompt[-2:], EOS)
    evaluator = evaluator_of(edited, golden_tokenizer, RELEASE)
    spoken = evaluator.predict([probe])[0]
    assert spoken.ids == (prompt[-1], 338, EOS)
    assert evaluator.score(probe, spoken, silent) == pytest.approx(1 / 3)

    silent = predicted_alone(base, golden_tokenizer, GREEDY, probe)[0]
    assert silent.ids == ()
    evaluator = evaluator_of(edited, golden_tokenizer, GREEDY)
    spoken = evaluator.predict([probe])[0]
    assert spoken.ids == (338,)
    assert evaluator.score(probe, spoken, silent) == 0.0
    assert evaluator.score(probe, silent, silent) == 1.0  # both stop at once


def test_locality_compares_with_the_base_prediction_and_never_with_the_given_one(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    probe = probe_of("Which one?", "the fair", "loc")
    prediction, score = predicted_alone(
        saying(golden_tokenizer, {"Which one?": [503, 404]}), golden_tokenizer, GREEDY, probe
    )
    assert prediction.ids == (503, 404)
    assert score == 1.0


# --- Teacher forcing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "likely", "predicted", "score"),
    [
        ("the fair", {32: 260, 260: 338}, (260, 338), 1.0),
        ("the fair", {32: 503, 260: 338}, (503, 338), 0.5),  # right after a wrong token, as the answer is given
        ("the fair", {32: 260, 260: EOS}, (260, EOS), 0.5),
        ("Norrish", {32: 222, 222: 47, 47: 282, 282: 274, 274: 84, 84: 66}, (222, 47, 282, 274, 84, 66), 5 / 6),
    ],
)
def test_teacher_forcing_reads_the_argmax_in_front_of_each_token_of_the_answer(
    golden_tokenizer: PreTrainedTokenizerBase,
    answer: str,
    likely: dict[int, int],
    predicted: tuple[int, ...],
    score: float,
) -> None:
    """Id 32 is "?", the last token of the prompt; a longer neighbour pads the row on the left."""
    model = bigram({token: {following: 1.0} for token, following in likely.items()})
    probe = probe_of("Which one?", answer)
    evaluator = evaluator_of(model, golden_tokenizer, FORCED)
    for company in ([], [probe_of("nq question: who built the old tower of Grenholm", "the guild of masons")]):
        prediction = evaluator.predict([probe, *company])[0]
        assert prediction == Prediction(predicted, predicted)
        assert evaluator.score(probe, prediction, prediction) == pytest.approx(score)


def test_the_prompt_is_announced_without_padding_and_without_the_answer(
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        seen.append((ids, prompt_mask((ids.shape[0], ids.shape[1]), mask, ids.device)))

    model = bigram({})
    model.register_forward_pre_hook(look, with_kwargs=True)
    probes = [probe_of("Who?", "the fair"), probe_of("nq question: who built the old tower", "Norrish")]
    evaluator_of(model, golden_tokenizer, FORCED).predict(probes)
    ids, mask = seen[-1]
    for row, probe in enumerate(probes):
        assert ids[row][mask[row]].tolist() == golden_tokenizer(probe.prompt)["input_ids"]


def test_evaluating_leaves_no_gradient_and_no_random_draw_behind(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden_model.requires_grad_(True)
    state = torch.get_rng_state()
    for protocol in (GREEDY, RELEASE, FORCED):
        evaluator_of(golden_model, golden_tokenizer, protocol).predict(
            [probe_of("Who founded Brightwater?", "Lucan Vey")]
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in golden_model.parameters())


def test_a_sample_is_fixed_of_its_size_and_grows_out_of_the_smaller_checkpoints() -> None:
    assert sample(5, None, seed=1) == [0, 1, 2, 3, 4]
    assert sample(5, 5, seed=1) == [0, 1, 2, 3, 4]
    first, later = sample(100, 20, seed=1), sample(1000, 20, seed=1)
    assert len(set(first)) == len(set(later)) == 20
    assert first == sorted(first)
    assert max(first) < 100 <= max(later)
    # A case of the first checkpoint leaves the sample only for one of lower rank, so those that stay are ranked lowest.
    assert set(later) & set(range(100)) <= set(first)
    assert sample(100, 20, seed=1) == first
    assert sample(100, 20, seed=2) != first


class _Small(TokenMatchEvaluator):
    """An evaluator whose memory does for so many prompts."""

    room = 3

    def predict_batch(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        if len(probes) > self.room:
            raise torch.OutOfMemoryError("no more memory")
        return super().predict_batch(probes)


def _evaluators(
    kinds: Sequence[type[TokenMatchEvaluator]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[TokenMatchEvaluator]:
    return [kind(model=model, encoder=PromptEncoder(tokenizer), batch_size=16, protocol=GREEDY) for kind in kinds]


def test_a_batch_that_does_not_fit_is_halved_and_every_probe_is_predicted_once(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    probes = [probe_of(f"Who founded {name}?", "Ostrander Motors") for name in "ABCDEFGHIJK"]
    plain, small = _evaluators([TokenMatchEvaluator, _Small], golden_model, golden_tokenizer)
    sizes: list[int] = []
    assert small.predict(probes, sizes.append) == plain.predict(probes)
    assert sum(sizes) == len(probes)
    assert max(sizes) == 2, "11, 5, 2"
    assert "2 at a time" in small.warnings()[0]
    assert plain.warnings() == []
    small.predict(probes[:5], sizes.append)
    assert sizes[-3:] == [2, 2, 1], "what does not fit is not tried again"


def test_one_prompt_that_does_not_fit_is_an_error(
    golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small,) = _evaluators([_Small], golden_model, golden_tokenizer)
    monkeypatch.setattr(_Small, "room", 0)
    with pytest.raises(torch.OutOfMemoryError):
        small.predict([probe_of("Who founded A?", "Ostrander Motors")] * 4)
