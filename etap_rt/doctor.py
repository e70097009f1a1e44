"""What works on this machine and what is missing, one finding a line: all that one asks for when something fails."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from etap_rt import compiler, demo, driver
from etap_rt.errors import EtapError, UnsupportedError
from etap_rt.interop import describe, to_host
from etap_rt.kernels import decode_spec

# Lengths of the requests that are decoded as a trial: tiles full and not, and enough of them to need merging.
TRIAL_LENGTHS = (1, 63, 64, 65, 500, 3000)
SELF_TEST_SECONDS = 2.0
# What decides which libraries, GPUs and directories are used; its values say much when something is odd.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
MODULE_VERSION = Path("/proc/driver/nvidia/version")
MAPPED_FILES = Path("/proc/self/maps")
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. Decode on the GPU works when nothing `required` is "missing"."""

    name: str
    state: Literal["ok", "missing", "note"]
    text: str
    required: bool = True


def examine(step: demo.Step) -> list[Finding]:
    """Look at everything that decode on the GPU needs. `step` is told what comes next."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("CuPy", _cupy),
        ("NVRTC", _nvrtc),
        ("compile", _compile),
        ("driver", _driver),
        ("GPU", _gpu),
    ]
    findings = [_python()]
    for name, look in looks:
        step(name)
        findings.append(_finding(name, look))
    if all(finding.state == "ok" for finding in findings):
        step("decode")
        findings.append(_finding("decode", _decode))
    else:
        findings.append(Finding("decode", "missing", "not tried on the GPU: something above is missing"))
    return [*findings, _cache(), _torch(), _environment()]


def gpu_works(findings: list[Finding]) -> bool:
    """Whether decode on the GPU is possible, by the findings of `examine`."""
    return all(finding.state == "ok" for finding in findings if finding.required)


def _finding(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except EtapError as error:
        return Finding(name, "missing", str(error).partition("\n")[0])  # without the log of a CompileError
    except Exception as error:  # whatever a broken installation may raise; to find that is what this is for
        return Finding(name, "missing", f"{type(error).__name__}: {error}")


def _python() -> Finding:
    packages = [_version(name) for name in ("etap-rt", "numpy", "ml_dtypes")]
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    return Finding("Python", "ok", ", ".join([machine, *packages]))


def _cupy() -> str:
    """CuPy's packages exclude each other: with two of them, each has overwritten files of the other."""
    installed = sorted({name for name in _package_names() if re.fullmatch(r"cupy(-cuda\d+x|-rocm-.*)?", name)})
    if len(installed) > 1:
        raise UnsupportedError(
            f"{' and '.join(installed)} are installed over each other",
            f"pip uninstall {' '.join(installed)}; {_install()}",
        )
    try:
        import cupy
    except Exception as error:  # a broken installation has exceptions of its own
        raise UnsupportedError(f"CuPy cannot be imported ({type(error).__name__}: {error})", _install()) from error
    runtime = driver.format_version(cupy.cuda.get_local_runtime_version())
    return f"{cupy.__version__} ({', '.join(installed) or 'not installed as a package'}), CUDA runtime {runtime}"


def _nvrtc() -> str:
    major, minor = compiler.nvrtc_version()
    return f"{major}.{minor}, {_mapped('libnvrtc.so') or 'where from is not known'}"


def _compile() -> str:
    """Compile the kernel of the commonest case, 16 query rows a request, or read it from the cache."""
    compiled = compiler.compile_spec(decode_spec("bfloat16", demo.LATENT_DIM, demo.ROPE_DIM, demo.HEADS))
    report = compiler.build_report(compiled)
    origin = "read from the disk cache" if compiled.from_cache else f"compiled in {compiled.seconds:.1f} s"
    return f"{compiled.spec} {origin}: {report.registers} registers, {report.spill_stores} bytes spilled"


def _driver() -> str:
    version = driver.driver_version()
    try:
        built_for, _ = compiler.nvrtc_version()
    except UnsupportedError:
        built_for = 0  # reported by another line
    if version // 1000 < built_for:
        raise UnsupportedError(
            f"the driver is for CUDA {driver.format_version(version)}, the compiler for CUDA {built_for}",
            f"a driver for CUDA {built_for}, or {_install(version)}",
        )
    library = _mapped("libcuda.so")
    return ", ".join(filter(None, (_module_version(), f"for CUDA {driver.format_version(version)} and older", library)))


