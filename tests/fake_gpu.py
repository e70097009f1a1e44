"""A GPU that only takes notes: CPU tensors of torch pass for tensors on it, and nothing is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from etap_rt import arguments, interop
from etap_rt.interop import Array, Layout

torch: Any = pytest.importorskip("torch")

STREAM = 0x5EA


class Notes:
    """A kernel that notes its launches: (grid, block, shared bytes, stream), and copies of the parameter."""

    def __init__(self, params_type: type[ctypes.Structure]) -> None:
        self.params_type = params_type
        self.specs: list[Any] = []  # of the kernels that were asked for
        self.launches: list[tuple[int, int, int, int]] = []
        self.params: list[Any] = []
        self.early = 0  # launches that may overlap the one before

    def load(self, spec: Any, device: int) -> Notes:
        """In place of `compiler.load`."""
        self.specs.append(spec)
        return self

    def launch(self, grid: int, block: int, shared_bytes: int, stream: int, params_address: int) -> None:
        self.launches.append((grid, block, shared_bytes, stream))
        size = ctypes.sizeof(self.params_type)
        self.params.append(self.params_type.from_buffer_copy(ctypes.string_at(params_address, size)))

    def prepare(
        self, grid: int, block: int, shared_bytes: int, params_address: int, early: bool = False
    ) -> Callable[[int], None]:
        def launch_on(stream: int) -> None:
            self.early += early
            self.launch(grid, block, shared_bytes, stream, params_address)

        return launch_on


class CudaTensor:
    """A CPU tensor that says of itself what a tensor on CUDA device 0 would."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:  # shape, stride, dtype, data_ptr
        return getattr(self.tensor, name)

    def get_device(self) -> int:
        return 0

    def new_empty(self, *arguments: Any, **options: Any) -> CudaTensor:
        return CudaTensor(self.tensor.new_empty(*arguments, **options))


class CudaTensorGuard:
    """torch's guard over tensors of which all say that they are on CUDA device 0."""

    def __init__(self, *tensors: Any, **layouts: Any) -> None:
        plain = self._plain(tensors)
        if plain is None:
            raise TypeError("not all are tensors on the GPU")
        self._guard = torch._C._dynamo.guards.TensorGuards(*plain, **layouts)

    def check(self, *tensors: Any) -> bool:
        plain = self._plain(tensors)
        return plain is not None and self._guard.check(*plain)

    @staticmethod
    def _plain(tensors: tuple[Any, ...]) -> list[Any] | None:
        if not all(type(x) is CudaTensor and x.is_cuda and x.get_device() == 0 for x in tensors):
            return None
        return [x.tensor for x in tensors]


def pass_tensors_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, CPU tensors of torch are read as if they were on CUDA device 0, with STREAM current."""
    layouts: dict[Layout, Layout] = {}

    def read_as_cuda(x: Any, name: str) -> Array:
        array = interop._read_torch(x, name)
        layout = layouts.setdefault(array.layout, replace(array.layout, device_type="cuda"))
        return Array(layout, array.pointer, x)

    monkeypatch.setitem(interop._readers, torch.Tensor, read_as_cuda)
    monkeypatch.setitem(interop._readers, CudaTensor, interop._read_torch)
    monkeypatch.setattr(interop, "_tensor_guard", lambda: CudaTensorGuard)
    monkeypatch.setattr(arguments, "_seen", {})
    monkeypatch.setattr(arguments, "_latest", {})
    monkeypatch.setattr(interop, "current_stream", lambda layout: STREAM)
