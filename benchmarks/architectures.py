"""What each method does on each architecture of transformers, on small models of random weights (`architectures.yaml`).

    python benchmarks/architectures.py                      every architecture
    python benchmarks/architectures.py --only Llama GPT-2   these
    python benchmarks/architectures.py --write              into docs/models.md, between its marks

A row says what happens: `fast`: only the layers above the edited module are trained; `plain`: the whole model is run;
`refused`: no edit is made. `examine` names the laws that do not hold besides; `tests/test_architectures.py` wants none.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import common
from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.config.schema import MethodConfig
from horen_bench.editors.base import Editor
from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import stop_ids
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.evaluation.token_match import TokenMatchEvaluator, protocol_of
from horen_bench.models.architecture import skeleton
from horen_bench.prompts import PromptEncoder, Side, announced_prompt, pad

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ARCHITECTURES: dict[str, dict[str, Any]] = _SETTINGS["architectures"]
METHODS: dict[str, dict[str, Any]] = _SETTINGS["methods"]

_COLUMNS = {
    "horen": "HoReN",
    "grace": "GRACE",
    "memit": "MEMIT",
    "ft_m": "FT-M",
    "wise": "WISE",
    "decoding": "decoding",
}
_MARKS = "<!-- made by benchmarks/architectures.py --write -->\n", "<!-- end of what is made -->\n"
# How `generate()` may be asked: padding (None: one prompt at a time), and whether with a KV cache.
_WAYS: dict[str, tuple[Side | None, bool]] = {
    "plain": (None, False),
    "cached": (None, True),
    "left, uncached": ("left", False),
    "left": ("left", True),
    "right": ("right", True),
}
# Behind padding on the right an ordinary model goes on with the padding; the hook of these moves it to the left.
_MOVES_PADDING = ("horen", "grace", "wise")
# As published: with a cache, each new token goes through the weight that it calls for by itself.
_ROUTES_EACH_CALL = ("wise",)
# Their few steps leave targets likelier; closed forms and shared side weights may trade one edit for another.
_TRAINS_EACH_EDIT = ("horen", "grace", "ft_m")
_N_EDITS, _N_NEW = 4, 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened: a word for the table, and the sentence that the reader of a result gets."""

    word: str
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture of the table.

    Attributes:
        name: of the architecture.
        module: path and class of the edited module.
        head: tied or untied.
        outcomes: by method, and of `decoding`.
    """

    name: str
    module: str
    head: str
    outcomes: Mapping[str, Outcome]

    def line(self) -> str:
        """The row in Markdown."""
        words = [self.outcomes[part].word for part in _COLUMNS]
        return f"| {' | '.join([self.name, self.module, self.head, *words])} |"

    def notes(self) -> list[str]:
        """A list item for each sentence, with the methods that it is about."""
        about: dict[str, list[str]] = {}
        for part, label in _COLUMNS.items():
            about.setdefault(self.outcomes[part].sentence, []).append(label)
        return [f"- {self.name}: {', '.join(labels)}: {text}" for text, labels in about.items() if text]


def examine(name: str) -> tuple[Row, list[str]]:
    """Try every method on one architecture.

    Returns:
        The row of the table, and a sentence for each law that does not hold.
    """
    path = ARCHITECTURES[name]["module"]
    model, tokenizer = random_model(ARCHITECTURES[name]["config"])
    with TemporaryDirectory() as folder:
        trial = Trial(model, PromptEncoder(tokenizer), path, folder)
        outcomes = {"decoding": trial.guarded("decoding", trial.decoding)}
        outcomes |= {method: trial.guarded(method, partial(trial.of_method, method)) for method in METHODS}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    module = f"`{path}` ({type(model.get_submodule(path)).__name__})"
    return Row(name, module, "tied" if tied else "untied", outcomes), trial.broken


def random_model(config: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose answers depend on every token of a prompt: its matrices do not shrink what passes them.

    Raises:
        UserError: the architecture has no such argument.
    """
    skeleton(config)
    model, tokenizer = common.random_model(config, "float32", "cpu")
    embeddings = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and name.endswith("weight") and "norm" not in name and weight is not embeddings:
            weight.data.mul_(10)
    return model, tokenizer


@cache
def _settings_of(method: str) -> MethodConfig:
    return run_config([f"method={method}"]).method.changed(**METHODS[method])