def _module_version() -> str:
    """The version of the driver's kernel module, such as 580.95.05; empty if it does not say."""
    try:
        version = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", MODULE_VERSION.read_text())
    except OSError:
        return ""
    return version[1] if version else ""


def _gpu() -> str:
    """Name every GPU; the first one must be a Hopper, since that is where arrays are made by default."""
    count = driver.device_count()
    if count == 0:
        raise UnsupportedError("no GPU is visible", "a GPU, and no CUDA_VISIBLE_DEVICES that hides it")
    compiler.require_hopper(0)
    return ", ".join(f"{i}: {driver.device_name(i)}, {driver.sm_count(i)} SMs{_memory(i)}" for i in range(count))


def _memory(device: int) -> str:
    """How much of a GPU's memory is free, with a comma before it; empty if that cannot be asked."""
    try:
        import cupy

        free, total = cupy.cuda.Device(device).mem_info
    except Exception:  # what keeps CuPy from working is reported by another line
        return ""
    return f", {free / GIB:.0f} of {total / GIB:.0f} GiB free"


def _decode() -> str:
    """The self-test: a trial against float64, then the same again and again, which must give the same bits."""
    until = time.monotonic() + SELF_TEST_SECONDS
    library = demo.gpu_library()
    problem = demo.make_problem(TRIAL_LENGTHS)
    trial = demo.prepare(problem, library)
    out, lse = trial.decode(return_lse=True)
    accuracy = demo.compare(problem, out, lse)
    if not accuracy.accepted:
        raise EtapError(f"wrong result: {accuracy}")
    first, repeats = to_host(describe(out, "out")).tobytes(), 0
    while time.monotonic() < until:
        again = trial.decode()
        repeats += 1
        if to_host(describe(again, "out")).tobytes() != first:
            raise EtapError(f"call {repeats} gave another result than the first")
    error = f"{accuracy.error:.1e} of the output's size away from float64"
    return f"{error}, the same bits {repeats} times, with arrays of {library}"


def _cache() -> Finding:
    problem = compiler.cache_problem()
    if problem:
        return Finding("cache", "note", f"{problem}; set {compiler.CACHE_VARIABLE}", required=False)
    directory = compiler.cache_directory()
    if directory is None:
        return Finding("cache", "note", f"no place for compiled kernels; set {compiler.CACHE_VARIABLE}", required=False)
    entries = compiler.cache_entries()
    size = sum(entry.size_bytes for entry in entries) / MIB
    return Finding("cache", "ok", f"{directory}, {len(entries)} kernels, {size:.1f} MiB", required=False)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken installation has exceptions of its own
        return Finding("torch", "note", f"cannot be imported ({error}); only its users need it", required=False)
    if not torch.version.cuda:
        return Finding("torch", "note", f"{torch.__version__}, for the CPU only", required=False)
    text = f"{torch.__version__}, for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return Finding("torch", "note", f"{text}, but it sees no GPU", required=False)
    return Finding("torch", "ok", text, required=False)


def _environment() -> Finding:
    """The variables that are set and matter; ours are all that begin with ETAP_RT_."""
    names = [name for name in (*VARIABLES, *sorted(os.environ)) if name in VARIABLES or name.startswith("ETAP_RT_")]
    found = [f"{name}={os.environ[name]}" for name in dict.fromkeys(names) if name in os.environ]
    return Finding("environment", "ok", ", ".join(found) or "nothing set that matters", required=False)


def _install(driver_version: int = 0) -> str:
    """What to install for a driver of `driver_version`, asked for when it is 0."""
    if not driver_version:
        try:
            driver_version = driver.driver_version()
        except EtapError:
            return "pip install 'etap-rt[cuda13]', or [cuda12] with a driver for CUDA 12"
    return f"pip install 'etap-rt[cuda{12 if driver_version // 1000 <= 12 else 13}]'"


def _mapped(library: str) -> str:
    """The file that a shared library of this process was loaded from; empty if that cannot be seen."""
    try:
        lines = MAPPED_FILES.read_text().splitlines()
    except OSError:
        return ""
    paths = {line.split(maxsplit=5)[5] for line in lines if f"/{library}" in line}
    return ", ".join(sorted(paths))


def _package_names() -> list[str]:
    return [package.metadata["Name"].lower().replace("_", "-") for package in metadata.distributions()]


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return f"{package} (not installed)"
