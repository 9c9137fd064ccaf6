"""ROME, MEMIT and AlphaEdit: what they refuse, what they keep, and that both engines write the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.editors.locate_edit.editor import LocateEditEditor
from horen_bench.errors import UserError

LAYERS = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
# Constants under which the reference model learns something: its second moments are small.
METHODS: dict[str, dict[str, Any]] = {
    "rome": {"module": LAYERS[0], "ridge": 1e-6},
    "memit": {"modules": LAYERS, "moment_weight": 1.0, "ridge": 1e-6},
    "alphaedit": {"modules": LAYERS, "nullspace_threshold": 0.0551, "l2": 1.0},
}
WINDOWS = ["memit", "alphaedit"]
PUBLISHED: dict[str, dict[str, Any]] = {
    "rome": {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 4, "kl": 0.0625},
    "memit": {"n_steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 3, "kl": 0.0625},
    "alphaedit": {"n_steps": 25, "learning_rate": 0.1, "weight_decay": 0.5, "clamp": 0.75, "kl": 0.0625},
}
CASES = [
    EditCase("a", "Who founded Brightwater?", "Lucan Vey", "Brightwater"),
    EditCase("b", "The language spoken by the fishermen of Halvard Bay is", "Norrish", "Halvard Bay"),
    EditCase("c", "Edda Quillfeather was born where?", "Grenholm by the Sea", "Edda Quillfeather"),
]
WRONG = [
    EditCase("none", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("absent", "Who founded Brightwater?", "Lucan Vey", "Oldmere"),
    EditCase("twice", "Is Oldmere near Oldmere?", "yes", "Oldmere"),
    EditCase("empty", "Who founded Brightwater?", "", "Brightwater"),
]

Make = Callable[..., Any]

every_method = pytest.mark.parametrize("method", METHODS)
every_window = pytest.mark.parametrize("method", WINDOWS)


@pytest.fixture
def make(golden_model: Any, golden_tokenizer: Any, baselines_folder: Path, tmp_path_factory: Any) -> Make:
    folder = str(tmp_path_factory.getbasetemp() / "statistics")
    corpus = str(baselines_folder / "rome" / "stats_texts.json")

    def made(method: str, model: Any = golden_model, **changes: Any) -> Any:
        config = run_config([f"method={method}"]).method
        settings = config.model_dump()
        statistics = {**settings["statistics"], "corpus": corpus, "folder": folder}
        values = {**settings, "hidden": PUBLISHED[method], "statistics": statistics, **METHODS[method], **changes}
        return config.editor_class()(model, golden_tokenizer, type(config)(**values), seed=42)

    return made


def weights(editor: LocateEditEditor[Any]) -> dict[str, torch.Tensor]:
    return {path: weight.detach().clone() for path, weight in editor.pristine.weights.items()}


@every_method
def test_constants_that_a_model_does_not_set_are_the_published_ones(method: str) -> None:
    config = run_config([f"method={method}", "model=llama3_8b"]).method
    assert config.model_dump()["hidden"] == PUBLISHED[method]


@every_method
def test_engines_write_the_same(method: str, make: Make, other_golden_model: Any) -> None:
    fast, plain = make(method, engine="cached"), make(method, other_golden_model, engine="sequential")
    assert [record.steps for record in fast.edit(CASES)] == [record.steps for record in plain.edit(CASES)]
    for path, weight in weights(plain).items():
        change = weight - plain.pristine.originals()[path]
        fast_change = weights(fast)[path] - fast.pristine.originals()[path]
        torch.testing.assert_close(fast_change, change, rtol=0, atol=5e-3 * float(change.abs().max()))


@every_method
def test_refused_cases_are_named_and_the_stream_goes_on(method: str, make: Make, other_golden_model: Any) -> None:
    editor, clean = make(method), make(method, other_golden_model)
    records = editor.edit([CASES[0], *WRONG, CASES[1]])
    assert [record.action for record in records] == ["inserted", *["failed"] * 4, "inserted"]
    sentences = ["has no subject", "does not occur in the prompt", "occurs 2 times", "target has no token"]
    assert all(sentence in str(record.problem) for sentence, record in zip(sentences, records[1:5], strict=True))
    clean.edit(CASES[:2])
    assert all(torch.equal(weights(editor)[path], weight) for path, weight in weights(clean).items())


@every_method
def test_an_update_that_is_not_finite_leaves_the_model_as_it_was(
    method: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(method)
    editor.edit(CASES[:1])
    before, state = weights(editor), editor.state_dict()
    last = list(editor.pristine.weights)[-1]
    add = editor._add

    def spoilt(path: str, update: torch.Tensor) -> None:
        add(path, update * (torch.nan if path == last else 1))

    with monkeypatch.context() as patch:
        patch.setattr(editor, "_add", spoilt)
        (record,) = editor.edit(CASES[1:2])
    assert (record.action, record.problem) == ("failed", "the update is not finite")
    assert all(torch.equal(weights(editor)[path], weight) for path, weight in before.items())
    changed = [key for key, value in editor.state_dict().items() if not torch.equal(value, state[key])]
    assert changed == ["n_edits"]
    assert editor.edit(CASES[1:2])[0].action == "inserted"


@every_method
def test_a_subject_is_needed_and_known_to_be_before_the_start(method: str) -> None:
    assert run_config([f"method={method}"]).method.needs_subject


@every_method
def test_bfloat16_weights_are_rounded_once_per_edit(method: str, make: Make, golden_model: Any) -> None:
    editor = make(method, golden_model.to(torch.bfloat16))
    records = editor.edit(CASES[:2])
    assert [record.action for record in records] == ["inserted"] * 2
    editor.detach()
    assert all(torch.equal(weights(editor)[path], original) for path, original in editor.pristine.originals().items())


@every_method
def test_written_value_makes_the_target_likelier(method: str, make: Make) -> None:
    editor = make(method)
    ids = torch.tensor([editor.encoder.tokenizer("Who founded Brightwater? Lucan Vey")["input_ids"]])
    n_prompt = len(editor.encoder.tokenizer("Who founded Brightwater?")["input_ids"])

    def loss() -> float:
        logits = editor.model(ids).logits[0, n_prompt - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, n_prompt:]))

    before = loss()
    editor.edit(CASES[:1])
    assert loss() < before - 0.02


@pytest.mark.parametrize(
    ("method", "wrong", "sentence"),
    [
        ("rome", "key_mode=both", "method.key_mode must be"),
        ("rome", "engine=fast", "method.engine must be"),
        ("rome", "arithmetic=float64", "method.arithmetic must be 'float32' or 'model'"),
        ("rome", "contexts=[[You.]]", "method.contexts must begin with the empty text"),
        ("rome", "context_lengths=[[5]]", "method.context_lengths must be a list of at least 2"),
        ("rome", "hidden.n_steps=0", "method.hidden.n_steps must be"),
        ("rome", "hidden.learning_rate=0", "method.hidden.learning_rate must be"),
        ("rome", "hidden.clamp=-1", "method.hidden.clamp must be"),
        ("rome", "statistics.dtype=float16", "method.statistics.dtype must be 'float32' or 'float64'"),
        ("memit", "batch_size=0", "method.batch_size must be"),
        ("memit", "moment_weight=0.0", "method.moment_weight must be above 0"),
        ("memit", "modules=[]", "method.modules must be a list of at least 1"),
        ("alphaedit", "l2=0.0", "method.l2 must be above 0"),
    ],
)
def test_wrong_settings_are_named(method: str, wrong: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run_config([f"method={method}", f"method.{wrong}"])


@pytest.mark.parametrize(
    ("method", "wrong", "sentence"),
    [
        ("memit", {"modules": LAYERS[::-1]}, "the lowest layer first"),
        ("memit", {"modules": ["lm_head"]}, "method.modules=lm_head is in no numbered layer"),
        ("alphaedit", {"nullspace_threshold": 1e-12}, "no eigenvalue of the second moment is below"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_named(
    method: str, wrong: dict[str, Any], sentence: str, make: Make
) -> None:
    with pytest.raises(UserError, match=sentence):
        make(method, **wrong).edit(CASES)


def test_the_release_rounds_to_the_models_dtype() -> None:
    assert run_config(["method=rome", "compat=release"]).method["arithmetic"] == "model"


# --- A window of layers ------------------------------------------------------------------------------------


@every_window
def test_a_turn_of_several_is_one_joint_write(method: str, make: Make, other_golden_model: Any) -> None:
    joint, apart = make(method, batch_size=3), make(method, other_golden_model)
    assert joint.slice_size == 3
    assert joint.edit([*CASES[:2], WRONG[0]])[2].action == "failed"
    apart.edit(CASES[:2])
    assert any(not torch.allclose(weights(joint)[path], weight) for path, weight in weights(apart).items())
    assert "turns of 3" in joint.warnings()[0]


@every_window
def test_a_subject_twice_in_one_turn_gives_a_warning_and_none_in_two_turns(method: str, make: Make) -> None:
    again = EditCase("again", "Who owns Brightwater?", "Norrish", "Brightwater")
    joint = make(method, batch_size=2)
    joint.edit([CASES[0], CASES[1], CASES[0], again])
    sentence = "edits whose subject an earlier edit of the same turn has: 1; where their keys are alike"
    assert any(sentence in warning for warning in joint.warnings())
    state = joint.state_dict()
    joint.detach()
    resumed = make(method, batch_size=2)
    resumed.load_state_dict(state)
    assert resumed.warnings() == joint.warnings()
    apart = make(method)
    apart.edit([CASES[0], again])
    assert not any("subject" in warning for warning in apart.warnings())


# --- What is a method's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "prompt"])
def test_rome_with_one_key_its_value_becomes_the_target_exactly(
    make: Make, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`W_new k = v*`, the paper's Eq. 2."""
    editor = make("rome", key_mode=mode)
    seen: list[Any] = []
    write = editor._write

    def noting(*args: Any) -> None:
        seen.append(args)
        write(*args)

    monkeypatch.setattr(editor, "_write", noting)
    editor.edit(CASES[:1])
    _, perturbed, vectors = seen[0]
    key = (perturbed.keys if mode == "mean" else perturbed.prompt_keys)[LAYERS[0]][0]
    value = editor.pristine.weights[LAYERS[0]] @ key
    torch.testing.assert_close(value, vectors.target[0], rtol=1e-4, atol=1e-4)