@dataclass(slots=True)
class Trial:
    """One architecture on which the methods are tried in turn; each must give the model back.

    Attributes:
        model: of random weights.
        encoder: of the embedded tokenizer.
        module: path of the edited module.
        folder: of second moments.
        cases: the edits; their prompts have unequal lengths.
        broken: a sentence for each law that did not hold.
    """

    model: PreTrainedModel
    encoder: PromptEncoder
    module: str
    folder: str
    cases: list[EditCase] = field(default_factory=lambda: common.cases(_N_EDITS))
    broken: list[str] = field(default_factory=list)
    _sound: list[str] = field(default_factory=list)

    def guarded(self, part: str, action: Callable[[], Outcome]) -> Outcome:
        """The outcome; `error`, which is against the law, where anything but a refusal is raised."""
        try:
            return action()
        except UserError as refusal:
            return Outcome("refused", str(refusal).replace(self.folder, "FOLDER"))
        except Exception as error:  # an architecture may raise anything, and the others shall be tried all the same
            sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.broken.append(f"{part}: {sentence}")
            return Outcome("error", sentence)

    def decoding(self) -> Outcome:
        """How the evaluator decodes prompts of unequal length, which must give what each of them gives alone."""
        predicted, warnings = self.predictions()
        self._law(
            "decoding: a batch gives other tokens than each prompt alone", self._agree(predicted, self.says("plain"))
        )
        return Outcome("plain", "; ".join(warnings)) if warnings else Outcome("batched")

    def of_method(self, method: str) -> Outcome:
        """What a method does with the cases, and whether it leaves nothing behind."""
        before = self.logits()
        try:
            return self._edited(method, before)
        finally:
            given_back = torch.equal(self.logits(), before) and "generate" not in vars(self.model)
            self._law(f"{method}: the model is not given back bit for bit", given_back)

    def _edited(self, method: str, before: Tensor) -> Outcome:
        sound, loss = self.sound_ways(), self.target_loss()
        editor, plain = self.editor(method), None
        try:
            records = self._edit(editor)
            problems = [record.problem for record in records if record.problem]
            self._law(f"{method}: cases have failed: {problems}", not problems)
            self._law(f"{method}: edits change nothing", not torch.equal(self.logits(), before))
            nearer = self.target_loss() < loss or method not in _TRAINS_EACH_EDIT
            self._law(f"{method}: targets are no likelier than before", nearer)
            self._generates_as_it_should(method, sound)
            state, warnings = editor.state_dict(), editor.warnings()
            editor.detach()
            plain = self.editor(method, engine="sequential")
            decided = [record.action for record in self._edit(plain)]
            self._law(f"{method}: the fast path decides otherwise", decided == [record.action for record in records])
            differing = _differing(state, plain.state_dict())
            self._law(f"{method}: the fast path gives another {', '.join(differing)}", not differing)
            slow = [sentence for sentence in warnings if sentence not in plain.warnings()]
        finally:
            for used in filter(None, (editor, plain)):
                used.detach()
        return Outcome("plain", "; ".join(slow)) if slow else Outcome("fast")

    def _generates_as_it_should(self, method: str, sound: Sequence[str]) -> None:
        says = {way: self.says(way) for way in sound if way != "right" or method in _MOVES_PADDING}
        cached = says.get("cached", says["plain"]) if method in _ROUTES_EACH_CALL else says["plain"]
        for way, said in says.items():
            expected = cached if _WAYS[way][1] else says["plain"]
            self._law(f"{method}: generate() says something else ({way})", said == expected)
        agree = self._agree(self.predictions()[0], cached)
        self._law(f"{method}: the evaluator decodes something else than generate()", agree)

    def sound_ways(self) -> list[str]:
        """The ways of asking in which the unedited model says the same; an editor must not narrow them."""
        if not self._sound:
            plain = self.says("plain")
            ways = [way for way in _WAYS if way not in ("plain", "right") and self._says_or_none(way) == plain]
            self._sound = ["plain", *ways, *(["right"] if "left" in ways else [])]
        return self._sound

    def editor(self, method: str, **changes: Any) -> Editor[Any]:
        """A method on this module."""
        config = _settings_of(method)
        places = {"module": self.module, "modules": [self.module], "statistics": {"folder": self.folder}}
        own = {key: place for key, place in places.items() if key in type(config).model_fields}
        config = config.changed(**own, **changes)
        editor: Editor[Any] = config.editor_class()(self.model, self.encoder, config, seed=0)
        return editor

    def _edit(self, editor: Editor[Any]) -> list[EditRecord]:
        editor.expect(self.cases)
        records = editor.edit(self.cases)
        editor.flush()
        return records

    def prompts(self) -> list[list[int]]:
        """Token ids of the cases' prompts."""
        return self.encoder.prompts([case.prompt for case in self.cases])

    @torch.no_grad()
    def logits(self) -> Tensor:
        """On the prompts, one at a time."""
        rows = [self.model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in self.prompts()]
        return torch.cat(rows)

    @torch.no_grad()
    def target_loss(self) -> float:
        """Nats per target, summed over the tokens that follow the prompt, mean over the cases."""
        losses = []
        for edit in (self.encoder.edit(case.prompt, case.target) for case in self.cases):
            ids, start = torch.tensor([edit.ids]), len(edit.prompt)
            with announced_prompt(torch.arange(ids.shape[1])[None] < start):
                logits = self.model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            losses.append(cross_entropy(logits, ids[0, start:], reduction="sum"))
        return float(torch.stack(losses).mean())

    def says(self, way: str) -> list[list[int]]:
        """What `generate()` adds to each prompt."""
        side, use_cache = _WAYS[way]
        batches = [self.prompts()] if side else [[row] for row in self.prompts()]
        return [ids for rows in batches for ids in _generated(self.model, rows, side or "left", use_cache)]

    def _says_or_none(self, way: str) -> list[list[int]] | None:
        try:
            return self.says(way)
        except Exception:  # transformers' own `generate()` of an unedited model
            return None

    def predictions(self) -> tuple[list[list[int]], list[str]]:
        """What the evaluator decodes behind each prompt, and its warnings."""
        protocol = protocol_of("greedy", "generate")
        evaluator = TokenMatchEvaluator(model=self.model, encoder=self.encoder, protocol=protocol)
        probes = [CaseProbe(i, "rel", "answer", case.prompt, case.target) for i, case in enumerate(self.cases)]
        ids = [list(prediction.ids) for prediction in evaluator.predict(probes)]
        return ids, evaluator.warnings()

    def _agree(self, predicted: Sequence[list[int]], said: Sequence[list[int]]) -> bool:
        """Whether predictions, which stop at an end token or the answer's length, are what `generate()` says."""
        ends = stop_ids(self.model, self.encoder)
        ours = [_until(ids, ends)[:_N_NEW] for ids in predicted]
        return ours == [_until(ids, ends)[: len(own)] for ids, own in zip(said, ours, strict=True)]

    def _law(self, sentence: str, holds: bool) -> None:
        if not holds:
            self.broken.append(sentence)


