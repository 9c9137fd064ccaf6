"""What every editor promises, written once; a new editor joins by one line in `EDITORS`.

An editor is built on the reference model (hidden size 64, 4 layers), with settings under which a few edits of two
or three tokens come out greedily.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.config.schema import MethodConfig
from horen_bench.editors.base import Editor
from horen_bench.prompts import PromptEncoder, pad

Factory = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Editor[Any]]
DOWN_PROJ = "model.layers.2.mlp.down_proj"

CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey", subject="Brightwater"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel", subject="Edda Quillfeather"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm", subject="Larkspur 300"),
]
UNRELATED = ["nq question: where is the museum of clocks", "nq question: what color is the flag of Tamber"]


def configured(method: str, **changes: Any) -> Factory:
    """A method as its file in `conf/` sets it, but for the changes."""
    config = run_config([f"method={method}"]).method.changed(**changes)
    return lambda model, tokenizer: config.editor_class()(model, tokenizer, config, seed=42)


def horen(**changes: Any) -> Factory:
    firm = {"threshold": 0.6, "n_steps": 40, "early_stopping": None, "lora": {"learning_rate": 0.02}}
    return configured("horen", module=DOWN_PROJ, **firm, **changes)


_SIDE_MEMORY = yaml.safe_load(Path(__file__).with_name("side_memory.yaml").read_text())
_FIRM_SIDE = {
    **_SIDE_MEMORY["side"],
    "templates": ["{}", "I walked a {}", "Because the winter was long, {}"],
    "n_steps": 40,
}


def wise(**changes: Any) -> Factory:
    return configured("wise", module=DOWN_PROJ, **{**_FIRM_SIDE, **changes})


def repair() -> Factory:
    """Windows of one edit, so that every split of a stream is one between windows."""
    side = {**_FIRM_SIDE, "save_freq": 1, "merge_freq": 1}
    return configured("repair", module=DOWN_PROJ, **{**_SIDE_MEMORY["repair"], "side": side, "max_rounds": 1})


def ultraedit(regime: dict[str, str], modules: Sequence[str], learning_rate: float) -> Factory:
    regimes = {"this": {**regime, "dtype": "float32"}}
    return configured("ultraedit", modules=modules, learning_rate=learning_rate, regime="this", regimes=regimes)


def fine_tuning(method: str, engine: str = "cached") -> Factory:
    return configured(method, module=DOWN_PROJ, learning_rate=5e-3, n_steps=40, engine=engine)


_TEXTS = str(Path(__file__).parents[2] / "baselines" / "rome" / "stats_texts.json")


@cache
def statistics_folder() -> str:
    """One folder for all, so that the statistics are made once."""
    return mkdtemp()


def locate_edit(method: str, **changes: Any) -> Factory:
    """A method as its file in `conf/` sets it, without contexts and but for the changes."""
    firm = {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 10.0, "kl": 0.0625}
    contexts = [[""]] if method == "rome" else [[""], [""]]
    statistics = {"corpus": _TEXTS, "folder": statistics_folder()}
    return configured(method, hidden=firm, contexts=contexts, statistics=statistics, **changes)


def unke(**changes: Any) -> Factory:
    settings = {
        "module": "model.layers.1",
        "value": {"n_steps": 25, "learning_rate": 0.2, "weight_decay": 1e-3, "clamp": 4.0},
        "block": {"n_steps": 12, "learning_rate": 2e-3, "weight_decay": 0.01},
        "preservation": {"corpus": _TEXTS, "template": "{} ", "n_texts": 6, "max_tokens": None},
    }
    return configured("unke", **settings, **changes)


class NothingConfig(MethodConfig):
    """Settings of an editor that writes nothing."""


class NothingEditor(Editor[NothingConfig]):
    """The least that an editor is."""

    n_edits = 0

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        self.n_edits += len(cases)
        return [EditRecord(case.id, "inserted", None, None, math.nan, 0, 1e-9) for case in cases]

    def state_dict(self) -> dict[str, Tensor]:
        return {"n_edits": torch.tensor(self.n_edits)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"n_edits"}:
            raise ValueError("the state is not one of this editor's")
        self.n_edits = int(state["n_edits"])

    def detach(self) -> None:
        pass

    def side_parameters(self) -> int:
        return 0


def nothing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor[Any]:
    return NothingEditor(model, tokenizer, NothingConfig(name="nothing", label="Nothing"))


EDITORS: dict[str, Factory] = {
    "nothing": nothing,
    "unke": unke(),
    "unke-sequential": unke(engine="sequential"),
    "horen": horen(),
    "horen-lora": horen(adaptor="lora"),
    "horen-sequential": horen(engine="sequential"),
    "grace": configured("grace", module=DOWN_PROJ),
    "grace-sequential": configured("grace", module=DOWN_PROJ, engine="sequential"),
    "grace_norm": configured("grace_norm", module=DOWN_PROJ),
    "repair": repair(),
    "wise": wise(),
    "wise-sequential": wise(engine="sequential"),
    "ultraedit": ultraedit(
        {"rows": "sentence", "normalizer": "per_turn", "labels": "alone"},
        [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2, 3)],
        learning_rate=2e-3,
    ),
    "ultraedit-original": ultraedit(
        {"rows": "answer", "normalizer": "lifelong", "labels": "answer"},
        [f"model.layers.{layer}.mlp.up_proj" for layer in (2, 3)],
        learning_rate=0.05,
    ),
    "ft-m": fine_tuning("ft_m"),
    "ft-m-sequential": fine_tuning("ft_m", "sequential"),
    "ft-l": fine_tuning("ft_l"),
    "rome": locate_edit("rome"),
    "rome-sequential": locate_edit("rome", engine="sequential"),
    "memit": locate_edit("memit", moment_weight=0.01),
    "alphaedit": locate_edit("alphaedit", l2=0.1),
    "alphaedit-sequential": locate_edit("alphaedit", l2=0.1, engine="sequential"),
}
# Those that act on what they recognise only: whatever they do not recognise keeps its logits bit for bit.
MEMORIES = [
    "horen",
    "horen-lora",
    "horen-sequential",
    "grace",
    "grace-sequential",
    "grace_norm",
    "wise",
    "wise-sequential",
]

# Those that write at the subject can write only some of these cases into the reference model, and forget them with the
# next edit: they are asked about one. FT-L asks for all tokens of a target at once, which greedy decoding never says.
SUBJECT_WRITERS = [name for name in EDITORS if name.split("-")[0] in ("rome", "memit", "alphaedit")]
RECALLING = [name for name in EDITORS if name not in (*SUBJECT_WRITERS, "ft-l", "nothing")]

# How a model may be asked. A model with rewritten weights is an ordinary one, and generate() of an ordinary one goes on
# behind padding on the right; memories move it.
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "right": {"side": "right"}, "uncached": {"use_cache": False}}

every_editor = pytest.mark.parametrize("name", EDITORS)


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Editor[Any]]:
    return lambda name: EDITORS[name](golden_model, golden_tokenizer)


@pytest.fixture
def ask(golden_tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[str]]:
    """Greedy answers to prompts, in one batch."""

    def answers(model: PreTrainedModel, prompts: Sequence[str], side: Any = "left", **how: Any) -> list[str]:
        batch = pad(PromptEncoder(golden_tokenizer).prompts(prompts), 0, side)
        generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - its type is not declared
        how |= {"attention_mask": batch.attention_mask, "do_sample": False, "max_new_tokens": 6}
        new = generate(batch.input_ids, **how)[:, batch.input_ids.shape[1] :]
        return list(golden_tokenizer.batch_decode(new, skip_special_tokens=True))

    return answers


@pytest.fixture
def logits(golden_tokenizer: PreTrainedTokenizerBase) -> Callable[[PreTrainedModel], Tensor]:
    """Logits on all prompts of this file, one at a time."""

    def of(model: PreTrainedModel) -> Tensor:
        rows = PromptEncoder(golden_tokenizer).prompts([case.prompt for case in CASES] + UNRELATED)
        return torch.cat([model(torch.tensor([row])).logits[0] for row in rows])

    return of


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("name", "way"),
    [(n, w) for n in RECALLING + SUBJECT_WRITERS for w in WAYS if w != "right" or n in MEMORIES],
)
def test_edit_makes_target_the_greedy_answer(name: str, way: str, build: Any, ask: Any) -> None:
    editor, how = build(name), WAYS[way]
    cases = CASES[:1] if name in SUBJECT_WRITERS else CASES
    prompts = [case.prompt for case in cases]
    before = ask(editor.model, prompts, **how)
    editor.edit(cases)
    for case, old, new in zip(cases, before, ask(editor.model, prompts, **how), strict=True):
        assert not old.startswith(f" {case.target}")
        assert new.startswith(f" {case.target}")


@every_editor
def test_one_record_tells_of_each_case_in_order(name: str, build: Any) -> None:
    records = build(name).edit(CASES)
    assert [record.case_id for record in records] == ["first", "second", "third"]
    assert "failed" not in [record.action for record in records]
    assert all(record.problem is None and record.seconds > 0 for record in records)


@every_editor
def test_no_cases_are_no_edit(name: str, build: Any, logits: Any) -> None:
    editor = build(name)
    before = logits(editor.model)
    assert editor.edit([]) == []
    assert torch.equal(logits(editor.model), before)


@pytest.mark.parametrize("name", RECALLING)
def test_second_edit_keeps_the_first(name: str, build: Any, ask: Any) -> None:
    editor = build(name)
    editor.edit(CASES[:1])
    editor.edit(CASES[1:2])
    (said,) = ask(editor.model, [CASES[0].prompt])
    assert said.startswith(f" {CASES[0].target}")


@pytest.mark.parametrize("name", MEMORIES)
def test_unrelated_prompt_keeps_its_logits(name: str, build: Any, golden_tokenizer: Any) -> None:
    editor = build(name)
    batch = pad(PromptEncoder(golden_tokenizer).prompts(UNRELATED), 0)
    before = editor.model(batch.input_ids, batch.attention_mask).logits
    editor.edit(CASES)
    assert torch.equal(editor.model(batch.input_ids, batch.attention_mask).logits, before)


@every_editor
def test_edits_in_two_calls_equal_edits_in_one(name: str, build: Any, logits: Any) -> None:
    straight = build(name)
    straight.edit(CASES)
    expected, shown = straight.state_dict(), logits(straight.model)
    straight.detach()
    split = build(name)
    split.edit(CASES[:1])
    split.edit(CASES[1:])
    found = split.state_dict()
    assert found.keys() == expected.keys()
    # Side by side, edits differ from edits apart by the order of additions, which forty steps carry on.
    for key, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-3 * scale, msg=key)
    torch.testing.assert_close(logits(split.model), shown, rtol=0, atol=1e-2)


@every_editor
def test_saved_state_gives_same_logits_and_same_future_after_load(
    name: str, build: Any, logits: Any, tmp_path: Path
) -> None:
    straight = build(name)
    straight.edit(CASES[:2])
    shown = logits(straight.model)
    save_file(straight.state_dict(), tmp_path / "state.safetensors")
    straight.edit(CASES[2:])
    expected = straight.state_dict()
    straight.detach()
    resumed = build(name)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(logits(resumed.model), shown)
    resumed.edit(CASES[2:])
    assert_equal(resumed.state_dict(), expected)


@every_editor
def test_detach_restores_logits_and_weights_exactly(name: str, build: Any, ask: Any, logits: Any) -> None:
    editor = build(name)
    editor.detach()
    model = editor.model
    before, weights = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    said, tree = ask(model, UNRELATED), [(path, id(module)) for path, module in model.named_modules()]
    editor = build(name)
    editor.edit(CASES)
    assert torch.equal(logits(model), before) == (name == "nothing")
    editor.detach()
    editor.detach()
    assert torch.equal(logits(model), before)
    assert ask(model, UNRELATED) == said
    assert_equal(dict(model.state_dict()), weights)
    assert [(path, id(module)) for path, module in model.named_modules()] == tree


@every_editor
def test_same_seed_gives_identical_numbers(
    name: str, build: Any, other_golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase
) -> None:
    first, other = build(name), EDITORS[name](other_golden_model, golden_tokenizer)
    first.edit(CASES[:2])
    torch.rand(7)  # somebody else's draw from the global generator
    other.edit(CASES[:2])
    assert_equal(other.state_dict(), first.state_dict())


@every_editor
def test_two_editors_on_two_models_do_not_see_each_other(
    name: str,
    build: Any,
    logits: Any,
    other_golden_model: PreTrainedModel,
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    first, other = build(name), EDITORS[name](other_golden_model, golden_tokenizer)
    untouched = logits(other.model)
    first.edit(CASES[:1])
    shown = logits(first.model)
    assert torch.equal(logits(other.model), untouched)
    other.edit(CASES[1:2])
    assert torch.equal(logits(first.model), shown)
    first.detach()
    assert torch.equal(logits(other.model), untouched) == (name == "nothing")


@pytest.mark.parametrize("name", [name for name in EDITORS if name != "nothing"])
def test_what_is_stored_beside_the_model_is_counted(name: str, build: Any) -> None:
    editor = build(name)
    empty = editor.side_parameters()
    editor.edit(CASES[:2])
    assert editor.side_parameters() > empty >= 0


@every_editor
def test_a_state_of_something_else_is_refused(name: str, build: Any) -> None:
    with pytest.raises(ValueError):
        build(name).load_state_dict({"something.else": torch.zeros(3)})
