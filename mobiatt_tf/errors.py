"""The one exception that a command line shows as a single line instead of a traceback, and others in one line."""


class UserError(Exception):
    """A mistake its reader can mend: the message says what was given, what is allowed, what to do.

    Library functions raise `ValueError` or `TypeError` for wrong arguments. `UserError` is for the outside world: a
    file that is missing or corrupt, a dataset that cannot be had, a disk that is full.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none: what a one-line message can quote."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
