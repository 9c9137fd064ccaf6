"""What a run may be told: types, ranges, choices and rules, each stated once, on its field.

Hydra composes YAML into plain values; here they become frozen typed objects. Every method, dataset and tracker has a
`Component` of its own beside its class, which its YAML file names in `_target_`; so a package of somebody else's adds
one by a YAML file and a class. Nothing here imports torch: a wrong value is refused before anything heavy is loaded.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from horen_bench.cases import EditCase

TokenProtocol = Literal["greedy", "teacher_forced", "release"]
Protocol = Literal["greedy", "teacher_forced", "release", "text"]
Mode = Literal["generate", "teacher_forced"]
Conflicts = Literal["keep", "drop_earlier", "drop_later"]

Count = Annotated[int, Field(ge=1)]
NonNegativeCount = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
ModulePath = Annotated[str, Field(pattern=r"^[^\s.]+(\.[^\s.]+)*$")]


def _iso_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"must be a date such as 2026-01-01, got {value!r}") from None


IsoDate = Annotated[str, AfterValidator(_iso_date)]


class Section(BaseModel):
    """Settings that belong together; unknown ones, wrong types, NaN and infinities are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __getitem__(self, name: str) -> Any:
        """A setting by its name, for columns and labels that are chosen at run time."""
        return getattr(self, name)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, checked; of a section within, a mapping of those that change.

        Raises:
            pydantic.ValidationError: a value is refused.
        """
        return type(self).model_validate(_merged(self.model_dump(), changes))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: (values[key], change) for key, change in changes.items() if key in values}
    nested = {
        key: _merged(old, new) for key, (old, new) in both.items() if isinstance(old, dict) and isinstance(new, dict)
    }
    return {**values, **changes, **nested}


class Component(Section):
    """A part of a run that a YAML file names by `_target_`: a method, a dataset, a tracker."""

    name: Text
    """What the command line, rows and folders call it."""
    label: Text
    """How it is printed in tables and figures."""

    # Settings that cannot change a number, and so are no part of a run's identity.
    presentation: ClassVar[frozenset[str]] = frozenset({"label"})

    def lasting(self) -> dict[str, Any]:
        """The settings that can change a number, as plain values."""
        return self.model_dump(mode="json", exclude=set(self.presentation))


class LineStyle(Section):
    """How a method's curve looks in every figure."""

    colour: Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]
    """`#RRGGBB`."""
    line: Literal["-", "--", ":", "-.", "long"] = "-"
    """Solid, dashed, dotted, dash-dot, or long dashes."""
    marker: Annotated[str, Field(min_length=1, max_length=1)] = "o"
    """As Matplotlib has them."""
    size: Positive = 4.0
    """Of the marker, points."""


class MethodConfig(Component):
    """Settings of an editing method.

    Attributes:
        editor: where the editor's class is, `package.module:Class`; it is imported when an editor is built.
        release_mode: how the published evaluation scores this method (`protocol=release`).
        needs_subject: whether a case without a subject cannot be written.
    """

    editor: ClassVar[str]
    release_mode: ClassVar[Mode] = "teacher_forced"
    needs_subject: ClassVar[bool] = False
    presentation: ClassVar[frozenset[str]] = frozenset({"label", "style", "rank", "ms_per_edit"})

    style: LineStyle | None = None
    """Of its curve; null: a grey one."""
    rank: int = 1000
    """Its place in legends, smallest first."""
    ms_per_edit: Positive | None = None
    """Rough milliseconds per edit into the embedded model, for estimates; null: unknown."""

    def editor_class(self) -> Any:
        """The editor's class, imported."""
        return imported(self.editor)


class Dataset(Component, ABC):
    """A stream of cases: its settings, and how it is read.

    Attributes:
        files: settings that say where files lie; what they hold is compared by a hash of the cases.
    """

    files: ClassVar[frozenset[str]] = frozenset({"path"})

    protocol: Protocol = "greedy"
    """The protocol that suits its answers, where the command line names none."""

    def lasting(self) -> dict[str, Any]:
        """The settings that can change a number, as plain values."""
        return self.model_dump(mode="json", exclude={*self.presentation, *self.files, "protocol"})

    @abstractmethod
    def cases(self, n: int) -> list[EditCase]:
        """The first `n` cases; never fewer.

        Raises:
            UserError: there are not so many, or the files are missing or damaged.
        """

    def warnings(self) -> list[str]:
        """Sentences that whoever reads a result must know."""
        return []


class TrackerConfig(Section):
    """Settings of a dashboard.

    Attributes:
        tracker: where the tracker's class is, `package.module:Class`.
    """

    tracker: ClassVar[str]

    def build(self) -> Any:
        """The tracker."""
        return imported(self.tracker)(self)


class StatisticsOfModel(Section):
    """General text that second moments of a backbone are taken over."""

    corpus: Text
    """`embedded:PATH`, a .txt, .jsonl or .json file, or a hub id."""
    max_length: Count
    """Tokens kept of a text."""


