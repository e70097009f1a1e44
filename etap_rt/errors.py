"""Everything that etap_rt raises on purpose; all of it derives from `EtapError`.

Errors keep what they were made of in `args`, so that they survive pickling to another process; the sentence
is put together when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence


class EtapError(Exception):
    """Base of all errors of etap_rt; raised itself for failures of the CUDA driver."""


class _ArgumentMistake(EtapError):
    """An argument is not what it should be. Attributes: `argument` (its name), `given`, `accepted`."""

    def __init__(self, argument: str, given: str, accepted: str) -> None:
        super().__init__(argument, given, accepted)
        self.argument = argument
        self.given = given
        self.accepted = accepted

    def __str__(self) -> str:
        return f"{self.argument}: got {self.given}, accepted is {self.accepted}"


class ArgumentError(_ArgumentMistake, ValueError):
    """An argument of the right type has a shape, dtype, device, stride or value that is not accepted."""


class ArgumentTypeError(_ArgumentMistake, TypeError):
    """An argument has a type that is not accepted, such as a list where an array is needed."""


class SequenceError(EtapError, ValueError):
    """A sequence of a cache is unknown, freed or used in the wrong order."""


class OutOfPagesError(EtapError):
    """The cache has too few free pages. It is as it was before the call. Attributes: `asked`, `free` (pages)."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(asked, free)
        self.asked = asked
        self.free = free

    def __str__(self) -> str:
        return f"out of pages: asked for {self.asked}, {self.free} are free"


class CompileError(EtapError):
    """NVRTC refused a kernel. Attributes: `spec`, `options` (as given to NVRTC), `log` (NVRTC's program log)."""

    def __init__(self, spec: object, options: Sequence[str], log: str) -> None:
        super().__init__(spec, tuple(options), log)
        self.spec = spec
        self.options = tuple(options)
        self.log = log

    def __str__(self) -> str:
        return f"{self.spec} does not compile\noptions: {' '.join(self.options)}\n{self.log.strip()}"


class UnsupportedError(EtapError):
    """Something this machine or installation cannot do. Attributes: `what` is not possible, what is `needed`."""

    def __init__(self, what: str, needed: str) -> None:
        super().__init__(what, needed)
        self.what = what
        self.needed = needed

    def __str__(self) -> str:
        return f"{self.what}; needed: {self.needed}"
