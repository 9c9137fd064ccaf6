"""The embedded model: a 1.6-million-parameter Llama that knows the made-up world by heart.

    python -m horen_bench.world.training --seed 0 --out DIR

trains one from nothing. Everything that is drawn comes from the seed; floating-point sums differ
between processors, so another machine gets an equally good model, not the same bits.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from horen_bench.cases import Probe
from horen_bench.errors import UserError
from horen_bench.models.pretrained import pretrained
from horen_bench.paths import resource
from horen_bench.world import Subject, World, pick
from horen_bench.world.passages import QUESTIONS, known_facts, passage

STEPS = 5960  # 40 times every fact and passage, 80 times every unrelated question
BATCH_SIZE = 64
PEAK_RATE = 3e-3
WARM_UP = 100
FINAL_RATE = 0.02  # of the peak
PROMPT_WEIGHT = 0.1  # loss weight of a prompt token; an answer token counts 1
TRIVIA_REPEATS = 2  # an unrelated question has nothing in common with others, so it is learnt more slowly
GATHERED = 0.8  # share of the passages that are told from the last token of their question alone, where edits write

VOCABULARY = 4096
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_ANSWER_COPIES = 100  # makes the merges that keep the words of answers whole
_LONGEST_SHORT_ANSWER, _LONGEST_ANSWER = 8, 64  # tokens with EOS
_STRANGERS = range(200_000, 204_000)  # subjects whose names teach the tokenizer how unknown names look


def tiny_dir() -> Path:
    """Folder of the shipped model: weights, tokenizer and model card."""
    return resource("data") / "tiny"


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's own text; every text begins with BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_text(world), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The untrained model, 1,574,016 parameters with a vocabulary of 4096."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, world: World, seed: int, steps: int = STEPS
) -> dict[str, float]:
    """Teaches the world to the model, in place.

    Returns:
        Mean loss per token over the last 100 steps, in nats: of `answer` tokens (with EOS) and of
        `prompt` tokens.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    batches = _batches(world, tokenizer, random.Random(f"training {seed}"))
    losses: list[tuple[float, float]] = []
    model.train()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=steps)
        for step, batch in zip(range(steps), batches, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = PEAK_RATE * _rate(step, steps)
            losses.append(_step(model, optimiser, batch))
            progress.update(bar, advance=1, description=f"training, answer loss {losses[-1][0]:.3f}")
    model.train(False)
    answer, prompt = torch.tensor(losses[-100:]).mean(dim=0).tolist()
    return {"answer": answer, "prompt": prompt}


def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Probe]) -> float:
    """Share of questions whose greedy answer is exactly the expected one, in [0, 1]."""
    right = 0
    for begin in range(0, len(questions), 256):
        chunk = questions[begin : begin + 256]
        batch = tokenizer([q.prompt for q in chunk], return_tensors="pt", padding=True, padding_side="left")
        batch = batch.to(model.device)
        ids = model.generate(**batch, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
        said = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == q.answer for text, q in zip(said, chunk, strict=True))
    return right / len(questions)


def recall_probes(world: World, seed: int = 0) -> dict[str, list[Probe]]:
    """What a model of this world should know: each fact in a trained and a held-out wording, trivia, and passages."""
    rng = random.Random(f"exam {seed}")
    subjects = world.trained()
    facts = [fact for subject in subjects for fact in subject.facts]
    return {
        "trained": [fact.ask(pick(rng, fact.relation.trained)) for fact in facts],
        "held_out": [fact.ask(pick(rng, fact.relation.held_out)) for fact in facts],
        "trivia": list(world.questions),
        "passages": [_told(world, subject, rng) for subject in subjects],
    }


