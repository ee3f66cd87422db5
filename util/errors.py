"""Errors whose message is for the user."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, in which file or key, and what to do.

    `train.py` and `test.py` print it without a traceback and exit with code 2.
    """


class BrokenFile(UserError):
    """A file of the data is missing or damaged; `Data.on_error: skip` leaves it out."""


class Terminated(BaseException):
    """A run saved its state and stops because of a signal."""
