from itertools import pairwise

import pytest
import torch
from torch import Tensor

from horen_bench.editors.codebook.entries import Codebook

CPU = torch.device("cpu")


def value_of(i: int) -> dict[str, Tensor]:
    return {"a": torch.full((2, 3), float(i)), "b": torch.full((4,), -float(i))}


def filled(n: int) -> Codebook:
    """Entry `i`: key (i, i+1), values of i, label of i % 3 tokens, prompt of 10 + i tokens."""
    codebook = Codebook(2, {"a": (2, 3), "b": (4,)}, CPU)
    for i in range(n):
        key = torch.tensor([i, i + 1.0])
        assert codebook.append(key, tuple(range(i % 3)), prompt_length=10 + i) == i
        codebook.set_value(i, value_of(i))
    return codebook


def assert_same(codebook: Codebook, expected: Codebook) -> None:
    state = expected.state_dict()
    assert [name for name, tensor in codebook.state_dict().items() if not torch.equal(tensor, state[name])] == []


def test_growing_past_its_capacity_keeps_every_entry() -> None:
    codebook = filled(200)
    n = torch.arange(200.0)
    assert len(codebook) == 200
    assert torch.equal(codebook.keys, torch.stack([n, n + 1], dim=1))
    assert torch.equal(codebook.values["a"], n[:, None, None].expand(200, 2, 3))
    assert torch.equal(codebook.values["b"], -n[:, None].expand(200, 4))
    assert codebook.labels[197:] == [(0, 1), (), (0,)]
    assert codebook.prompt_lengths == list(range(10, 210))


def test_an_append_copies_nothing_between_two_doublings() -> None:
    codebook = Codebook(2, {"a": (2, 3), "b": (4,)}, CPU)
    homes = []
    for i in range(300):
        codebook.append(torch.zeros(2), (i,), 1)
        homes.append((codebook.keys.data_ptr(), codebook.values["a"].data_ptr()))
    moves = [i + 1 for i in range(1, 300) if homes[i] != homes[i - 1]]
    # 300 entries fit after at most a handful of doublings, and each doubles what it was forced by.
    assert 1 <= len(moves) <= 4
    assert all(later == 2 * earlier - 1 for earlier, later in pairwise(moves))


def test_overwriting_a_value_leaves_keys_labels_and_neighbours_alone() -> None:
    codebook = filled(5)
    codebook.set_value(2, value_of(99))
    assert torch.equal(codebook.keys, filled(5).keys)
    assert codebook.labels == filled(5).labels
    assert codebook.values["b"][:, 0].tolist() == [0.0, -1.0, -99.0, -3.0, -4.0]


def test_an_entry_knows_how_often_its_value_was_set() -> None:
    codebook = filled(3)
    codebook.set_value(1, value_of(4))
    codebook.append(torch.zeros(2), (), 1)
    assert codebook.versions == [1, 2, 1, 0]


def test_entries_from_a_size_on_are_forgotten() -> None:
    codebook = filled(70)
    codebook.truncate(3)
    assert len(codebook) == 3
    assert_same(codebook, filled(3))
    assert codebook.append(torch.tensor([3.0, 4.0]), (), 13) == 3
    codebook.set_value(3, value_of(3))
    assert_same(codebook, filled(4))


def test_values_of_several_entries_come_in_the_order_asked_for() -> None:
    assert filled(5).value(torch.tensor([4, 0, 4]))["b"][:, 0].tolist() == [-4.0, 0.0, -4.0]
    assert filled(5).value(3)["a"].tolist() == [[3.0] * 3] * 2


def test_it_counts_the_numbers_of_its_entries_and_not_its_spare_room() -> None:
    assert filled(0).numel() == 0
    assert filled(5).numel() == 5 * (2 + 6 + 4)


@pytest.mark.parametrize("n", [0, 1, 64, 65, 150])
def test_a_loaded_codebook_goes_on_like_the_saved_one(n: int) -> None:
    straight, loaded = filled(n), Codebook(2, {"a": (2, 3), "b": (4,)}, CPU)
    loaded.load_state_dict(straight.state_dict())
    for codebook in (straight, loaded):
        codebook.set_value(codebook.append(torch.tensor([7.0, 8.0]), (7, 7), 7), value_of(7))
    assert loaded.labels == straight.labels
    assert loaded.prompt_lengths == straight.prompt_lengths
    assert torch.equal(loaded.keys, straight.keys)
    assert all(torch.equal(loaded.values[name], straight.values[name]) for name in ("a", "b"))


def test_loading_replaces_what_was_there_before() -> None:
    codebook = filled(100)
    codebook.load_state_dict(filled(3).state_dict())
    assert len(codebook) == 3
    assert torch.equal(codebook.keys, filled(3).keys)


def test_a_state_is_a_copy_and_not_a_view() -> None:
    codebook = filled(3)
    state = codebook.state_dict()
    codebook.set_value(0, value_of(50))
    assert torch.equal(state["value.b"], filled(3).values["b"])
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name == "keys"}
    codebook.load_state_dict(state | zeros)
    assert torch.equal(state["keys"], filled(3).keys)


def test_labels_of_unequal_length_are_stored_end_to_end() -> None:
    # Labels (), (0,), (0, 1), () end at 0, 1, 3, 3.
    state = filled(4).state_dict()
    assert state["labels"].tolist() == [0, 0, 1]
    assert state["label_ends"].tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("keys", torch.zeros(3, 5), "codebook state 'keys' must be (C, *(2,)), got (3, 5)"),
        ("value.a", torch.zeros(3, 2, 4), "codebook state 'value.a' must be (C, *(2, 3)), got (3, 2, 4)"),
        ("value.b", None, "codebook state 'value.b' must be (C, *(4,)), got nothing"),
    ],
)
def test_a_state_of_another_shape_is_refused(name: str, tensor: Tensor | None, message: str) -> None:
    state = filled(3).state_dict()
    del state[name]
    if tensor is not None:
        state[name] = tensor
    with pytest.raises(ValueError) as caught:
        filled(1).load_state_dict(state)
    assert str(caught.value) == message