def test_rome_direction_solves_with_the_second_moment(make: Make) -> None:
    editor = make("rome")
    editor.edit(CASES[:1])
    key = torch.randn(176)
    expected = torch.linalg.inv(editor._factor @ editor._factor.T) @ key.double()
    torch.testing.assert_close(editor.direction(key).double(), expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_rome_can_round_where_the_release_does(make: Make, golden_model: Any) -> None:
    """In bfloat16: the inverse, the key, u, v and their product are rounded one after the other."""
    editor = make("rome", golden_model.to(torch.bfloat16), arithmetic="model")
    editor.edit(CASES[:1])
    key = torch.randn(176)
    rounded = editor._inverse.bfloat16() @ key.bfloat16()
    assert torch.equal(editor.direction(key), rounded / rounded.norm())
    exact = make("rome", golden_model)
    assert exact.direction(key).dtype == torch.float32


def test_alphaedit_protected_keys_have_the_values_they_had(make: Make) -> None:
    """`dW U = 0` for the directions of general text."""
    editor = make("alphaedit")
    editor.edit(CASES)
    for path, weight in weights(editor).items():
        change = weight - editor.pristine.originals()[path]
        protected = editor.memory[path].space.protected
        assert float((change @ protected).abs().max()) < 1e-5 * max(1.0, float(change.abs().max()))
        assert len(editor.memory[path].keys) == 3


def test_alphaedit_says_how_much_of_each_layer_is_free(make: Make) -> None:
    editor = make("alphaedit")
    editor.edit(CASES[:1])
    shares = [memory.space.rank / 176 for memory in editor.memory.values()]
    assert editor.warnings() == [
        "null space, share of each layer's directions: "
        + ", ".join(f"{path} {share:.1%}" for path, share in zip(LAYERS, shares, strict=True))
    ]
    everything = make("alphaedit", nullspace_threshold=1e6)
    everything.edit(CASES[:1])
    assert everything.warnings()[1] == f"the null space of {LAYERS[0]} is nearly everything; check nullspace_threshold"
