"""From a kernel spec to a function on the GPU: CUDA source -> NVRTC -> cubin -> disk cache -> loaded module.

NVRTC needs neither a GPU nor a driver, so everything but `load` works on any machine.

The disk cache is a flat directory. A kernel has two files in it, both written to a temporary name and renamed
into place, so readers and racing writers only ever see whole files:

    <key>.json               what was compiled, NVRTC's log and the name of the cubin, under a checksum
    <entry>-<sha256>.cubin   the machine code, named by its own content

The key covers everything that decides the machine code: the source with every header it includes, the
options, the architecture and NVRTC's version.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import secrets
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_rt import driver
from etap_rt.errors import CompileError, EtapError, UnsupportedError
from etap_rt.kernels import KernelSpec

if TYPE_CHECKING:
    from importlib.abc import Traversable

ARCH = "sm_90a"
COMPUTE_CAPABILITY = (9, 0)
OLDEST_NVRTC = (12, 3)
CACHE_VARIABLE = "ETAP_RT_CACHE_DIR"
_CACHE_FORMAT = 1  # part of every key: raise it when the files' layout or meaning changes

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_CACHE_FILE = re.compile(r"[0-9a-f]{64}\.json|\w+-[0-9a-f]{64}\.cubin|\.tmp-[0-9a-f]{16}")


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
class CacheEntry:
    """A kernel in the disk cache."""

    spec: str
    arch: str
    path: Path  # of the cubin
    size_bytes: int
    seconds: float  # that NVRTC took


_compiled: dict[str, Compiled] = {}  # by key
_compiling: dict[str, threading.Lock] = {}  # by key
_loaded: dict[tuple[KernelSpec, int], driver.Kernel] = {}
_loading = threading.Lock()
_opening_nvrtc = threading.Lock()
_warned = False


def load(spec: KernelSpec, device: int) -> driver.Kernel:
    """The kernel on CUDA device `device`, compiled and loaded by the first call.

    Raises UnsupportedError when the GPU is not a Hopper, CompileError when the source is refused.
    """
    kernel = _loaded.get((spec, device))
    if kernel is None:
        with _loading:
            kernel = _loaded.get((spec, device))
            if kernel is None:
                require_hopper(device)
                kernel = driver.load_kernel(compile_spec(spec).cubin, spec.entry, device)
                _loaded[spec, device] = kernel
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


def cache_directory() -> Path | None:
    """Where compiled kernels are kept: ETAP_RT_CACHE_DIR if set, else in the user's cache directory.

    It need not exist yet. None when the user has no such directory (no home, for one).
    """
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured).expanduser().absolute()
    import platformdirs

    directory = platformdirs.user_cache_path("etap_rt", appauthor=False)
    return directory if directory.is_absolute() else None


def cache_entries() -> list[CacheEntry]:
    """The kernels in the disk cache that are whole, sorted by name."""
    entries = []
    for path in _cache_files():
        record = _read_record(path) if path.suffix == ".json" else None
        cubin = _read_cubin(path.parent, record) if record else None
        if record and cubin is not None:
            entries.append(
                CacheEntry(record["spec"], record["arch"], path.parent / record["cubin"], len(cubin), record["seconds"])
            )
    return sorted(entries, key=lambda entry: (entry.spec, entry.arch, entry.path.name))


def clear_cache() -> int:
    """Delete every file of the disk cache, broken ones included and others left alone. Returns how many."""
    files = list(_cache_files())
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def _nvrtc() -> Any:
    """CuPy's binding of NVRTC."""
    needed = "CuPy and NVRTC, from pip install 'etap-rt[cuda13]' or 'etap-rt[cuda12]'"
    try:
        with _opening_nvrtc:  # two threads that do this at once can leave CuPy without a part of NVRTC
            from cupy.cuda import nvrtc

            version = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"kernels cannot be compiled here ({error})", needed) from error
    if version < OLDEST_NVRTC:
        raise UnsupportedError(
            f"NVRTC {'.'.join(map(str, version))} cannot compile the kernels", f"NVRTC 12.3 or newer: {needed}"
        )
    return nvrtc


