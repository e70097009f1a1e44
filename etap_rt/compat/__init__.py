"""Other libraries' names for MLA decoding, with those libraries' arguments and conventions, on `etap_rt.mla_decode`.

`etap_rt.compat.flash_mla` stands in for FlashMLA, `etap_rt.compat.flashinfer` for FlashInfer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from etap_rt.errors import ArgumentError, ArgumentTypeError


def renamed(error: ArgumentError | ArgumentTypeError, names: Mapping[str, str]) -> ArgumentError | ArgumentTypeError:
    """The same mistake under the names that the arguments have in the other library."""

    def rename(text: str) -> str:
        for name, other in names.items():
            text = re.sub(rf"(?<!\w){re.escape(name)}", other, text)
        return text

    return type(error)(rename(error.argument), rename(error.given), rename(error.accepted))