def _differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Entries of two states that differ by more than the rounding of a few steps."""
    return [key for key in sorted({*a, *b}) if key not in a or key not in b or not _close(a[key], b[key])]


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=1e-3 * scale)


def _generated(model: PreTrainedModel, rows: Sequence[Sequence[int]], side: Side, use_cache: bool) -> list[list[int]]:
    batch = pad(rows, 0, side)
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - its type is not declared
    how = {"attention_mask": batch.attention_mask, "do_sample": False, "use_cache": use_cache}
    output = generate(batch.input_ids, **how, max_new_tokens=_N_NEW, eos_token_id=None)
    new: list[list[int]] = output[:, batch.input_ids.shape[1] :].tolist()
    return new


def _until(ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


# --- The table -------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows and their sentences in Markdown."""
    titles = ["architecture", "module (class)", "head", *_COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *(row.line() for row in rows)]
    return "\n".join([*lines, "", *(note for row in rows for note in row.notes())])


def made_part(page: str) -> str:
    """What stands between the marks of the page."""
    return page.partition(_MARKS[0])[2].partition(_MARKS[1])[0]


def write(rows: Sequence[Row]) -> None:
    """Put the table between the marks of the page."""
    begin, end = _MARKS
    made = f"{begin}\n{table(rows)}\n\n{end}"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: made, page, flags=re.DOTALL), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows with the laws that do not hold, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    shown.add_argument("--write", action="store_true", help="into docs/models.md")
    options = parser.parse_args(argv)
    rows = []
    for name in options.only:
        row, broken = examine(name)
        rows.append(row)
        sys.stdout.write("\n".join([row.line(), *row.notes(), *(f"  BROKEN {law}" for law in broken)]) + "\n")
        sys.stdout.flush()
    if options.write:
        write(rows)


if __name__ == "__main__":
    main()