def _job(spec: KernelSpec, arch: str) -> _Job:
    defines = (f"-D{name}={value}" for name, value in spec.defines)
    # Line numbers, for profilers, change nothing in the machine code.
    options = (f"-arch={arch}", "-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v", *defines)
    source, headers = _read_sources(source_directory(), spec.source)
    return _Job(_key(spec, options, nvrtc_version(), source, headers), spec, arch, options, source, headers)


def _read_sources(directory: Traversable, name: str) -> tuple[bytes, dict[str, bytes]]:
    """A source file, and every header of ours that it includes, directly or not, by name.

    NVRTC gets the headers from memory, so that the package may lie in a zip file. It knows each by the words of
    the #include alone, which therefore always give the path from the top of `directory`. Other headers are left
    for NVRTC to know or to complain about.
    """
    source = (directory / name).read_bytes()
    headers: dict[str, bytes] = {}
    pending = [source]
    while pending:
        for include in (match.decode() for match in _INCLUDE.findall(pending.pop())):
            if include not in headers and (directory / include).is_file():
                headers[include] = (directory / include).read_bytes()
                pending.append(headers[include])
    return source, headers


def _key(
    spec: KernelSpec, options: tuple[str, ...], version: tuple[int, int], source: bytes, headers: dict[str, bytes]
) -> str:
    """The cache key. Lengths go in before contents, so that no two inputs run together to the same bytes."""
    parts = [repr((_CACHE_FORMAT, spec.source, spec.entry, options, tuple(version))).encode(), source]
    for include, text in sorted(headers.items()):
        parts += [include.encode(), text]
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
    program = nvrtc.createProgram(job.source.decode(), job.spec.source, tuple(job.headers.values()), names)
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
    """The kernel from disk; None when it is not there, cut off or changed since it was written."""
    directory = cache_directory()
    record = _read_record(directory / f"{job.key}.json") if directory else None
    cubin = _read_cubin(directory, record) if directory and record else None
    if directory is None or record is None or cubin is None:
        return None
    wgmma = tuple((shape, count) for shape, count in record["wgmma"])
    path = directory / record["cubin"]
    return Compiled(job.spec, job.arch, cubin, path, record["log"], wgmma, record["seconds"], from_cache=True)


def _write_entry(key: str, compiled: Compiled) -> Path | None:
    """Keep the kernel on disk and return the cubin's path; None, after a warning, if that is not possible."""
    directory = cache_directory()
    if directory is None:
        _warn_once("there is no user cache directory")
        return None
    sha256 = hashlib.sha256(compiled.cubin).hexdigest()
    path = directory / f"{compiled.spec.entry}-{sha256}.cubin"
    record = {
        "spec": str(compiled.spec),
        "arch": compiled.arch,
        "cubin": path.name,
        "sha256": sha256,
        "wgmma": compiled.wgmma,
        "seconds": compiled.seconds,
        "log": compiled.log,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_file(path, compiled.cubin)
        _write_file(directory / f"{key}.json", json.dumps({"checksum": _checksum(record), "record": record}).encode())
    except OSError as error:
        _warn_once(str(error))
        return None
    return path


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        record: dict[str, Any] = content["record"]
        return record if content["checksum"] == _checksum(record) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_cubin(directory: Path, record: dict[str, Any]) -> bytes | None:
    try:
        cubin = (directory / record["cubin"]).read_bytes()
    except OSError:
        return None
    return cubin if hashlib.sha256(cubin).hexdigest() == record["sha256"] else None


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _cache_files() -> Iterator[Path]:
    directory = cache_directory()
    if directory and directory.is_dir():
        yield from (path for path in directory.iterdir() if _CACHE_FILE.fullmatch(path.name))


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled kernels cannot be kept on disk ({reason}), so each process compiles them anew; "
            f"set {CACHE_VARIABLE} to a directory that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
