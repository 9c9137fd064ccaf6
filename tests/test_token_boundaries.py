"""Where a prompt ends and its target begins, over the kinds of tokenizers that language models bring."""

import unicodedata
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from horen_bench.errors import UserError
from horen_bench.prompts import PromptEncoder

_TEXTS = [
    "the capital of Bramdor is Paris on the river, and the capital of Oldmere is London",
    "Who founded Brightwater? Lucan Vey founded Brightwater in 1927.",
    "The mother tongue of Zint is French; the mayor of Zint is Ann",
] * 4
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(*, prefix: bool) -> Tokenizer:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


@cache
def _pieces() -> list[str]:
    """Characters, parts of words, and words with `▁` in front, shortest first."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=["▁"], show_progress=False)
    trained.train_from_iterator(_TEXTS, trainer)
    return sorted(trained.get_vocab(), key=lambda piece: (len(piece), piece))


def _sentence_piece() -> Tokenizer:
    """BPE over pieces, bytes for the rest; what stands before and behind the model is left to the caller."""
    vocabulary = {piece: i for i, piece in enumerate([*_SPECIAL, *_BYTES, *_pieces()])}
    splits = [(piece[:i], piece[i:]) for piece in _pieces() if len(piece) > 1 for i in range(1, len(piece))]
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _spaces_back(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _llama_legacy() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _spaces_back(strip=True)
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    """Llama's and Mistral's without the legacy behaviour."""
    tokenizer = _sentence_piece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = _spaces_back(strip=scheme != "never")
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = _spaces_back(strip=False)
    return tokenizer


def _unigram() -> Tokenizer:
    """Compatible characters made one, runs of spaces too."""
    pieces = [(piece, -10.0 - 0.01 * i) for i, piece in enumerate(_pieces())]
    vocabulary = [*((piece, 0.0) for piece in _SPECIAL), *((byte, -50.0) for byte in _BYTES), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = _spaces_back(strip=True)
    return tokenizer


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: _byte_level(prefix=False),
    "byte-level, prefix space": lambda: _byte_level(prefix=True),
    "Llama, legacy": _llama_legacy,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "Gemma": _gemma,
    "unigram": _unigram,
}
_FRAMES = {"bare": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "BOS and EOS": "<s> $A </s>"}

_each_kind = pytest.mark.parametrize("kind", _KINDS)


@cache
def encoder_of(kind: str, frame: str = "BOS") -> PromptEncoder:
    tokenizer = _KINDS[kind]()
    ids = [(token, tokenizer.token_to_id(token)) for token in _SPECIAL[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single=_FRAMES[frame], special_tokens=ids)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named))


def decoded(encoder: PromptEncoder, ids: list[int] | tuple[int, ...]) -> str:
    text = encoder.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFKC", str(text)).strip()


def normal(text: str) -> str:
    """A text as any of the tokenizers can be expected to give it back."""
    return unicodedata.normalize("NFKC", text).strip()


# Words known and unknown to the tokenizers, in several scripts, and what becomes bytes or is normalised.
_WORDS = st.sampled_from(
    [
        *("the", "capital", "of", "Paris", "x", "Zint", "Lucan", "1927", "-5", "(", "?", ".", '"Ann"'),
        *("é", "e\u0301a", "ﬁn", "Ⅳ", "🦊", "👩\u200d👩\u200d👧", "القمر", "زنت", "東京", "ภาษา", "a\nb"),
    ]
)
_TEXT = st.lists(_WORDS, min_size=1, max_size=4).map(" ".join)
_ENCODERS = st.builds(encoder_of, st.sampled_from(list(_KINDS)), st.sampled_from(list(_FRAMES)))
_many = settings(max_examples=300, deadline=None, derandomize=True)


@_many
@given(encoder=_ENCODERS, prompt=_TEXT, target=_TEXT)
def test_prompt_and_target_are_the_tokens_of_the_whole_text(encoder: PromptEncoder, prompt: str, target: str) -> None:
    edit = encoder.edit(prompt, target)
    assert list(edit.prompt) == encoder.prompts([prompt])[0]
    assert list(edit.ids) == encoder.texts([f"{prompt} {target}"])[0]
    assert decoded(encoder, edit.target) == normal(target)
    assert encoder.continuations([target]) == [list(edit.target)]


@_many
@given(encoder=_ENCODERS, prompt=_TEXT, target=_TEXT)
def test_what_greedy_decoding_must_say_is_what_was_written(encoder: PromptEncoder, prompt: str, target: str) -> None:
    said = encoder.tokenizer.decode(list(encoder.edit(prompt, target).target), clean_up_tokenization_spaces=False)
    assert encoder.plain([str(said).lstrip()]) == encoder.plain([target.lstrip()])


@_many
@given(
    encoder=_ENCODERS,
    before=_TEXT,
    subject=_TEXT,
    after=st.one_of(st.just(""), _TEXT.map(lambda text: f" {text}"), _TEXT),
)
def test_the_last_token_of_a_subject_holds_its_last_character(
    encoder: PromptEncoder, before: str, subject: str, after: str
) -> None:
    start = f"{before} {subject}"
    ((ids, place),) = encoder.located([start + after], [len(start)])
    assert ids == encoder.prompts([start + after])[0]
    assert decoded(encoder, ids[: place + 1]).startswith(normal(start))
    assert not decoded(encoder, ids[:place]).startswith(normal(start))


@_each_kind
def test_no_prompt_ends_in_what_the_tokenizer_appends(kind: str) -> None:
    framed, bare = encoder_of(kind, "BOS and EOS"), encoder_of(kind, "bare")
    bos, eos = framed.tokenizer.bos_token_id, framed.tokenizer.eos_token_id
    texts = ["Who founded Brightwater?", "x </s>", ""]
    for encode in (PromptEncoder.prompts, PromptEncoder.texts):
        assert encode(framed, texts) == [[bos, *ids] for ids in encode(bare, texts)]
    assert framed.prompts(texts)[1][-1] == eos, "what the prompt itself ends in stays"


@pytest.mark.parametrize("kind", [kind for kind in _KINDS if kind != "unigram"])
@pytest.mark.parametrize("target", ["the </s> end", "</s>", "<s><unk>"])
@pytest.mark.parametrize("prompt", ["The motto is", "The <s> motto is"])
def test_a_special_token_is_plain_text_in_a_target_and_itself_in_a_prompt(kind: str, target: str, prompt: str) -> None:
    encoder = encoder_of(kind, "bare")
    edit = encoder.edit(prompt, target)
    assert not set(encoder.tokenizer.all_special_ids) & set(edit.target)
    assert decoded(encoder, edit.target) == target
    assert (encoder.tokenizer.bos_token_id in edit.prompt) == ("<s>" in prompt)
    assert encoder.unreadable(target) is None


def test_a_target_that_the_tokenizer_cannot_tell_from_a_special_token_is_named() -> None:
    problem = encoder_of("unigram").unreadable("the </s> end")
    assert problem is not None
    assert "</s>" in problem
    assert encoder_of("unigram").unreadable("the end") is None


def test_a_word_is_one_token_behind_a_prompt_that_sentence_piece_begins_with_a_boundary_alone() -> None:
    encoder = encoder_of("Llama, legacy")
    tokenizer = encoder.tokenizer
    assert tokenizer.tokenize(" Paris") == ["▁", "▁Paris"]
    target = encoder.edit("The capital is", "Paris").target
    assert tokenizer.convert_ids_to_tokens(list(target)) == ["▁Paris"]


def test_a_subject_ends_in_the_token_that_reaches_over_its_end() -> None:
    """The prefix "… Brightw" alone would have tokens of its own: "Bright" and "w", or letters."""
    encoder = encoder_of("byte-level", "bare")
    text = "Who founded Brightwater"
    ((ids, place),) = encoder.located([text], [len("Who founded Bri")])
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[place] == "ĠBrightwater"


def test_without_offsets_or_in_a_chat_no_place_is_made_up() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_gemma(), chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="template=none"):
        PromptEncoder(tokenizer, "model").located(["Who?"], [3])
