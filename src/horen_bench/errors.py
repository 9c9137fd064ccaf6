"""The one exception for what a user can mend, and what others say in it."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with code 2. Raise it for bad
    input (configuration, files, missing weights), never for a defect of the program.
    """


def reason_of(error: BaseException, *, with_kind: bool = False) -> str:
    """What an error of a library says, for the middle of a sentence: one line, 200 characters at most.

    Args:
        error: of any kind; one that says nothing is given by its kind.
        with_kind: put the kind in front, where the text alone says little.
    """
    text = f"{type(error).__name__}: {error}" if with_kind else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
