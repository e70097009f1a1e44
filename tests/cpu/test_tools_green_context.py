"""tools/green_context.py against a libcuda made of C callbacks."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from etap_rt import EtapError, UnsupportedError
from tests.tool_modules import import_tool

green_context = import_tool("green_context")

SMS, STEP = 132, 8
DESCRIPTION, CONTEXT, STREAM = 0x7F00_1111_2222, 0x7F00_3333_4444, 0x7F00_5555_6666
INVALID_VALUE = 1


def write(pointer: int, value: int, kind: Any = ctypes.c_void_p) -> int:
    kind.from_address(pointer).value = value
    return 0


class FakeCuda(SimpleNamespace):
    """The driver of a GPU with SMS SMs, which are given away STEP at a time. Sizes and places are those of cuda.h."""

    RESOURCE_BYTES, SM_COUNT_AT = 144, 96

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        pointer, number = ctypes.c_void_p, ctypes.c_int
        prototypes = {
            "cuDeviceGet": (pointer, number),
            "cuDeviceGetDevResource": (number, pointer, number),
            "cuDevSmResourceSplitByCount": (pointer, pointer, pointer, pointer, number, number),
            "cuDevResourceGenerateDesc": (pointer, pointer, number),
            "cuGreenCtxCreate": (pointer, pointer, number, number),
            "cuGreenCtxStreamCreate": (pointer, pointer, number, number),
        }
        for name, types in prototypes.items():
            setattr(self, name, ctypes.CFUNCTYPE(number, *types)(getattr(self, f"_{name}")))

    def _cuDeviceGet(self, device: int, ordinal: int) -> int:
        return write(device, ordinal, ctypes.c_int)

    def _cuDeviceGetDevResource(self, device: int, resource: int, kind: int) -> int:
        self.asked.append(("device", device, kind))
        ctypes.memset(resource, 0xAA, self.RESOURCE_BYTES)
        return write(resource + self.SM_COUNT_AT, SMS, ctypes.c_uint)

    def _cuDevSmResourceSplitByCount(
        self, result: int, groups: int, whole: int, remainder: int | None, flags: int, least: int
    ) -> int:
        assert ctypes.c_uint.from_address(whole + self.SM_COUNT_AT).value == SMS
        self.asked.append(("split", remainder, flags, least))
        ctypes.memmove(result, whole, self.RESOURCE_BYTES)
        write(result + self.SM_COUNT_AT, -(-least // STEP) * STEP, ctypes.c_uint)
        return write(groups, 1, ctypes.c_uint)

    def _cuDevResourceGenerateDesc(self, description: int, resources: int, count: int) -> int:
        sms = ctypes.c_uint.from_address(resources + self.SM_COUNT_AT).value
        # What the driver keeps there comes back as it was.
        assert ctypes.string_at(resources, self.SM_COUNT_AT) == b"\xaa" * self.SM_COUNT_AT
        self.asked.append(("description", sms, count))
        return write(description, DESCRIPTION)

    def _cuGreenCtxCreate(self, context: int, description: int, device: int, flags: int) -> int:
        self.asked.append(("context", description, device, flags))
        return write(context, CONTEXT)

    def _cuGreenCtxStreamCreate(self, stream: int, context: int, flags: int, priority: int) -> int:
        self.asked.append(("stream", context, flags, priority))
        return write(stream, STREAM)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(green_context, "_open_library", lambda: fake)
    return fake


def test_a_stream_gets_the_sms_that_were_asked_for(cuda: FakeCuda) -> None:
    assert green_context.stream_on(32, 1) == STREAM
    sm_resource, default_stream, non_blocking = 1, 1, 1
    assert cuda.asked == [
        ("device", 1, sm_resource),
        ("split", None, 0, 32),
        ("description", 32, 1),
        ("context", DESCRIPTION, 1, default_stream),
        ("stream", CONTEXT, non_blocking, 0),
    ]


def test_the_structure_is_that_of_the_driver() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    theirs = bindings.CUdevResource()
    theirs.type = bindings.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    theirs.sm.smCount = 77
    ours = green_context.Resource.from_address(theirs.getPtr())
    assert (ours.type, ours.sm_count) == (green_context._RESOURCE_TYPE_SM, 77)
    assert ctypes.sizeof(ours) == FakeCuda.RESOURCE_BYTES


@pytest.mark.parametrize(("sms", "message"), [(30, "gives 32 SMs where 30"), (140, "140 SMs of a GPU that has 132")])
def test_sms_that_cannot_be_had_are_refused(cuda: FakeCuda, sms: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        green_context.stream_on(sms, 0)
    assert not [name for name, *_ in cuda.asked if name == "context"]


def test_an_old_driver_is_named(cuda: FakeCuda) -> None:
    del cuda.cuGreenCtxStreamCreate
    with pytest.raises(UnsupportedError, match="no cuGreenCtxStreamCreate"):
        green_context.stream_on(32, 0)


def test_a_call_that_fails_is_named(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    monkeypatch.setattr(cuda, "cuGreenCtxCreate", failing(lambda *arguments: INVALID_VALUE))
    with pytest.raises(EtapError, match="cuGreenCtxCreate failed: CUDA error 1"):
        green_context.stream_on(32, 0)
