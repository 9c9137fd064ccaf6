"""What an error says, as a part of a sentence."""

import pytest

from horen_bench.errors import reason_of


@pytest.mark.parametrize(
    ("error", "plain", "with_kind"),
    [
        (ValueError("two\n  lines"), "two lines", "ValueError: two lines"),
        (KeyError(), "KeyError", "KeyError:"),
        (OSError("x" * 300), "x" * 200, ("OSError: " + "x" * 300)[:200]),
    ],
)
def test_a_reason_is_one_short_line_and_never_empty(error: Exception, plain: str, with_kind: str) -> None:
    assert (reason_of(error), reason_of(error, with_kind=True)) == (plain, with_kind)
