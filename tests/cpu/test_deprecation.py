"""What users see of a name or an argument that is going: it works, and a warning at their line says what to use."""

from __future__ import annotations

import inspect
import warnings

import pytest

from etap_rt.deprecation import deprecated_arguments, deprecated_name
from etap_rt.errors import ArgumentTypeError


@deprecated_arguments("0.3", scale="softmax_scale", seqlens="cache_seqlens")
def attend(q: int, cache_seqlens: int = 0, *, softmax_scale: float = 1.0) -> tuple[int, int, float]:
    """Attend."""
    return q, cache_seqlens, softmax_scale


def test_an_old_argument_works_and_its_new_name_is_told_at_the_line_of_the_call() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        assert attend(1, scale=0.5) == (1, 0, 0.5)
    (warning,) = caught
    message = "attend()'s argument scale is deprecated and goes away in etap_rt 0.3; use softmax_scale"
    assert str(warning.message) == message
    assert warning.filename == __file__


def test_new_arguments_are_not_warned_of_and_are_all_that_is_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attend(1, cache_seqlens=2, softmax_scale=0.5) == (1, 2, 0.5)
    assert list(inspect.signature(attend).parameters) == ["q", "cache_seqlens", "softmax_scale"]
    assert (attend.__name__, attend.__doc__) == ("attend", "Attend.")


def test_several_old_arguments_are_each_warned_of() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        assert attend(1, scale=0.5, seqlens=3) == (1, 3, 0.5)
    assert sorted(str(warning.message).partition(" is ")[0].split()[-1] for warning in caught) == ["scale", "seqlens"]


def test_an_argument_under_both_names_is_refused_by_name() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^scale: got a value beside softmax_scale, accepted is softmax_scale"):
        attend(1, scale=0.5, softmax_scale=0.5)
    with pytest.raises(TypeError, match="unknown"):
        attend(1, unknown=0.5)  # type: ignore[call-arg]


def test_an_old_name_is_the_function_with_a_warning() -> None:
    old = deprecated_name("etap_rt.attention", "etap_rt.attend", attend, "0.3")
    with pytest.warns(DeprecationWarning) as caught:
        assert old(4) == (4, 0, 1.0)
    (warning,) = caught
    message = "etap_rt.attention() is deprecated and goes away in etap_rt 0.3; use etap_rt.attend()"
    assert str(warning.message) == message
    assert warning.filename == __file__
    assert inspect.signature(old) == inspect.signature(attend)
