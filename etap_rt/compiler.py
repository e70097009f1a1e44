"""From a kernel spec to a function on the GPU: CUDA source -> NVRTC -> cubin -> disk cache -> loaded module.

NVRTC needs neither a GPU nor a driver, so everything but `load` works on any machine.

Machine code is kept on disk (disk_cache.py) under a key that covers everything that decides it: the source with
every header it includes, the options, the architecture and NVRTC's version.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_rt import disk_cache, driver
from etap_rt.disk_cache import CACHE_VARIABLE as CACHE_VARIABLE  # the cache's own names, for users of the compiler
from etap_rt.disk_cache import CacheEntry as CacheEntry
from etap_rt.disk_cache import cache_directory as cache_directory
from etap_rt.disk_cache import cache_entries as cache_entries
from etap_rt.disk_cache import cache_problem as cache_problem
from etap_rt.disk_cache import clear_cache as clear_cache
from etap_rt.errors import ArgumentError, ArgumentTypeError, CompileError, EtapError, UnsupportedError
from etap_rt.interop import CUPY_WANTED
from etap_rt.kernels import KernelSpec

if TYPE_CHECKING:
    from importlib.abc import Traversable

ARCH = "sm_90a"
COMPUTE_CAPABILITY = (9, 0)
OLDEST_NVRTC = (12, 3)
# From here on NVRTC keeps what it compiles in the driver's cache, where there is a driver, and gives machine code
# without what ptxas has to say about it (NVRTC manual, "Caching").
NVRTC_WITH_CACHE = (12, 9)
_CACHE_FORMAT = 2  # part of every key: raise it when the files' layout or meaning changes

SOURCE_SUFFIXES = (".cu", ".cuh", ".h", ".hpp")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code of one kernel."""

    spec: KernelSpec
    arch: str
    cubin: bytes = field(repr=False)
    path: Path | None  # of the cubin in the disk cache, None when there is no place to keep it
    log: str = field(repr=False)  # NVRTC's program log, with what ptxas reports
    wgmma: tuple[tuple[str, int], ...]  # tensor core instructions in the PTX, by shape: (("m64n16k16", 68),)
    seconds: float  # that NVRTC took, when it was compiled
    from_cache: bool  # read from disk, not compiled by this process


@dataclass(frozen=True, slots=True)
class Report:
    """What ptxas says about a kernel. Sizes are bytes: stack and spills of a thread, shared memory of a CTA."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int  # static shared memory
    serialized_wgmma: bool  # ptxas could not keep wgmma asynchronous
    wgmma: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that decides the machine code of a kernel."""

    key: str  # of the disk cache
    spec: KernelSpec
    arch: str
    options: tuple[str, ...]
    source: bytes
    headers: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class _Replacements:
    """Sources that stand in for shipped ones, as they were when `kernel_sources` was entered."""

    directory: Path
    sha256: str  # of all files
    files: dict[str, bytes] = field(repr=False, compare=False)  # by path from the top of the directory


_compiled: dict[str, Compiled] = {}  # by key
_compiling: dict[str, threading.Lock] = {}  # by key
_loaded: dict[tuple[KernelSpec, int, Hashable], driver.Kernel] = {}
_loading = threading.Lock()
_opening_nvrtc = threading.Lock()
_replacements: ContextVar[_Replacements | None] = ContextVar("etap_rt.kernel_sources", default=None)

# What tells apart kernels of one spec: None outside of `kernel_sources`, within it the directory and its contents.
# Belongs into the key of whatever remembers a kernel. It is the getter itself, because it is on the path of every call.
source_key: Callable[[], Hashable] = _replacements.get


