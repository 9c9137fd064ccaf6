"""What every editor promises, written once; a new editor joins by one line in `EDITORS`.

An editor is built on the reference model (hidden size 64, 4 layers), with settings under which a few edits of two
or three tokens come out greedily.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.config.compose import build as build_configured
from horen_bench.config.compose import composed
from horen_bench.config.settings import resolved
from horen_bench.editors.base import Editor
from horen_bench.editors.ft.editor import FineTuningEditor
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.editors.ultraedit.editor import UltraEditEditor
from horen_bench.editors.wise import WiseEditor
from horen_bench.editors.wise.repair import RepairEditor
from horen_bench.prompts import encode_prompts, pad

Factory = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Editor]
DOWN_PROJ = "model.layers.2.mlp.down_proj"

CASES = [
    EditCase("first", "Who founded Brightwater?", "Lucan Vey", subject="Brightwater"),
    EditCase("second", "What city was Edda Quillfeather born in?", "Port Maribel", subject="Edda Quillfeather"),
    EditCase("third", "Which company made the Larkspur 300?", "Grenholm", subject="Larkspur 300"),
]
UNRELATED = ["nq question: where is the museum of clocks", "nq question: what color is the flag of Tamber"]


def horen(adaptor: str, engine: str) -> Factory:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
        settings: dict[str, Any] = {
            "seed": 42,
            "module": DOWN_PROJ,
            "threshold": 0.6,
            "pooling_ratio": 0.6,
            "normalize": True,
            "hopfield": {"beta": 20.0, "alpha": 0.1, "steps": 1, "eps": 1e-5},
            "adaptor": adaptor,
            "vector": {"learning_rate": 1.0},
            "lora": {"learning_rate": 0.02, "rank": 4, "scale": 1.0},
            "n_steps": 40,
            "early_stopping": None,
            "label_rule": "tokens",
            "engine": engine,
            "train_batch": None,
        }
        return HorenEditor(model, tokenizer, **settings)

    return build


def configured(method: str, **changes: Any) -> Factory:
    """A method as its file in `conf/` sets it, but for the changes."""
    settings = {**resolved(composed([f"method={method}"]))["method"], "module": DOWN_PROJ, **changes}
    return lambda model, tokenizer: build_configured(settings, "method", model=model, tokenizer=tokenizer, seed=42)


SIDE: dict[str, Any] = {
    "retrieve": True,
    "templates": ["{}", "I walked a {}", "Because the winter was long, {}"],
    "learning_rate": 0.3,
    "weight_decay": 1e-5,
    "n_steps": 40,
    "early_stopping": {"loss": 0.02, "change": 1e-4},
    "act_margin": [1.0, 6.0, 4.0],
    "act_ratio": 0.8,
    "mask_ratio": 0.8,
    "norm_constraint": 1.0,
    "save_freq": 2,
    "merge_freq": 4,
    "density": 0.53,
    "loc_source": "disjoint",
    "irrelevant_prompts": None,
    "add_bias": True,
    "shards_at_once": 1,
    "engine": "cached",
}


def wise(**changes: Any) -> Factory:
    return lambda model, tokenizer: WiseEditor(model, tokenizer, seed=42, module=DOWN_PROJ, **{**SIDE, **changes})


def repair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
    """Windows of one edit, so that every split of a stream is one between windows."""
    settings: dict[str, Any] = {
        "mode": "paper",
        "side": {**SIDE, "save_freq": 1, "merge_freq": 1},
        "act_weight": 1.0,
        "distill": "logit",
        "distill_lambda": 0.2,
        "temperature": 2.0,
        "distill_spread": 0.1,
        "consistency": None,
        "error_threshold": 0.85,
        "prune_threshold": 0.5,
        "prune_noise": 0.0,
        "pool_limit": None,
        "max_rounds": 1,
        "max_retries": 3,
        "max_trainings": 100,
        "loss_sensitivity": 1.0,
    }
    return RepairEditor(model, tokenizer, seed=42, module=DOWN_PROJ, **settings)


def ultraedit(regime: dict[str, str], modules: Sequence[str], learning_rate: float) -> Factory:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
        settings: dict[str, Any] = {
            "seed": 42,
            "modules": modules,
            "learning_rate": learning_rate,
            "regime": "this",
            "regimes": {"this": {**regime, "dtype": "float32"}},
            "edits_per_turn": 1,
            "micro_batch": 1,
            "master_weights": False,
        }
        return UltraEditEditor(model, tokenizer, **settings)

    return build


def fine_tuning(objective: str, engine: str = "cached") -> Factory:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
        settings: dict[str, Any] = {
            "seed": 42,
            "module": DOWN_PROJ,
            "objective": objective,
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "n_steps": 40,
            "loss_bound": 0.01,
            "norm_constraint": None,
            "master_weights": True,
            "engine": engine,
        }
        return FineTuningEditor(model, tokenizer, **settings)

    return build


_FIRM = {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 10, "kl": 0.0625}


@cache
def statistics_folder() -> str:
    """One folder for all, so that the statistics are made once."""
    return mkdtemp()


def rewriting(method: str, **changes: Any) -> Factory:
    """A method as its file in `conf/` sets it, without contexts and but for the changes."""
    bare = {"hidden": _FIRM, "contexts": [[""]] if method == "rome" else [[""], [""]]}

    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
        settings = {**resolved(composed([f"method={method}"]))["method"], **bare, **changes}
        corpus = str(Path(__file__).parents[2] / "baselines" / "rome" / "stats_texts.json")
        settings["statistics"] = {**settings["statistics"], "corpus": corpus, "folder": statistics_folder()}
        editor: Editor = build_configured(settings, "method", model=model, tokenizer=tokenizer, seed=42)
        return editor

    return build


def unke(**changes: Any) -> Factory:
    texts = str(Path(__file__).parents[2] / "baselines" / "rome" / "stats_texts.json")
    preservation = {"corpus": texts, "template": "{} ", "n_texts": 6, "max_tokens": None}
    value = {"n_steps": 25, "learning_rate": 0.2, "weight_decay": 1e-3, "clamp": 4.0}
    block = {"n_steps": 12, "learning_rate": 2e-3, "weight_decay": 0.01}
    settings = {"module": "model.layers.1", "value": value, "block": block, "preservation": preservation, **changes}
    return configured("unke", **settings)


EDITORS: dict[str, Factory] = {
    "unke": unke(),
    "unke-sequential": unke(engine="sequential"),
    "horen": horen("vector", "parallel"),
    "horen-lora": horen("lora", "parallel"),
    "horen-sequential": horen("vector", "sequential"),
    "grace": configured("grace"),
    "grace-sequential": configured("grace", engine="sequential"),
    "grace_norm": configured("grace_norm"),
    "repair": repair,
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
    "ft-m": fine_tuning("target_new"),
    "ft-m-sequential": fine_tuning("target_new", "sequential"),
    "ft-l": fine_tuning("prompt_last"),
    "rome": rewriting("rome"),
    "rome-sequential": rewriting("rome", engine="sequential"),
    "memit": rewriting("memit", moment_weight=0.01),
    "alphaedit": rewriting("alphaedit", l2=0.1),
    "alphaedit-sequential": rewriting("alphaedit", l2=0.1, engine="sequential"),
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
RECALLING = [name for name in EDITORS if name not in (*SUBJECT_WRITERS, "ft-l")]

# How a model may be asked. A model with rewritten weights is an ordinary one, and generate() of an ordinary one goes on
# behind padding on the right; memories move it.
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "right": {"side": "right"}, "uncached": {"use_cache": False}}

every_editor = pytest.mark.parametrize("name", EDITORS)


@pytest.fixture
def build(golden_model: PreTrainedModel, golden_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Editor]:
    return lambda name: EDITORS[name](golden_model, golden_tokenizer)


@pytest.fixture
def ask(golden_tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[str]]:
    """Greedy answers to prompts, in one batch."""

    def answers(model: PreTrainedModel, prompts: Sequence[str], side: Any = "left", **how: Any) -> list[str]:
        batch = pad(encode_prompts(golden_tokenizer, prompts), 0, side)
        generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - its type is not declared
        how |= {"attention_mask": batch.attention_mask, "do_sample": False, "max_new_tokens": 6}
        new = generate(batch.input_ids, **how)[:, batch.input_ids.shape[1] :]
        return list(golden_tokenizer.batch_decode(new, skip_special_tokens=True))

    return answers


@pytest.fixture
def logits(golden_tokenizer: PreTrainedTokenizerBase) -> Callable[[PreTrainedModel], Tensor]:
    """Logits on all prompts of this file, one at a time."""

    def of(model: PreTrainedModel) -> Tensor:
        rows = encode_prompts(golden_tokenizer, [case.prompt for case in CASES] + UNRELATED)
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
    batch = pad(encode_prompts(golden_tokenizer, UNRELATED), 0)
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
    assert not torch.equal(logits(model), before)
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
    one, other = build(name), EDITORS[name](other_golden_model, golden_tokenizer)
    one.edit(CASES[:2])
    torch.rand(7)  # somebody else's draw from the global generator
    other.edit(CASES[:2])
    assert_equal(other.state_dict(), one.state_dict())


@every_editor
def test_two_editors_on_two_models_do_not_see_each_other(
    name: str,
    build: Any,
    logits: Any,
    other_golden_model: PreTrainedModel,
    golden_tokenizer: PreTrainedTokenizerBase,
) -> None:
    one, other = build(name), EDITORS[name](other_golden_model, golden_tokenizer)
    untouched = logits(other.model)
    one.edit(CASES[:1])
    shown = logits(one.model)
    assert torch.equal(logits(other.model), untouched)
    other.edit(CASES[1:2])
    assert torch.equal(logits(one.model), shown)
    one.detach()
    assert not torch.equal(logits(other.model), untouched)


@every_editor
def test_what_is_stored_beside_the_model_is_counted(name: str, build: Any) -> None:
    editor = build(name)
    empty = editor.side_parameters()
    editor.edit(CASES[:2])
    assert editor.side_parameters() > empty >= 0


@every_editor
def test_a_state_of_something_else_is_refused(name: str, build: Any) -> None:
    with pytest.raises(ValueError):
        build(name).load_state_dict({"something.else": torch.zeros(3)})
