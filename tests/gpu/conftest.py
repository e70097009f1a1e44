"""What holds for all GPU tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from etap_rt.schedule import SCARCE_SMS
from tests.tool_modules import import_tool

FEW_SMS = 64


@pytest.fixture(autouse=True)
def finished() -> Iterator[None]:
    """Errors of the GPU belong to the test that caused them."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def few_sms() -> Any:
    """A stream of torch on FEW_SMS SMs."""
    import torch

    assert FEW_SMS <= SCARCE_SMS
    return torch.cuda.ExternalStream(import_tool("green_context").stream_on(FEW_SMS, torch.cuda.current_device()))
