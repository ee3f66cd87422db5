"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, in which file or key, and what to do.

    `train.py` and `test.py` print it without a traceback and exit with code 2.
    """


class BrokenFile(UserError):
    """A file of the data that is missing or damaged; `Data.on_error: skip` goes on without it."""
