import pytest
import torch
from torch import Tensor, nn

from horen_bench.errors import UserError
from horen_bench.models.hooks import as_sequences, outputs_of


def test_tokens_in_one_row_are_put_back_into_their_sequences() -> None:
    tokens = torch.arange(12.0).view(6, 2)
    sequences = as_sequences(tokens, (2, 3))
    assert sequences[1, 0].tolist() == tokens[3].tolist() == [6.0, 7.0]
    assert torch.equal(as_sequences(sequences, (2, 3)), sequences)


@pytest.mark.parametrize("shape", [(5, 2), (2, 2, 2), (3, 2, 2), (12,)])
def test_a_module_that_gets_other_tokens_than_the_model_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="for 2 sequences of 3 tokens"):
        as_sequences(torch.zeros(shape), (2, 3))


def test_an_output_is_read_as_the_module_gave_it_whatever_its_owner_does_with_it() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.inner(x)
            return output.add_(1.0)  # as Falcon adds attention to its MLP's output

    module = Adding()
    with outputs_of({"inner": module.inner}) as outputs:
        module(torch.zeros(1, 2))
    assert outputs["inner"].tolist() == [[0.0, 0.0]]
