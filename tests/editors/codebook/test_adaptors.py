import torch

from horen_bench.editors.codebook.adaptors import LoraAdaptor, VectorAdaptor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_vector_starts_uniform_between_zero_and_one() -> None:
    vector = VectorAdaptor(20_000, learning_rate=1.0).initial(seeded(0))["vector"]
    assert vector.shape == (20_000,)
    assert vector.dtype == torch.float32
    assert vector.min() >= 0
    assert vector.max() < 1
    # Uniform[0, 1) has mean 1/2 and standard deviation sqrt(1/12); ten standard errors of room.
    assert abs(vector.mean().item() - 0.5) < 10 * (1 / 12 / 20_000) ** 0.5
    assert abs(vector.std().item() - (1 / 12) ** 0.5) < 0.01


def test_a_vector_is_added_whatever_the_output() -> None:
    value = {"vector": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    added = VectorAdaptor(2, learning_rate=1.0).added(value, torch.full((2, 2), 9.0))
    assert added.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_lora_value_starts_without_effect() -> None:
    adaptor = LoraAdaptor(500, learning_rate=1e-3, rank=4, scale=1.0)
    value = adaptor.initial(seeded(0))
    assert {name: tuple(tensor.shape) for name, tensor in value.items()} == {"a": (4, 500), "b": (500, 4)}
    assert {name: tuple(shape) for name, shape in adaptor.shapes.items()} == {"a": (4, 500), "b": (500, 4)}
    assert abs(value["a"].std().item() - 0.01) < 0.001
    assert abs(value["a"].mean().item()) < 0.002
    added = adaptor.added({name: tensor[None] for name, tensor in value.items()}, torch.ones(1, 500))
    assert torch.equal(added, torch.zeros(1, 500))


def test_a_lora_value_adds_scale_times_b_a_output_row_by_row() -> None:
    # Row 0: A o = (1*5 + 2*7) = 19, B (A o) = (19, -19), times 0.5. Row 1: A o = 3, B (A o) = (0, 30).
    value = {
        "a": torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]),
        "b": torch.tensor([[[1.0], [-1.0]], [[0.0], [10.0]]]),
    }
    outputs = torch.tensor([[5.0, 7.0], [1.0, 100.0]], dtype=torch.bfloat16)
    added = LoraAdaptor(2, learning_rate=1e-3, rank=1, scale=0.5).added(value, outputs)
    assert added.dtype == torch.float32
    assert added.tolist() == [[9.5, -9.5], [0.0, 15.0]]


def test_initial_values_come_from_the_generator_alone() -> None:
    for adaptor in (VectorAdaptor(8, learning_rate=1.0), LoraAdaptor(8, 1e-3, rank=2, scale=1.0)):
        first, again, other = (adaptor.initial(seeded(seed)) for seed in (3, 3, 4))
        name = next(iter(adaptor.shapes))
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
