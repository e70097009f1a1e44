"""How public names and arguments go: they work for one more minor version, with a warning that says what to use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

from etap_rt.errors import ArgumentTypeError

Function = TypeVar("Function", bound=Callable[..., object])


def deprecated_name(old: str, new: str, function: Function, gone_in: str) -> Function:
    """`function` under its old name: the same, but for a DeprecationWarning at every call.

    Args:
        old, new: full names, such as "etap_rt.decode" and "etap_rt.mla_decode".
        gone_in: the version that no longer has the old name.
    """

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> object:
        _warn(f"{old}()", f"{new}()", gone_in)
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def deprecated_arguments(gone_in: str, **names: str) -> Callable[[Function], Function]:
    """A decorator: keyword arguments go on working under old names, each with a DeprecationWarning.

    Args:
        gone_in: the version that no longer has the old names.
        names: the new name for each old one. The function's signature shows the new ones only.

    The function that is decorated raises ArgumentTypeError when an argument is given under both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: object, **options: object) -> object:
            for old in names.keys() & options.keys():
                if names[old] in options:
                    raise ArgumentTypeError(old, f"a value beside {names[old]}", f"{names[old]} alone, its new name")
                _warn(f"{function.__name__}()'s argument {old}", names[old], gone_in)
                options[names[old]] = options.pop(old)
            return function(*arguments, **options)

        return call  # type: ignore[return-value]

    return decorate


def _warn(old: str, new: str, gone_in: str) -> None:
    """Warn at the line that called the caller of this function."""
    warnings.warn(
        f"{old} is deprecated and goes away in etap_rt {gone_in}; use {new}", DeprecationWarning, stacklevel=3
    )
