"""Other libraries' names for MLA decoding, with those libraries' arguments and conventions, on `etap_rt.mla_decode`.

`etap_rt.compat.flash_mla` stands in for FlashMLA, `etap_rt.compat.flashinfer` for FlashInfer.
"""

from __future__ import annotations

from collections.abc import Mapping

from etap_rt.errors import ArgumentError, ArgumentTypeError


def renamed(error: ArgumentError | ArgumentTypeError, names: Mapping[str, str]) -> ArgumentError | ArgumentTypeError:
    """The same mistake under the name that the argument has in the other library."""
    for name, other in names.items():
        if error.argument.startswith(name):
            return type(error)(other + error.argument[len(name) :], error.given, error.accepted)
    return error
