"""Exceptions that speak to the user."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, in which file or key, and what to do.

    `train.py` and `test.py` print it without a traceback and exit with code 2.
    """


class BrokenFile(UserError):
    """A file of the data that is missing or damaged; `Data.on_error: skip` goes on without it."""


class Terminated(BaseException):
    """A run that saved its state and stops, because it was asked to."""
