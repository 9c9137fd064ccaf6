"""What torch's optimisers need to be told."""

_LARGEST = 3e37  # times ten, Adam's first correction, it is still a float32


def adam_rate(learning_rate: float) -> float:
    """The learning rate, or the largest that Adam takes without an error: with either, a step leaves float32."""
    return min(learning_rate, _LARGEST)