def build(seed: int, out: Path, steps: int = STEPS, world: World | None = None) -> dict[str, Any]:
    """Trains a model and saves it as bfloat16 with its tokenizer and `training.json`.

    Returns:
        The content of `training.json`; its recall is that of the saved weights, read back as float32.

    Raises:
        UserError: `out` cannot be written or holds files already.
    """
    _claim(out)
    world = world or World()
    begun = time.process_time()
    tokenizer = build_tokenizer(world)
    model = build_model(tokenizer, seed)
    losses = train(model, tokenizer, world, seed, steps)
    cpu_seconds = time.process_time() - begun
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved: LlamaForCausalLM = pretrained(LlamaForCausalLM, out, dtype=torch.float32)
    report = {
        "seed": seed,
        "steps": steps,
        "parameters": model.num_parameters(),
        "final_loss": losses,
        "recall": {name: recall(saved, tokenizer, questions) for name, questions in recall_probes(world).items()},
        "cpu_seconds": round(cpu_seconds),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horen_bench.world.training",
        description="Train the embedded model from nothing and save it (about 18 minutes on one CPU core).",
    )
    parser.add_argument("--seed", type=int, default=0, help="what the training is drawn from (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be new or empty")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS}; fewer for a trial)"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    # Such small matrices are multiplied faster by one thread than by several.
    torch.set_num_threads(1)
    try:
        report = build(arguments.seed, arguments.out, arguments.steps)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    shares = ", ".join(f"{name} {share:.3f}" for name, share in report["recall"].items())
    Console().print(f"Saved in {arguments.out}. Recall: {shares}.")
    return 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Texts as tokens, padded on the right.

    Attributes:
        ids: token ids, (B, T).
        weights: loss weight of each token as a target, (B, T); 0 for BOS and padding.
        seen: which tokens each token sees, (B, 1, T, T): all up to itself; the answer of a gathered text sees of the
            prompt the last token alone.
    """

    ids: Tensor
    weights: Tensor
    seen: Tensor


def _tokenizer_text(world: World) -> Iterator[str]:
    rng = random.Random("tokenizer")
    for subject in world.trained():
        for fact in subject.facts:
            for _ in range(4):
                probe = fact.ask(pick(rng, fact.relation.trained))
                yield f"{probe.prompt} {probe.answer}"
    for probe in world.questions:
        yield f"{probe.prompt} {probe.answer}"
    for subject in world.trained():
        probe = _told(world, subject, rng)
        yield f"{probe.prompt} {probe.answer}"
    for index in _STRANGERS:
        yield f" {world.subject(index).name}"
    for pool in world.pools.values():
        for answer in pool:
            yield from [f" {answer}"] * _ANSWER_COPIES


def _told(world: World, subject: Subject, rng: random.Random) -> Probe:
    question = pick(rng, QUESTIONS).replace("{s}", subject.name)
    return Probe(question, passage(subject, known_facts(world, subject)))


def _epochs(world: World, rng: random.Random) -> Iterator[list[Probe]]:
    """Yields all that is to be learnt in random order, each time in other wordings."""
    subjects = world.trained()
    facts = [fact for subject in subjects for fact in subject.facts]
    while True:
        items = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts]
        items += world.questions * TRIVIA_REPEATS
        items += [_told(world, subject, rng) for subject in subjects]
        yield sorted(items, key=lambda _: rng.random())


def _batches(world: World, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[_Batch]:
    """Yields batches without end; within a stretch of 16 batches, texts of one length come together."""
    stretch, pad = 16 * BATCH_SIZE, int(tokenizer.pad_token_id)
    for items in _epochs(world, rng):
        texts = _encoded(items, tokenizer)
        for begin in range(0, len(texts), stretch):
            near = sorted(texts[begin : begin + stretch], key=lambda text: len(text[0]))
            groups = [near[i : i + BATCH_SIZE] for i in range(0, len(near), BATCH_SIZE)]
            for group in sorted(groups, key=lambda _: rng.random()):
                yield _padded(group, [_is_long(*text) and rng.random() < GATHERED for text in group], pad)


def _encoded(items: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """Token ids of BOS + prompt + " " + answer + EOS, and where the answer begins."""
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    answers = tokenizer([f" {item.answer}" for item in items], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(prompt + answer + end, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _is_long(ids: Sequence[int], answer: int) -> bool:
    return len(ids) - answer > _LONGEST_SHORT_ANSWER


def _padded(texts: Sequence[tuple[list[int], int]], gathered: Sequence[bool], pad: int) -> _Batch:
    width = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), width), pad)
    weights = torch.zeros(len(texts), width)
    seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(texts), 1, 1, 1)
    for row, (tokens, answer) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, 1:answer] = PROMPT_WEIGHT
        weights[row, answer : len(tokens)] = 1
        if gathered[row]:
            seen[row, 0, answer:, : answer - 1] = False
    return _Batch(ids, weights, seen)


def _rate(step: int, steps: int) -> float:
    """Learning rate as a share of the peak: warm-up, flat, then linear decay in the second half."""
    decay = max(0.0, 2 * step / steps - 1)
    return min(1.0, (step + 1) / WARM_UP) * (1 - (1 - FINAL_RATE) * decay)


def _step(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, batch: _Batch) -> tuple[float, float]:
    """One optimiser step; returns the mean loss of answer and of prompt tokens."""
    logits = model(input_ids=batch.ids[:, :-1], attention_mask=batch.seen[..., :-1, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    answer = losses[weights == 1].mean().item()
    prompt = losses[(weights > 0) & (weights < 1)].mean().item()
    return answer, prompt


def _claim(out: Path) -> None:
    """Makes sure, before minutes of work, that there is an empty folder to write to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    if occupied:
        raise UserError(f"{out} is not empty; choose a new folder with --out")


if __name__ == "__main__":
    sys.exit(main())
