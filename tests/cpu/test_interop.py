"""Reading arrays of every library without copying them."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from etap_rt import interop
from etap_rt.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from etap_rt.interop import Layout, as_numpy, current_stream, describe, empty, to_host

DTYPES = ("bfloat16", "float16", "float32", "float64", "int32", "int64")


class Producer:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None) -> None:
        self.array = array
        self.device = device or array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_work_on_a_gpu_asks_for_cupy_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    layout = Layout("cupy", "float32", "cuda", 0, (2,), (1,))
    in_memory_of_the_gpu = Producer(np.zeros(2), (2, 0))
    for work in (lambda: current_stream(layout), lambda: empty(layout, None, (2,), "float32")):
        with pytest.raises(UnsupportedError, match=r"^CuPy cannot be imported .*needed: .*'etap-rt\[cuda13\]'"):
            work()
    with pytest.raises(UnsupportedError, match="^CuPy cannot be imported"):
        describe(in_memory_of_the_gpu, "q")


def torch_module() -> Any:
    return pytest.importorskip("torch")


def test_importing_the_package_imports_neither_torch_nor_cupy() -> None:
    program = "import etap_rt.interop, sys; sys.exit(bool({'torch', 'cupy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_are_read_without_a_copy(dtype: str) -> None:
    base = np.zeros((4, 6, 8), interop.numpy_dtype(dtype))
    x = base[1:, ::2, :5]
    array = describe(x, "x")
    assert array.layout.library == "numpy" and array.layout.dtype == dtype
    assert (array.layout.device_type, array.layout.device) == ("cpu", 0)
    assert array.layout.shape == (3, 3, 5) and array.layout.strides == (48, 16, 1)
    assert array.pointer == base.__array_interface__["data"][0] + 48 * base.itemsize
    assert array.owner is x and as_numpy(array) is x


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_are_read_without_a_copy(dtype: str) -> None:
    torch = torch_module()
    base = torch.zeros(4, 6, 8, dtype=getattr(torch, dtype))
    x = base[1:, ::2, :5].transpose(0, 1)
    array = describe(x, "x")
    assert array.layout.library == "torch" and array.layout.dtype == dtype
    assert (array.layout.device_type, array.layout.device) == ("cpu", 0)
    assert array.layout.shape == (3, 3, 5) and array.layout.strides == (16, 48, 1)
    assert type(array.layout.shape) is tuple
    assert array.pointer == x.data_ptr() and array.owner is x

    seen = as_numpy(array)
    assert seen.dtype == interop.numpy_dtype(dtype)
    assert seen.__array_interface__["data"][0] == x.data_ptr()
    assert seen.strides == tuple(stride * seen.itemsize for stride in x.stride())
    seen[2, 1, 3] = 7
    assert x[2, 1, 3] == 7


def test_bfloat16_values_survive_the_way_from_torch_to_numpy() -> None:
    torch = torch_module()
    x = torch.randn(100).to(torch.bfloat16)
    assert np.array_equal(as_numpy(describe(x, "x")).astype(np.float32), x.float().numpy())


def test_parameters_and_tensors_that_require_gradients_are_tensors() -> None:
    torch = torch_module()
    x = torch.nn.Parameter(torch.ones(3))
    array = describe(x, "x")
    assert array.layout is describe(torch.ones(3), "x").layout
    assert as_numpy(array).tolist() == [1, 1, 1]


def test_equal_layouts_are_one_object() -> None:
    torch = torch_module()
    for make in (np.zeros, torch.zeros):
        assert describe(make((2, 3)), "x").layout is describe(make((2, 3)), "y").layout
        assert describe(make((2, 3)), "x").layout is not describe(make((3, 2)), "x").layout


def test_arrays_that_differ_in_one_thing_have_different_layouts() -> None:
    torch = torch_module()
    x = torch.zeros(4, 4)
    arrays = [x, x.t(), x[:2], x.double(), x.int(), x.to("meta"), x.numpy()]
    assert len({describe(array, "x").layout for array in arrays}) == len(arrays)


def test_forgotten_layouts_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "MAX_REMEMBERED", 2)
    monkeypatch.setattr(interop, "_layouts", {})
    for size in range(10):
        assert describe(np.zeros(size), "x").layout.shape == (size,)
        assert len(interop._layouts) <= 2


def test_dlpack_producers_on_the_cpu_are_read_without_a_copy() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)[:, :2]
    array = describe(Producer(x), "x")
    assert array.layout.library == "dlpack" and array.layout.device_type == "cpu"
    assert array.layout.shape == (3, 2) and array.layout.strides == (4, 1)
    assert array.pointer == x.__array_interface__["data"][0]
    assert np.array_equal(as_numpy(array), x)


def test_a_dtype_that_dlpack_cannot_hand_over_is_refused_by_name() -> None:
    torch = torch_module()
    with pytest.raises(ArgumentTypeError, match="x: got .*Producer"):
        describe(Producer(torch.zeros(3, dtype=torch.bfloat16)), "x")


def test_a_dlpack_device_out_of_reach_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"x: got DLPack device \(8, 0\)"):
        describe(Producer(np.zeros(3), device=(8, 0)), "x")


@pytest.mark.parametrize("x", [None, 3, [1.0, 2.0], "text", np.float32(1), SimpleNamespace(shape=(1,))], ids=repr)
def test_what_is_no_array_is_refused_by_name(x: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"kv_cache\[1\]: got .*, accepted is an array"):
        describe(x, "kv_cache[1]")


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "compared"])
def test_a_tensor_that_looks_as_another_is_told_from_all_that_do_not(
    monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    torch = torch_module()
    from tests.fake_gpu import CudaTensor, CudaTensorGuard

    monkeypatch.setattr(interop, "_tensor_guard", lambda: CudaTensorGuard if guarded else None)
    x = torch.zeros(2, 3, dtype=torch.float16)
    on_gpu = interop.Array(describe(x, "x").layout, x.data_ptr(), CudaTensor(x))
    assert interop.tensor_look(on_gpu) is None, "its type is none of torch's"
    monkeypatch.setitem(interop._readers, CudaTensor, interop._read_torch)
    assert interop.tensor_look(describe(x, "x")) is None, "it is on the CPU"
    look = interop.tensor_look(on_gpu)
    assert look is not None

    other = torch.ones_like(x)
    for _ in range(2):
        assert look.address(CudaTensor(other)) == other.data_ptr()
        assert look.address(CudaTensor(other.clone().requires_grad_())), "which torch's guard tells apart"
    for y in (x[:1], x[:, :2], torch.zeros(3, 2, dtype=x.dtype).T, x.bfloat16(), x.to_sparse()):
        assert look.address(CudaTensor(y)) == 0
    for z in (x, x.numpy(), (CudaTensor(x),), None):
        assert look.address(z) == 0
    for name, value in (("get_device", lambda self: 1), ("is_cuda", False)):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(CudaTensor, name, value)
            assert look.address(CudaTensor(x)) == 0


def test_tensors_are_alike_if_all_but_their_addresses_is_the_same() -> None:
    torch = torch_module()
    x, y = torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(4, dtype=torch.int32)
    alike = interop.tensors_alike(x, y)
    assert alike is not None
    assert alike(x, y) and alike(torch.ones_like(x), y[:4])
    for other in (x[:1], x[:, :2], torch.zeros(3, 2, dtype=x.dtype).T, x.real, x.conj(), x.to("meta"), x.to_sparse()):
        assert not alike(other, y)
    for other in (torch.nn.Parameter(x), x.numpy(), (x,), None, 1):
        assert not alike(other, y)
    assert not alike(y, x)


def test_where_torch_has_no_guards_nothing_tells_whether_tensors_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_module()
    x = torch.zeros(2)
    for others in ((x.numpy(),), (x, None)):
        assert interop.tensors_alike(*others) is None, "not all are tensors"
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    interop._tensor_guard.cache_clear()
    try:
        assert interop.tensors_alike(x) is None
    finally:
        interop._tensor_guard.cache_clear()


def test_sparse_tensors_are_refused() -> None:
    torch = torch_module()
    with pytest.raises(ArgumentTypeError, match="x: got torch.Tensor"):
        describe(torch.eye(3).to_sparse(), "x")


def test_strides_that_cut_elements_are_refused() -> None:
    x = np.zeros(8, np.dtype([("a", np.int32), ("b", np.int16)]))["a"]
    with pytest.raises(ArgumentError, match=r"x: got byte strides \(6,\)"):
        describe(x, "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_new_arrays_are_of_the_library_of_the_old(dtype: str) -> None:
    torch = torch_module()
    old = describe(torch.zeros(2), "x")
    new = empty(old.layout, old.owner, (3, 4), dtype)
    assert type(new) is torch.Tensor and new.shape == (3, 4) and new.dtype == getattr(torch, dtype)
    for x in (np.zeros(2), Producer(np.zeros(2))):
        old = describe(x, "x")
        new = empty(old.layout, old.owner, (3, 4), dtype)
        assert type(new) is np.ndarray and new.shape == (3, 4) and new.dtype == interop.numpy_dtype(dtype)


def test_to_host_of_arrays_on_the_cpu_is_the_array() -> None:
    torch = torch_module()
    x = torch.arange(5)
    assert to_host(describe(x, "x")).__array_interface__["data"][0] == x.data_ptr()


# ---- CuPy and torch on a GPU, as far as they can be seen from here ----


def test_cupy_arrays_are_read_without_a_copy() -> None:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(0x1000, 1 << 20, None, device_id=3)
    pointer = cupy.cuda.MemoryPointer(memory, 64)
    x = cupy.ndarray((2, 5), dtype=ml_dtypes.bfloat16, memptr=pointer, strides=(32, 2))
    array = describe(x, "x")
    assert array.pointer == 0x1040 and array.owner is x
    assert array.layout.library == "cupy" and array.layout.dtype == "bfloat16"
    assert (array.layout.device_type, array.layout.device) == ("cuda", 3)
    assert array.layout.shape == (2, 5) and array.layout.strides == (16, 1)


@pytest.mark.parametrize("library", ["cupy", "dlpack"])
def test_the_stream_of_cupy_is_asked_for_on_the_device_of_the_array(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(get_current_stream=lambda device: SimpleNamespace(ptr=0xC00 + device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert current_stream(Layout(library, "float32", "cuda", 2, (1,), (1,))) == 0xC02


@pytest.mark.parametrize("has_private_getter", [True, False])
def test_the_stream_of_torch_is_asked_for_on_the_device_of_the_tensor(
    has_private_getter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch: Any = ModuleType("torch")
    torch._C = SimpleNamespace()
    if has_private_getter:
        torch._C._cuda_getCurrentRawStream = lambda device: 0xA00 + device
    torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=0xA00 + device))
    monkeypatch.setitem(sys.modules, "torch", torch)
    interop._torch_stream.cache_clear()
    try:
        assert current_stream(Layout("torch", "float32", "cuda", 1, (1,), (1,))) == 0xA01
    finally:
        interop._torch_stream.cache_clear()


def test_new_cupy_arrays_are_made_on_the_device_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *error: Any) -> None:
            entered.pop()

    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(Device=Device)
    cupy.empty = lambda shape, dtype: (list(entered), shape, dtype)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for library in ("cupy", "dlpack"):
        layout = Layout(library, "float32", "cuda", 5, (1,), (1,))
        assert empty(layout, None, (2, 3), "bfloat16") == ([5], (2, 3), np.dtype(ml_dtypes.bfloat16))