class ModelConfig(Section):
    """A backbone, and the constants that methods have for it, a section each: `horen`, `rome`, ..."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    name: Text
    """What the command line, rows and folders call it."""
    label: Text
    """How it is printed in tables and figures."""
    hub_id: Text
    """A hub id, a local folder, or `embedded:NAME`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null: the newest."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the weights."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads the layers over several GPUs; null: one device."""
    threads: Count | None = None
    """CPU threads of torch; null: its own choice."""
    memory_module: ModulePath
    """Dotted path of the module at which memory editors act."""
    statistics: StatisticsOfModel | None = None
    """General text for second moments; null: methods that need them cannot run."""
    architecture: dict[str, Any] | None = None
    """`model_type` and arguments of its transformers configuration; null: not checked before the weights are loaded."""


class TextSettings(Section):
    """How long answers are written and scored (`protocol=text`)."""

    max_new_tokens: Count
    """Longest answer, in tokens."""
    minilm: Text | None
    """Hub id or folder of the model behind `minilm_cosine`; null: without that score."""
    bert_score: Text | None
    """Hub id or folder of the model behind `bert_score`; null: without that score."""


def _as_list(value: Any) -> Any:
    """One protocol as a list of one; a list without its repetitions."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return list(dict.fromkeys(value))
    return [value] if isinstance(value, str) else value


class RunConfig(Section):
    """One run: a stream of `n` edits by one method into one model, evaluated at the checkpoints."""

    model: ModelConfig
    """The model that is edited."""
    method: SerializeAsAny[MethodConfig]
    """What edits it."""
    dataset: SerializeAsAny[Dataset]
    """Where the edits come from."""
    tracker: SerializeAsAny[TrackerConfig]
    """Where the curves are shown as they grow."""
    n: Count
    """Edits in the stream."""
    checkpoints: list[Count]
    """Evaluate the model after so many edits; those beyond `n` are left out, `n` is added."""
    protocol: Annotated[list[Protocol], BeforeValidator(_as_list), Field(min_length=1)]
    """How predictions are made and compared; several, as in [greedy,release], after the same edits."""
    template: Literal["none", "model"]
    """Bare prompts, or the tokenizer's chat template around every prompt, in editing and evaluation alike."""
    template_date: IsoDate
    """What a chat template takes for today where it asks for the date."""
    locality: Literal["all", "clean"]
    """`clean` leaves out locality probes that another edit of the stream touches."""
    eval_cases: Count | None
    """Evaluate at most so many cases per checkpoint, a fixed random sample; null: all."""
    text: TextSettings
    """Of `protocol=text`."""
    seed: Seed
    """Of the method's initial values and of the resampling of intervals."""
    data_dir: Text
    """Where downloaded datasets lie."""
    results_dir: Text
    """Where runs and base predictions go."""
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")] | None
    """cpu, mps, cuda or cuda:N; null: the GPU if there is one."""
    threads: Count | None
    """CPU threads of torch; null: its own choice."""
    batch_size: Count
    """Prompts per forward pass in evaluation."""
    save_every: NonNegative
    """Seconds between saves of the stream's state while editing."""
    reuse: bool
    """Take over predictions that an unchanged route implies; false evaluates every probe again."""
    force: bool
    """Run again although the result is there."""

    @model_validator(mode="after")
    def _template_suits_method(self) -> Self:
        if self.template == "model" and self.method.needs_subject:
            raise ValueError(
                f"method={self.method.name} looks for the subject in the bare prompt, so template=model does not suit "
                "it; write template=none or choose another method"
            )
        return self

    @property
    def checkpoints_to_n(self) -> list[int]:
        """The checkpoints up to `n`, ascending; `n` always is one."""
        return sorted({c for c in self.checkpoints if c < self.n} | {self.n})

    def wanted(self) -> list[tuple[int, str]]:
        """Number of edits and protocol of everything that the run is to evaluate."""
        return [(n, protocol) for n in self.checkpoints_to_n for protocol in self.protocol]

    def plain(self) -> dict[str, Any]:
        """The configuration as plain values that make the same run again, `_target_` of each component included."""
        values = self.model_dump(mode="json")
        for part in ("method", "dataset", "tracker"):
            kind = type(getattr(self, part))
            values[part] = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **values[part]}
        return values

    def names(self) -> dict[str, str]:
        """Names of model, method and dataset, as rows have them."""
        return {part: getattr(self, part).name for part in ("model", "method", "dataset")}


def imported(target: str) -> Any:
    """The object that `package.module:Name` or `package.module.Name` names.

    Raises:
        ImportError: no such module.
        AttributeError: the module has no such name.
    """
    module, _, name = target.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and field of every setting of a section, nested sections in place."""
    for name, info in section.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from fields_of(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def with_text_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with text keys."""
    return {str(key): value for key, value in values.items()}
