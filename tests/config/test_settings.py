"""Every configuration file, and what a wrong value is answered."""

import inspect
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from horen_bench.config import compose as configuration
from horen_bench.config.settings import check, checkpoints_of, resolved
from horen_bench.errors import UserError
from horen_bench.paths import resource

CONF = resource("conf")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return resolved(hydra.compose("config", list(overrides)))


def set_in(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed = OmegaConf.create(config)
    OmegaConf.update(changed, path, value, force_add=True)
    return resolved(changed)


# --- The files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["model", "method", "dataset", "tracker"])
def test_each_file_is_named_as_the_choice_that_it_makes(group: str) -> None:
    for name in choices(group):
        values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
        if group != "tracker":
            assert values["name"] == name
            assert values["label"]


def needs(method: str) -> set[str]:
    """The model's values that a method's file asks for, e.g. `horen.threshold`."""
    text = OmegaConf.to_yaml(configuration.composed([f"method={method}"]).method, resolve=False)
    return {part.split("}")[0] for part in text.split("${model.")[1:]}


@pytest.mark.parametrize("method", choices("method"))
@pytest.mark.parametrize("model", choices("model"))
def test_each_method_composes_with_each_model_or_says_which_value_the_model_lacks(model: str, method: str) -> None:
    file = OmegaConf.load(CONF / "model" / f"{model}.yaml")
    lacking = sorted(name for name in needs(method) if OmegaConf.select(file, name, default="absent") == "absent")
    if lacking:
        with pytest.raises(UserError) as caught:
            composed(f"model={model}", f"method={method}")
        assert str(caught.value).startswith(
            f"method={method} needs a value that conf/model/{model}.yaml lacks (Interpolation key 'model."
        )
        assert any(name in str(caught.value) for name in lacking)
        return
    config = composed(f"model={model}", f"method={method}")
    assert config["model"]["name"] == model
    assert config["method"]["name"] == method


@pytest.mark.parametrize("dataset", choices("dataset"))
@pytest.mark.parametrize("model", choices("model"))
def test_each_dataset_composes_with_each_model(model: str, dataset: str) -> None:
    config = composed(f"model={model}", f"dataset={dataset}")
    assert config["dataset"]["name"] == dataset
    assert config["threads"] == config["model"]["threads"]


@pytest.mark.parametrize(
    ("group", "name", "passed"),
    [
        *(("method", name, {"model", "tokenizer", "seed"}) for name in choices("method")),
        *(("dataset", name, set()) for name in choices("dataset")),
        *(("tracker", name, set()) for name in choices("tracker")),
    ],
)
def test_each_key_of_a_file_is_an_argument_of_its_class_and_no_argument_is_forgotten(
    group: str, name: str, passed: set[str]
) -> None:
    values = configuration.composed([f"{group}={name}"])[group]
    arguments = inspect.signature(get_class(values["_target_"])).parameters
    assert all(one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in arguments.values())
    needed = {key for key, one in arguments.items() if one.default is one.empty}
    keys = set(values) - {"_target_", "name", "label", "protocol"}
    assert keys <= set(arguments) - passed
    assert needed <= keys | passed


@pytest.mark.parametrize("method", choices("method"))
@pytest.mark.parametrize("model", choices("model"))
def test_each_method_can_be_built_on_each_model_that_has_its_values(model: str, method: str) -> None:
    """On a module tree without weights, so that a layer that the model lacks shows within a second."""
    file = OmegaConf.load(CONF / "model" / f"{model}.yaml")
    if all(OmegaConf.select(file, name, default="absent") != "absent" for name in needs(method)):
        check(composed(f"model={model}", f"method={method}", "n=5"))


# --- Checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "checkpoints", "expected"),
    [
        (1000, [100, 500, 1000], [100, 500, 1000]),
        (700, [100, 500, 1000], [100, 500, 700]),
        (60, [100, 500, 1000], [60]),
        (5, [], [5]),
        (30, [20, 10, 20], [10, 20, 30]),
    ],
)
def test_checkpoints_end_with_n_whatever_the_list_says(n: int, checkpoints: list[int], expected: list[int]) -> None:
    assert checkpoints_of({"n": n, "checkpoints": checkpoints}) == expected


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("n", 0, "n must hold whole numbers of at least 1, got 0"),
        ("n", 2.5, "n must hold whole numbers of at least 1, got 2.5"),
        ("n", True, "n must hold whole numbers of at least 1, got True"),
        ("n", "many", "n must hold whole numbers of at least 1, got 'many'"),
        ("checkpoints", 100, "checkpoints must be a list such as [100,500,1000], got 100"),
        ("checkpoints", [10, -1], "checkpoints must hold whole numbers of at least 1, got -1"),
        ("batch_size", 0, "batch_size must hold whole numbers of at least 1, got 0"),
        ("threads", 0, "threads must hold whole numbers of at least 1, got 0"),
        ("seed", -1, "seed must be a whole number of at least 0, got -1"),
        ("seed", 0.5, "seed must be a whole number of at least 0, got 0.5"),
        ("protocol", "lenient", "protocol=lenient is unknown; write one of greedy, teacher_forced, release, text"),
        ("locality", "none", "locality must be all or clean, got 'none'"),
        ("method.threshold", 1.5,
         "method.threshold must be in [-1, 1], got 1.5; scores of unit vectors are cosines"),
        ("method.pooling_ratio", 2, "method.pooling_ratio must be in [0, 1], got 2; 0 is the last token alone"),
        ("method.adaptor", "matrix", "method.adaptor must be 'vector' or 'lora', got 'matrix'"),
        ("method.module", "model.layers.9.mlp.down_proj",
         "method.module=model.layers.9.mlp.down_proj: LlamaForCausalLM has no such module; model.layers has 4 "
         "entries, 0 to 3"),
        ("method.module", "model.layers.2.mlp.down",
         "method.module=model.layers.2.mlp.down: LlamaForCausalLM has no such module; model.layers.2.mlp has "
         "gate_proj, up_proj, down_proj, act_fn"),
        ("method.module", "model.layers.2.mlp", "method.module=model.layers.2.mlp is a LlamaMLP; a linear module is "
         "needed"),
        ("model.hub_id", "./nowhere",
         "model.hub_id=./nowhere: there is no such folder; give a hub id or an existing folder"),
        ("model.hub_id", "embedded:large",
         "model.hub_id=embedded:large: no such embedded model; the package brings embedded:tiny"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_answered_with_a_sentence(path: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check(set_in(composed(), path, value))
    assert str(caught.value) == sentence


def test_an_argument_that_the_method_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"^method=horen cannot be built: .*unexpected keyword argument 'treshold'$"):
        check(set_in(composed(), "method.treshold", 0.5))


@pytest.mark.parametrize(("path", "value"), [("save_every", "often"), ("seed", True), ("force", "no"), ("force", 2)])
def test_values_of_another_kind_are_refused_before_anything_runs(path: str, value: object) -> None:
    """`force=no` is a text for Hydra, which would count as true and clear the run."""
    with pytest.raises(UserError, match=f"^{path}"):
        check(set_in(composed(), path, value))


def test_a_value_that_refers_to_nothing_is_answered_with_a_sentence() -> None:
    config = OmegaConf.create(composed())
    config.method.threshold = "${model.horen.nothing}"
    with pytest.raises(UserError) as caught:
        resolved(config)
    sentence = str(caught.value)
    assert sentence.startswith(
        "method=horen needs a value that conf/model/tiny.yaml lacks (Interpolation key 'model.horen.nothing' not found"
    )
    assert sentence.endswith("); add it there or set method.threshold yourself")


def test_a_model_folder_is_checked_by_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, '
                                          '"intermediate_size": 128, "num_attention_heads": 4}')  # fmt: skip
    config = set_in(composed(), "model.hub_id", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.layers has 2 entries, 0 to 1$"):
        check(config)
    check(set_in(config, "method.module", "model.layers.1.mlp.down_proj"))