@contextmanager
def kernel_sources(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Within, kernels are compiled from CUDA sources of your own, to try out a change without touching the package.

    Args:
        directory: laid out as the package's `cuda_src`. A file in it (.cu, .cuh, .h, .hpp) replaces the shipped one of
            the same relative path, or is new, for the others to include by that path; everything else comes from the
            shipped sources. Files are read on entering: edits count from the next `with` on.

    Kernels are kept in memory and in the disk cache as shipped ones are, each under the contents it was made of. The
    compiler's messages and profilers name your files and lines. It holds for the calls of this thread (or asyncio
    task) between entering and leaving; where two are nested, the inner one counts alone. A CUDA graph replays the
    kernels that it was captured with.

    Raises ArgumentTypeError if `directory` is no path, ArgumentError if it is no directory or replaces nothing. A
    source that does not compile raises CompileError with the log, from the call that needs the kernel.
    """
    token = _replacements.set(_read_replacements(directory))
    try:
        yield
    finally:
        _replacements.reset(token)


def load(spec: KernelSpec, device: int) -> driver.Kernel:
    """The kernel on CUDA device `device`, compiled and loaded by the first call.

    Raises UnsupportedError when the GPU is not a Hopper, CompileError when the source is refused.
    """
    key = (spec, device, source_key())
    kernel = _loaded.get(key)
    if kernel is None:
        with _loading:
            kernel = _loaded.get(key)
            if kernel is None:
                require_hopper(device)
                kernel = driver.load_kernel(compile_spec(spec).cubin, spec.entry, device)
                _loaded[key] = kernel
    return kernel


def compile_spec(spec: KernelSpec, arch: str = ARCH) -> Compiled:
    """Machine code for `spec`: from memory, else from the disk cache, else from NVRTC.

    Raises CompileError with NVRTC's log, or UnsupportedError when NVRTC is missing or too old.
    """
    job = _job(spec, arch)
    with _compiling.setdefault(job.key, threading.Lock()):
        return _find(job) or _keep(job, _compile(job))


def compile_specs(
    specs: Sequence[KernelSpec], arch: str = ARCH, finished: Callable[[Compiled], None] = lambda compiled: None
) -> list[Compiled]:
    """compile_spec of many. `finished` is told of each, in the order in which they are done.

    NVRTC compiles one kernel at a time in a process, so this starts others if there is more than one to compile. As
    always with multiprocessing, a script that calls this does so under `if __name__ == "__main__"`.
    """
    jobs = [_job(spec, arch) for spec in specs]
    missing = []
    for job in jobs:
        compiled = _find(job)
        if compiled is None:
            missing.append(job)
        else:
            finished(compiled)
    if len(missing) == 1:
        finished(_keep(missing[0], _compile(missing[0])))
    elif missing:
        workers = min(len(missing), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(_compile, job): job for job in missing}
            try:
                for future in as_completed(running):
                    finished(_keep(running[future], future.result()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                # Several may have failed: the first in the order of the specs speaks for them, whoever was faster.
                for future in running:
                    if not future.cancelled():
                        future.result()
                raise
    return [_compiled[job.key] for job in jobs]


def build_report(compiled: Compiled) -> Report:
    """What ptxas wrote about the kernel in the log."""
    _, _, log = compiled.log.partition(f"Compiling entry function '{compiled.spec.entry}'")
    log, _, _ = log.partition("Compiling entry function")
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = re.search(r"(\d+) bytes smem", log)
    if registers is None or frame is None:
        raise EtapError(f"no report on {compiled.spec} in the compiler's log:\n{compiled.log}")
    stack, spill_stores, spill_loads = map(int, frame.groups())
    return Report(
        registers=int(registers[1]),
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        stack=stack,
        shared=int(shared[1]) if shared else 0,
        serialized_wgmma="wgmma.mma_async instructions are serialized" in compiled.log,
        wgmma=compiled.wgmma,
    )


def source_directory() -> Traversable:
    """Where the CUDA sources are: inside of the installed package, or beside the package in a checkout."""
    package = resources.files("etap_rt")
    installed = package / "cuda_src"
    return installed if installed.is_dir() else Path(str(package)).parent / "cuda_src"


def require_hopper(device: int) -> None:
    """Raise UnsupportedError, with what is needed, unless CUDA device `device` can run the kernels."""
    major, minor = driver.compute_capability(device)
    if (major, minor) != COMPUTE_CAPABILITY:
        raise UnsupportedError(
            f"CUDA device {device}, {driver.device_name(device)}, has compute capability {major}.{minor}",
            "a Hopper GPU (compute capability 9.0), such as H100, H200, H20, H800 or GH200",
        )


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use. Raises UnsupportedError when there is none, or it is too old."""
    major, minor = _nvrtc().getVersion()
    return major, minor


def _nvrtc() -> Any:
    """CuPy's binding of NVRTC."""
    try:
        with _opening_nvrtc:  # two threads that do this at once can leave CuPy without a part of NVRTC
            from cupy.cuda import nvrtc

            version = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"kernels cannot be compiled here ({error})", CUPY_WANTED) from error
    if version < OLDEST_NVRTC:
        raise UnsupportedError(
            f"NVRTC {'.'.join(map(str, version))} cannot compile the kernels", f"NVRTC 12.3 or newer: {CUPY_WANTED}"
        )
    return nvrtc


def _job(spec: KernelSpec, arch: str) -> _Job:
    defines = (f"-D{name}={value}" for name, value in spec.defines)
    # Line numbers, for profilers, change nothing in the machine code.
    options = (f"-arch={arch}", "-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v", *defines)
    version = nvrtc_version()
    if version >= NVRTC_WITH_CACHE:
        options += ("--no-cache",)
    source, headers = _read_sources(spec.source)
    return _Job(_key(spec, options, version, source, headers), spec, arch, options, source, headers)


