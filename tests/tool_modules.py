"""The programs of tools/ as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from tests.processes import ROOT as ROOT


def import_tool(name: str) -> ModuleType:
    """A module of tools/ by name, which is also how they import each other.

    The directory goes behind everything else on the path, so that its names never hide others.
    """
    directory = str(ROOT / "tools")
    if directory not in sys.path:
        sys.path.append(directory)
    return importlib.import_module(name)
