"""Values trained side by side against the same values trained one at a time."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from horen_bench.editors.codebook.adaptors import Adaptor, LoraAdaptor, VectorAdaptor
from horen_bench.editors.codebook.config import EarlyStopping
from horen_bench.editors.codebook.parallel import _fitting_batch, _ValueRows, train_values
from horen_bench.editors.codebook.training import (
    Schedule,
    TrainedValue,
    ValueJob,
    train_on_whole_model,
    train_value,
)
from horen_bench.models.partial import UpperLayers
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import EncodedEdit

_RELEASE: EarlyStopping | None = None
_PAPER = EarlyStopping(loss_bound=0.5, patience=3)


@pytest.fixture
def upper() -> UpperLayers:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return UpperLayers(model, "model.layers.1.mlp.down_proj")


def _jobs(n: int, adaptor: Adaptor) -> list[ValueJob]:
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 61, (length,), generator=generator).tolist())

    edits = [EncodedEdit(tokens(1 + i % 7), tokens(1 + i % 3)) for i in range(n)]
    return [ValueJob(i, edit, adaptor.initial(generator)) for i, edit in enumerate(edits)]


def _alone(job: ValueJob, upper: UpperLayers, adaptor: Adaptor, schedule: Schedule) -> TrainedValue:
    states = upper.prepare([job.edit])

    def loss_of(value: dict[str, Tensor]) -> Tensor:
        row = {name: tensor[None] for name, tensor in value.items()}
        return upper.losses(states, adaptor.added(row, states.module_output))[0]

    return train_value(job.start, loss_of, schedule)


def _together(
    jobs: Sequence[ValueJob], upper: UpperLayers, adaptor: Adaptor, schedule: Schedule, size: int
) -> list[TrainedValue]:
    results = [(job.position, trained) for job, trained in train_values(jobs, upper, adaptor.added, schedule, size)]
    assert sorted(position for position, _ in results) == list(range(len(jobs))), "every job is yielded once"
    by_position = dict(results)
    return [by_position[i] for i in range(len(jobs))]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("stopping", [_RELEASE, _PAPER], ids=["all-steps", "early-stopping"])
@pytest.mark.parametrize(
    "adaptor", [VectorAdaptor(32, 0.5), LoraAdaptor(32, 0.05, rank=2, scale=1.0)], ids=["vector", "lora"]
)
def test_every_value_is_trained_as_if_alone(
    upper: UpperLayers, adaptor: Adaptor, stopping: EarlyStopping | None, batch_size: int
) -> None:
    schedule = Schedule(adaptor.learning_rate, 20, stopping)
    jobs = _jobs(13, adaptor)
    for job, trained in zip(jobs, _together(jobs, upper, adaptor, schedule, batch_size), strict=True):
        alone = _alone(job, upper, adaptor, schedule)
        assert trained.steps == alone.steps
        assert trained.finite
        assert trained.losses == pytest.approx(alone.losses, rel=1e-3)
        assert trained.loss == pytest.approx(alone.loss, rel=1e-3)
        for name, tensor in alone.value.items():
            torch.testing.assert_close(trained.value[name], tensor, rtol=1e-3, atol=1e-3 * tensor.abs().max().item())


_LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_LIKE_GPT: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
_DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("kind", "sizes", "module"),
    [
        pytest.param("granite", {**_LIKE_LLAMA, "logits_scaling": 8.0}, _DOWN, id="logits divided"),
        pytest.param("cohere", {**_LIKE_LLAMA, "logit_scale": 0.0625}, _DOWN, id="logits multiplied"),
        pytest.param("gemma2", {**_LIKE_LLAMA, "final_logit_softcapping": 1.0}, _DOWN, id="logits capped"),
        pytest.param("gptj", {**_LIKE_GPT, "rotary_dim": 4}, "transformer.h.1.mlp.fc_out", id="gptj"),
        pytest.param(
            "gpt_neo",
            {
                "vocab_size": 61,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
            },
            "transformer.h.0.mlp.c_proj",
            id="positions learned",
        ),
        pytest.param(
            "bloom",
            {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
            "transformer.h.1.mlp.dense_4h_to_h",
            id="no positions",
        ),
    ],
)
def test_values_are_those_that_the_whole_model_trains(kind: str, sizes: dict[str, Any], module: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    adaptor, schedule = VectorAdaptor(32, 0.1), Schedule(0.1, 20, None)

    def write(outputs: Tensor, prompts: Tensor, value: dict[str, Tensor], _rows: Tensor) -> Tensor:
        last = int(prompts.sum()) - 1
        return outputs.index_add(1, torch.tensor([last]), adaptor.added(value, outputs[:, last])[:, None])

    jobs = _jobs(6, adaptor)
    together = _together(jobs, UpperLayers(model, module), adaptor, schedule, 8)
    hook = PromptHook(model, model.get_submodule(module), lambda *_: None)
    for job, trained in zip(jobs, together, strict=True):
        alone = train_on_whole_model(job, model, hook, write, schedule)
        assert alone.losses[-1] < alone.losses[0] - 0.02
        assert trained.losses == pytest.approx(alone.losses, rel=1e-3)
        torch.testing.assert_close(trained.value["vector"], alone.value["vector"], rtol=1e-3, atol=1e-3)


def test_no_steps_leave_the_values_where_they_were(upper: UpperLayers) -> None:
    adaptor = VectorAdaptor(32, 0.5)
    jobs = _jobs(3, adaptor)
    for job, trained in zip(jobs, _together(jobs, upper, adaptor, Schedule(0.5, 0, None), 8), strict=True):
        assert torch.equal(trained.value["vector"], job.start["vector"])
        assert trained.steps == 0
        assert math.isnan(trained.loss)


def test_a_value_that_breaks_is_reported_and_does_not_touch_its_neighbours(upper: UpperLayers) -> None:
    adaptor = VectorAdaptor(32, 0.5)
    schedule = Schedule(0.5, 10, _PAPER)
    jobs = _jobs(4, adaptor)
    broken = ValueJob(2, jobs[2].edit, {"vector": torch.full((32,), math.nan)})
    together = _together([*jobs[:2], broken, jobs[3]], upper, adaptor, schedule, 8)
    assert [trained.finite for trained in together] == [True, True, False, True]
    for i in (0, 1, 3):
        alone = _alone(jobs[i], upper, adaptor, schedule)
        torch.testing.assert_close(together[i].value["vector"], alone.value["vector"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    upper: UpperLayers, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    adaptor = VectorAdaptor(32, 0.5)
    schedule = Schedule(0.5, 12, _PAPER)
    jobs = _jobs(11, adaptor)
    expected = _together(jobs, upper, adaptor, schedule, 11)
    sizes: list[int] = []
    fitting = UpperLayers.losses

    def losses(self: UpperLayers, states: Any, added: Tensor) -> Tensor:
        sizes.append(len(states))
        if len(states) > 3:
            raise error
        return fitting(self, states, added)

    monkeypatch.setattr(UpperLayers, "losses", losses)
    for ours, theirs in zip(_together(jobs, upper, adaptor, schedule, 11), expected, strict=True):
        assert ours.steps == theirs.steps
        torch.testing.assert_close(ours.value["vector"], theirs.value["vector"], rtol=1e-3, atol=1e-3)
    assert sizes[:3] == [11, 5, 2], "halved until it fits"


@pytest.mark.parametrize("call", range(1, 30, 4))
def test_what_is_trained_already_is_not_trained_again_after_memory_ran_out(
    upper: UpperLayers, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Memory runs out once, at any step: in the first round, in a later one, with finished rows still in the batch."""
    adaptor = VectorAdaptor(32, 0.5)
    schedule = Schedule(0.5, 12, EarlyStopping(loss_bound=2.0, patience=3))
    jobs = _jobs(20, adaptor)
    expected = _together(jobs, upper, adaptor, schedule, 8)
    fitting = UpperLayers.losses
    calls = 0

    def losses(self: UpperLayers, states: Any, added: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("no more memory")
        return fitting(self, states, added)

    monkeypatch.setattr(UpperLayers, "losses", losses)
    yielded = list(train_values(jobs, upper, adaptor.added, schedule, 8))
    assert calls > call, "memory did run out"
    assert sorted(job.position for job, _ in yielded) == list(range(len(jobs)))
    for job, trained in yielded:
        assert trained.steps == expected[job.position].steps
        assert trained.losses == pytest.approx(expected[job.position].losses, rel=1e-3)


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    # 16 tokens x (40 x 32 x 2 + 12 x vocabulary) numbers x 2 bytes an edit, of 2 GiB; at most 256.
    [(61, 256), (20_000, 256), (100_000, 55), (10_000_000, 1)],
)
def test_rows_on_a_cpu_follow_from_the_shape_of_the_model_alone(
    upper: UpperLayers, monkeypatch: pytest.MonkeyPatch, vocabulary: int, rows: int
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(upper._model.config, "vocab_size", vocabulary)

    def fresh(jobs: Sequence[ValueJob], *_: Any) -> None:
        sizes.append(len(jobs))
        raise EOFError

    monkeypatch.setattr(_ValueRows, "fresh", fresh)
    adaptor = VectorAdaptor(32, 0.5)
    with pytest.raises(EOFError):
        list(train_values(_jobs(300, adaptor), upper, adaptor.added, Schedule(0.5, 1, None)))
    assert sizes == [rows]


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts operations for which the host waits for a GPU: a number read, a shape that depends on values."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_further_steps_read_no_single_number_and_count_nothing(upper: UpperLayers) -> None:
    """What a step decides is read as one table at its end, so that a GPU is waited for once."""
    adaptor = VectorAdaptor(32, 0.5)
    jobs = _jobs(6, adaptor)

    def waits(n_steps: int) -> int:
        schedule = Schedule(0.5, n_steps, EarlyStopping(loss_bound=1e-9, patience=99))
        with _Waits() as mode:  # type: ignore[no-untyped-call]
            list(train_values(jobs, upper, adaptor.added, schedule, 8))
        return int(mode.n)

    assert waits(2) == waits(9)


@pytest.mark.parametrize(
    ("gib", "weights_gib", "expected"),
    [(80, 16, 32), (79, 16, 16), (16, 15.5, 1), (12, 16, 1), (4096, 16, 1024)],
)
def test_the_batch_on_a_gpu_follows_its_size_not_what_is_free(
    gib: float, weights_gib: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 GiB an edit: half of 64 GiB are 32 rows; half of 63 are 31, of which 16 are taken."""

    def size_of(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=int(gib * 2**30))

    monkeypatch.setattr(torch.cuda, "get_device_properties", size_of)
    upper = SimpleNamespace(
        device=torch.device("cuda", 0),
        bytes_of_weights=lambda: int(weights_gib * 2**30),
        bytes_per_edit=lambda: 2**30,
    )
    assert _fitting_batch(cast(UpperLayers, upper)) == expected


def test_a_single_edit_that_does_not_fit_is_an_error(upper: UpperLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(self: UpperLayers, states: Any, added: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more memory")

    monkeypatch.setattr(UpperLayers, "losses", losses)
    adaptor = VectorAdaptor(32, 0.5)
    with pytest.raises(torch.OutOfMemoryError):
        list(train_values(_jobs(4, adaptor), upper, adaptor.added, Schedule(0.5, 5, None), 4))


def test_finished_rows_make_room_for_the_next_edits(upper: UpperLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    adaptor = VectorAdaptor(32, 0.5)
    sizes: list[int] = []
    plain = UpperLayers.losses

    def losses(self: UpperLayers, states: Any, added: Tensor) -> Tensor:
        sizes.append(len(states))
        return plain(self, states, added)

    monkeypatch.setattr(UpperLayers, "losses", losses)
    # The bound lets a job stop at once or never, so rows leave at very different times.
    jobs = _jobs(40, adaptor)
    _together(jobs, upper, adaptor, Schedule(0.5, 30, EarlyStopping(loss_bound=2.0, patience=30)), 8)
    assert max(sizes) == 8
    in_the_middle = sizes[: -len(sizes) // 4]
    assert sum(in_the_middle) / len(in_the_middle) > 4, "the batch stays more than half full while there are jobs"
