"""Numbers and flags of the host, as users pass them."""

from __future__ import annotations

import operator
from typing import Any

from etap_rt.errors import ArgumentError, ArgumentTypeError

SHOWN_CHARACTERS = 60  # of a value in a message; of a longer one only the type is told


def integer(value: Any, name: str, accepted: str = "an integer") -> int:
    """An integer of any library as Python's. A bool is none: it is a flag that came to the wrong place."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # torch's RuntimeError: a tensor without memory
            pass
    raise ArgumentTypeError(name, shown(value), accepted)


def positive(value: Any, name: str) -> int:
    """An integer from 1 on."""
    number = integer(value, name)
    if number < 1:
        raise ArgumentError(name, str(number), "1 or more")
    return number


def check_flag(value: Any, name: str) -> None:
    """Raise unless `value` is True or False: whatever else is true may have been meant for another argument."""
    if value is not True and value is not False:
        raise ArgumentTypeError(name, shown(value), "True or False")


def shown(value: Any) -> str:
    """A value as a message tells it: on one line, and not in full when it is an array or a long list."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS and "\n" not in text else type(value).__name__
