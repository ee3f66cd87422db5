"""Errors whose message is for the user."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input: the message says what is wrong, in which file or key, and what to do.

    `train.py` and `test.py` print it without a traceback and exit with code 2.
    """


class BrokenFile(UserError):
    """A file of the data is missing or damaged; `Data.on_error: skip` leaves it out."""


class UnknownKey(UserError):
    """A config names a section or key that is not there. Attribute `key`: its name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def nearest(name: object, known: Iterable[str]) -> str:
    """Return which of the known names was probably meant, in any case of letters; "" where none is like it."""
    lower = {other.lower(): other for other in known}
    return next((lower[found] for found in get_close_matches(str(name).lower(), lower, n=1)), "")


class Terminated(BaseException):
    """A run saved its state and stops because of a signal."""
