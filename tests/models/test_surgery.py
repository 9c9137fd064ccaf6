import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from horen_bench.errors import UserError
from horen_bench.models.surgery import MasterWeights, PristineWeights

PATHS = ["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.down_proj"]
WHERE = "method.modules"


@pytest.fixture
def pristine(golden_model: PreTrainedModel) -> PristineWeights:
    return PristineWeights(golden_model, PATHS, where=WHERE)


def overwrite(pristine: PristineWeights) -> None:
    with torch.no_grad():
        for weight in pristine.weights.values():
            weight.add_(1.0)


# --- Originals ---------------------------------------------------------------------------------------------


def test_restore_gives_back_the_same_bits_however_often_and_touches_nothing_else(
    golden_model: PreTrainedModel, pristine: PristineWeights
) -> None:
    before = {name: tensor.clone() for name, tensor in golden_model.state_dict().items()}
    pristine.keep()
    for _ in range(2):
        overwrite(pristine)
        pristine.restore()
        pristine.restore()
        assert all(torch.equal(tensor, before[name]) for name, tensor in golden_model.state_dict().items())


def test_originals_are_kept_once_and_not_before_they_are_needed(pristine: PristineWeights) -> None:
    assert pristine.numel() == 0 and not pristine.originals()
    pristine.restore()  # nothing was overwritten, nothing to do
    received = {path: weight.clone() for path, weight in pristine.weights.items()}
    pristine.keep()
    overwrite(pristine)
    pristine.keep()
    assert pristine.numel() == 2 * 64 * 176
    assert all(torch.equal(pristine.originals()[path], received[path]) for path in PATHS)


def test_saved_weights_come_back_and_can_still_be_undone(pristine: PristineWeights) -> None:
    received = {path: weight.clone() for path, weight in pristine.weights.items()}
    pristine.keep()
    overwrite(pristine)
    state = pristine.state_dict()
    pristine.restore()
    pristine.load_state_dict(state)
    assert all(torch.equal(pristine.weights[path], state[f"{path}.weight"]) for path in PATHS)
    pristine.restore()
    assert all(torch.equal(pristine.weights[path], received[path]) for path in PATHS)


def test_a_saved_state_does_not_follow_the_weights(pristine: PristineWeights) -> None:
    state = pristine.state_dict()
    before = state[f"{PATHS[0]}.weight"].clone()
    overwrite(pristine)
    assert torch.equal(state[f"{PATHS[0]}.weight"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the state lacks 'model.layers.2.mlp.down_proj.weight'"),
        (
            {f"{PATHS[1]}.weight": torch.zeros(2, 2)},
            "'model.layers.2.mlp.down_proj.weight' is torch.float32 \\(2, 2\\)",
        ),
        ({f"{PATHS[1]}.weight": torch.zeros(64, 176).half()}, r"is torch.float16 \(64, 176\) in the state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(
    pristine: PristineWeights, change: dict[str, torch.Tensor], message: str
) -> None:
    before = pristine.weights[PATHS[0]].clone()
    with pytest.raises(ValueError, match=message):
        pristine.load_state_dict({f"{PATHS[0]}.weight": torch.zeros(176, 64), **change})
    assert torch.equal(pristine.weights[PATHS[0]], before)
    assert pristine.numel() == 0


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "method.modules must name at least one module, each once; got []"),
        ([PATHS[0], PATHS[0]], "method.modules must name at least one module, each once"),
        (["model.layers.7.mlp.down_proj"], "model.layers has 4 entries, 0 to 3"),
        (["model.layers.1.mlp"], "method.modules=model.layers.1.mlp is a LlamaMLP; a linear module is needed"),
        (["model.norm"], "method.modules=model.norm is a LlamaRMSNorm; a linear module is needed"),
    ],
)
def test_paths_that_cannot_be_edited_are_refused(golden_model: PreTrainedModel, paths: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        PristineWeights(golden_model, paths, where=WHERE)
    assert message in str(caught.value)


# --- Masters -----------------------------------------------------------------------------------------------


def ones(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)


def test_steps_below_the_rounding_of_bfloat16_add_up() -> None:
    weight = ones(torch.bfloat16)
    masters = MasterWeights({"layer": weight})
    for _ in range(4):
        # Half of bfloat16's spacing above 1 is 2^-8: alone, a step of 2^-9 is rounded away.
        masters.of("layer").add_(2**-9)
        masters.write("layer")
    assert weight[0, 0].item() == 1 + 2**-7
    assert masters.numel() == 4


def test_a_float32_weight_is_its_own_master() -> None:
    weight = ones(torch.float32)
    masters = MasterWeights({"layer": weight})
    masters.of("layer").add_(1.0)
    masters.write("layer")
    assert weight[0, 0].item() == 2.0
    assert masters.numel() == 0 and masters.state_dict() == {}


def test_masters_are_saved_loaded_and_forgotten() -> None:
    weight = ones(torch.bfloat16)
    masters, resumed = MasterWeights({"layer": weight}), MasterWeights({"layer": weight})
    masters.of("layer").add_(2**-9)
    resumed.load_state_dict(masters.state_dict())
    assert torch.equal(resumed.of("layer"), masters.of("layer"))
    masters.clear()
    assert torch.equal(masters.of("layer"), torch.ones(2, 2))


# --- A weight that is stored the other way round -------------------------------------------------------------


def test_what_is_written_into_a_matrix_is_what_a_transposed_module_computes_with() -> None:
    owner = nn.ModuleDict({"wide": Conv1D(nf=2, nx=3), "square": Conv1D(nf=3, nx=3)})
    pristine = PristineWeights(owner, ["wide", "square"], where=WHERE)
    with torch.no_grad():
        pristine.matrix("wide").copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        pristine.matrix("square").copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]))
    x = torch.tensor([[1.0, 0.0, 10.0]])
    assert owner["wide"](x).tolist() == [[31.0, 64.0]]
    assert owner["square"](x).tolist() == [[31.0, 64.0, 97.0]]
    assert pristine.state_dict()["wide.weight"].shape == (3, 2)  # as it is stored