def _read_sources(name: str) -> tuple[bytes, dict[str, bytes]]:
    """A source file, and every header of ours that it includes, directly or not, by name.

    NVRTC gets the headers from memory, so that the package may lie in a zip file. It knows each by the words of
    the #include alone, which therefore always give the path from the top of the directory. Other headers are left
    for NVRTC to know or to complain about.
    """
    source = _read_source(name)
    if source is None:
        raise EtapError(f"there is no {name} in {source_directory()}")
    headers: dict[str, bytes] = {}
    pending = [source]
    while pending:
        for include in (match.decode(errors="replace") for match in _INCLUDE.findall(pending.pop())):
            if include not in headers and (header := _read_source(include)) is not None:
                headers[include] = header
                pending.append(header)
    return source, headers


def _read_source(name: str) -> bytes | None:
    """A source or header by its path from the top; None when there is no such file of ours."""
    replacements = _replacements.get()
    if replacements is not None and name in replacements.files:
        # With the file's own name in place of `name`, messages and line tables lead to it.
        path = json.dumps(str(replacements.directory / name), ensure_ascii=False)
        return f"#line 1 {path}\n".encode() + replacements.files[name]
    shipped = source_directory() / name
    return shipped.read_bytes() if shipped.is_file() else None


def _read_replacements(directory: str | os.PathLike[str]) -> _Replacements:
    try:
        top = Path(directory).absolute()
    except TypeError as error:
        raise ArgumentTypeError("directory", repr(directory), "a path") from error
    if not top.is_dir():
        raise ArgumentError("directory", str(top), "a directory that exists")
    paths = sorted(path for path in top.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file())
    files = {path.relative_to(top).as_posix(): path.read_bytes() for path in paths}
    shipped = source_directory()
    if not any((shipped / name).is_file() for name in files):
        given = f"{top}, with {', '.join(files) or 'no sources'}"
        raise ArgumentError("directory", given, f"one with a file named as one of the sources in {shipped}")
    return _Replacements(top, _digest(part for name, text in files.items() for part in (name.encode(), text)), files)


def _key(
    spec: KernelSpec, options: tuple[str, ...], version: tuple[int, int], source: bytes, headers: dict[str, bytes]
) -> str:
    """The cache key."""
    parts = [repr((_CACHE_FORMAT, spec.source, spec.entry, options, tuple(version))).encode(), source]
    for include, text in sorted(headers.items()):
        parts += [include.encode(), text]
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    """SHA-256. Lengths go in before contents, so that no two lists of parts run together to the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _find(job: _Job) -> Compiled | None:
    """The kernel from memory, else from the disk cache."""
    compiled = _compiled.get(job.key) or _read_entry(job)
    if compiled is not None:
        _compiled[job.key] = compiled
    return compiled


def _keep(job: _Job, compiled: Compiled) -> Compiled:
    """Put a newly compiled kernel into the disk cache and into memory."""
    compiled = replace(compiled, path=_write_entry(job.key, compiled))
    _compiled[job.key] = compiled
    return compiled


def _compile(job: _Job) -> Compiled:
    nvrtc = _nvrtc()
    start = time.perf_counter()
    names = tuple(name.encode() for name in job.headers)
    program = nvrtc.createProgram(
        job.source.decode(errors="replace"), job.spec.source, tuple(job.headers.values()), names
    )
    try:
        try:
            nvrtc.compileProgram(program, job.options)
        except nvrtc.NVRTCError as error:
            raise CompileError(job.spec, job.options, nvrtc.getProgramLog(program) or str(error)) from error
        # CuPy takes the last byte for the end of a string and drops it. It belongs to the ELF file's program
        # headers, as the highest byte of a small number. A byte too many would do no harm.
        cubin = nvrtc.getCUBIN(program) + b"\0"
        ptx, log = nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    seconds = round(time.perf_counter() - start, 3)
    return Compiled(job.spec, job.arch, cubin, None, log, _count_wgmma(ptx), seconds, from_cache=False)


def _count_wgmma(ptx: bytes) -> tuple[tuple[str, int], ...]:
    counts = Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx.decode()))
    return tuple(sorted(counts.items()))


def _read_entry(job: _Job) -> Compiled | None:
    """The kernel from disk."""
    found = disk_cache.find(job.key)
    if found is None:
        return None
    record = found.record
    wgmma = tuple((shape, count) for shape, count in record["wgmma"])
    return Compiled(
        job.spec, job.arch, found.cubin, found.path, record["log"], wgmma, record["seconds"], from_cache=True
    )


def _write_entry(key: str, compiled: Compiled) -> Path | None:
    """Keep the kernel on disk and return the cubin's path, if that is possible."""
    record = {
        "spec": str(compiled.spec),
        "arch": compiled.arch,
        "wgmma": compiled.wgmma,
        "seconds": compiled.seconds,
        "log": compiled.log,
    }
    return disk_cache.store(key, compiled.spec.entry, compiled.cubin, record)
