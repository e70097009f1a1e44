"""What works on this machine and what is missing, one finding a line."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from etap_rt import compiler, demo, driver
from etap_rt.errors import EtapError, UnsupportedError
from etap_rt.kernels import decode_spec

# Lengths of the requests that are decoded as a trial: tiles full and not, and enough of them to need merging.
TRIAL_LENGTHS = (1, 63, 64, 65, 500, 3000)


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
    return [*findings, _cache(), _torch()]


def gpu_works(findings: list[Finding]) -> bool:
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
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", "ok", ", ".join([machine, *packages]))


def _nvrtc() -> str:
    major, minor = compiler.nvrtc_version()
    import cupy

    return f"{major}.{minor}, through CuPy {cupy.__version__}"


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
            f"a driver for CUDA {built_for}, or the packages of pip install 'etap-rt[cuda{version // 1000}]'",
        )
    return f"for CUDA {driver.format_version(version)} and older"


def _gpu() -> str:
    """Name every GPU; the first one must be a Hopper, since that is where arrays are made by default."""
    count = driver.device_count()
    if count == 0:
        raise UnsupportedError("no GPU is visible", "a GPU, and no CUDA_VISIBLE_DEVICES that hides it")
    compiler.require_hopper(0)
    return ", ".join(f"{i}: {driver.device_name(i)}, {driver.sm_count(i)} SMs" for i in range(count))


def _decode() -> str:
    library = demo.gpu_library()
    problem = demo.make_problem(TRIAL_LENGTHS)
    accuracy = demo.compare(problem, *demo.prepare(problem, library).decode(return_lse=True))
    if not accuracy.accepted:
        raise EtapError(f"wrong result: {accuracy}")
    return f"{accuracy.error:.1e} of the output's size away from float64, with arrays of {library}"


def _cache() -> Finding:
    directory = compiler.cache_directory()
    if directory is None:
        return Finding("cache", "note", f"no place for compiled kernels; set {compiler.CACHE_VARIABLE}", required=False)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        text = f"{directory} cannot be written; set {compiler.CACHE_VARIABLE}"
        return Finding("cache", "note", text, required=False)
    return Finding("cache", "ok", f"{directory}, {len(compiler.cache_entries())} kernels", required=False)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken installation has exceptions of its own
        return Finding("torch", "note", f"cannot be imported ({error}); only its users need it", required=False)
    with_cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    return Finding("torch", "ok" if torch.version.cuda else "note", f"{torch.__version__}, {with_cuda}", required=False)


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return f"{package} (not installed)"
