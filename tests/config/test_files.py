"""Every configuration file: it composes, it is typed, its module paths exist."""

from functools import cache
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from horen_bench.config.compose import composed, run_config, validated
from horen_bench.config.schema import Section, fields_of, imported
from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.stream import check_method

CONF = resource("conf")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["model", "method", "dataset"])
def test_each_file_is_named_as_the_choice_that_it_makes(group: str) -> None:
    for name in choices(group):
        values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
        assert values["name"] == name
        assert values["label"]


@cache
def needs(method: str) -> set[str]:
    """The model's values that a method's file asks for, e.g. `horen.threshold`."""
    text = OmegaConf.to_yaml(composed([f"method={method}"]).method, resolve=False)
    return {part.split("}")[0] for part in text.split("${model.")[1:]}


def lacking(model: str, method: str) -> list[str]:
    """Those of them that a model's file does not have."""
    file = OmegaConf.load(CONF / "model" / f"{model}.yaml")
    return sorted(name for name in needs(method) if OmegaConf.select(file, name, default="absent") == "absent")


@pytest.mark.parametrize("method", choices("method"))
@pytest.mark.parametrize("model", choices("model"))
def test_each_method_can_be_built_on_each_model_or_says_which_value_the_model_lacks(model: str, method: str) -> None:
    """On a module tree without weights, so that a layer that the model lacks shows within a second."""
    missing = lacking(model, method)
    if missing:
        with pytest.raises(UserError) as caught:
            run_config([f"model={model}", f"method={method}"])
        assert str(caught.value).startswith(
            f"method={method} needs a value that conf/model/{model}.yaml lacks (Interpolation key 'model."
        )
        assert any(name in str(caught.value) for name in missing)
        return
    config = run_config([f"model={model}", f"method={method}"])
    assert (config.model.name, config.method.name) == (model, method)
    check_method(config)


@pytest.mark.parametrize(
    ("model", "method", "setting", "published"),
    [
        ("gpt2_xl", "rome", "hidden", {"n_steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 4}),
        ("gpt2_xl", "memit", "hidden", {"n_steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75}),
        ("gpt2_xl", "alphaedit", "hidden", {"n_steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75}),
        ("gptj_6b", "memit", "hidden", {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75}),
        ("gptj_6b", "alphaedit", "hidden", {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75}),
        ("mistral_7b", "memit", "hidden", {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 4}),
        ("mistral_7b", "rome", "hidden", {"n_steps": 25, "learning_rate": 0.5, "weight_decay": 1e-3, "clamp": 4}),
        ("gptj_6b", "wise", "act_margin", [15.0, 40.0, 20.0]),
        ("mistral_7b", "ft_l", "norm_constraint", 5e-5),
        ("gpt2_xl", "ft_m", "norm_constraint", 5e-4),
        ("gptj_6b", "ft_l", "norm_constraint", None),
    ],
)
def test_a_method_has_the_values_that_were_published_for_the_model(
    model: str, method: str, setting: str, published: Any
) -> None:
    """Read off the hparams of ROME, MEMIT, AlphaEdit and EasyEdit, which the model's file names."""
    value = run_config([f"model={model}", f"method={method}"]).method.model_dump()[setting]
    assert (value | published if isinstance(published, dict) else published) == value


@pytest.mark.parametrize("dataset", choices("dataset"))
def test_each_dataset_composes_with_a_model_that_decides_the_threads(dataset: str) -> None:
    config = run_config([f"dataset={dataset}"])
    assert config.dataset.name == dataset
    assert config.threads == config.model.threads


@pytest.mark.parametrize("method", choices("method"))
def test_each_overlay_of_the_release_is_about_settings_that_its_method_has(method: str) -> None:
    ours, release = run_config([f"method={method}"]), run_config([f"method={method}", "compat=release"])
    has_overlay = (CONF / "compat" / "overlay" / "release" / f"{method}.yaml").exists()
    assert (ours.method != release.method) == has_overlay
    assert run_config([f"method={method}", "compat=release", "seed=1"]).method == release.method


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("method", "dataset", "tracker") for name in choices(group)]
)
def test_each_setting_stands_in_its_file_and_is_described_on_its_field(group: str, name: str) -> None:
    """A file shows all that can be set; what is left out has a default that is nobody's business but the class's."""
    values: Any = OmegaConf.to_container(composed([f"{group}={name}"])[group])
    kind: type[Section] = imported(values["_target_"])
    assert set(kind.model_fields) - set(values) <= {"style", "rank", "ms_per_edit"}
    undocumented = {setting for setting, field in fields_of(kind) if not field.description}
    assert undocumented <= {"name", "label", "protocol"}  # described where they are declared


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["n=1000", "checkpoints=[100,500,1000]"], [100, 500, 1000]),
        (["n=700", "checkpoints=[100,500,1000]"], [100, 500, 700]),
        (["n=60", "checkpoints=[100,500,1000]"], [60]),
        (["n=5", "checkpoints=[]"], [5]),
        (["n=30", "checkpoints=[20,10,20]"], [10, 20, 30]),
    ],
)
def test_checkpoints_end_with_n_whatever_the_list_says(overrides: list[str], expected: list[int]) -> None:
    assert run_config(overrides).checkpoints_to_n == expected


def test_one_protocol_is_a_list_of_one_and_none_is_evaluated_twice() -> None:
    assert run_config(["protocol=release"]).protocol == ["release"]
    assert run_config(["protocol=[greedy,release,greedy]"]).protocol == ["greedy", "release"]
    assert run_config(["dataset=passages"]).protocol == ["text"]


def test_a_value_that_refers_to_nothing_is_answered_with_a_sentence() -> None:
    config = composed()
    config.method.threshold = "${model.horen.nothing}"
    with pytest.raises(UserError) as caught:
        validated(config)
    sentence = str(caught.value)
    assert sentence.startswith(
        "method=horen needs a value that conf/model/tiny.yaml lacks (Interpolation key 'model.horen.nothing' not found"
    )
    assert sentence.endswith("); add it there or set method.threshold yourself")


@pytest.mark.parametrize("overrides", [[], ["method=repair", "dataset=zsre"], ["method=memit", "tracker=wandb"]])
def test_a_configuration_written_down_makes_the_same_run_again(overrides: list[str]) -> None:
    config = run_config(overrides)
    assert validated(OmegaConf.create(config.plain())) == config


def test_settings_are_frozen_and_known_by_name() -> None:
    config = run_config([])
    assert config["n"] == config.n == 1000
    assert config.method["threshold"] == config.method.model_dump()["threshold"]
    with pytest.raises(ValueError, match="frozen"):
        config.n = 5  # type: ignore[misc]
