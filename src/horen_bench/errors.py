"""The one exception for what a user can mend."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with code 2. Raise it for bad
    input (configuration, files, missing weights), never for a defect of the program.
    """
