"""Run the CPU tests on every Python and with the oldest and newest libraries, and compile all kernels with every NVRTC.

    python tools/matrix.py [--only python|libraries|nvrtc] [--python 3.12 ...] [--nvrtc 12.4 ...] [--tests PATH ...]

Needs no GPU, but uv (pip install uv), which fetches packages and, where it can, interpreters; those of pyenv are used
if it has them. Each cell is an environment of its own under --directory, a temporary one unless given. Prints a table,
writes tests/matrix.json (cells that were not run keep what they said, with the sources they said it of), and ends with
status 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "matrix.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NVRTCS = ("12.3", "12.4", "12.9", "13.0", "newest")
# How versions are chosen, the extras of pyproject.toml and the Python. CuPy asks for a newer NumPy than we do, so the
# oldest NumPy can only be had without it, and without it nothing can be compiled.
WITHOUT_CUPY = "oldest without CuPy"
LIBRARIES = {
    "oldest": ("lowest-direct", ("cuda13", "test"), "3.10"),
    WITHOUT_CUPY: ("lowest-direct", ("test",), "3.10"),
    "newest": ("highest", ("cuda13", "test"), "3.13"),
}
TESTS_WITHOUT_CUPY = [
    f"tests/cpu/test_{name}.py"
    for name in ("arguments", "bad_input", "decode", "interop", "kv_cache", "public_api", "schedule", "states")
]
NEEDS_A_COMPILER = "kernels_build or kernels_compile"  # among those, for pytest's -k
SHOWN_PACKAGES = ("numpy", "cupy-cuda13x", "nvidia-cuda-nvrtc", "torch")
FAILURE_CHARACTERS = 2000


class CellError(Exception):
    """A cell could not be set up; the message says why."""


@dataclass(frozen=True)
class Cell:
    """A row of the table: which part of the matrix, its name there, and what came out."""

    part: str
    name: str
    result: dict[str, Any]

    @property
    def passed(self) -> bool:
        return not self.result.get("error") and not self.result.get("failed")


# ---- Interpreters and libraries ----


def run_tests(
    part: str, name: str, python: str, resolution: str, extras: tuple[str, ...], tests: list[str], options: Any
) -> Cell:
    """Tests in an environment of their own."""
    start = time.monotonic()
    try:
        environment = make_environment(options.directory / f"{part}-{name}".replace(" ", "-"), python)
        install = ["pip", "install", "--quiet", "--python", str(environment), "--resolution", resolution]
        for extra in extras:
            install += ["--extra", extra]
        uv(*install, "-r", str(ROOT / "pyproject.toml"), *options.with_packages)
        result = {**versions(environment), **pytest_outcome(environment, tests)}
    except CellError as error:
        result = {"error": str(error)}
    return Cell(part, name, {**result, "seconds": round(time.monotonic() - start, 1)})


def make_environment(directory: Path, version: str) -> Path:
    """The interpreter of a new virtual environment."""
    uv("venv", "--quiet", "--clear", "--python", find_python(version), str(directory))
    return directory / "bin" / "python"


def find_python(version: str) -> str:
    """An interpreter of that version: pyenv's, else one that uv finds or fetches."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(root.glob(f"versions/{version}.*/bin/python"))
    if found:
        return str(found[-1])
    try:
        return uv("python", "find", version).strip()
    except CellError:
        uv("python", "install", version)
        return uv("python", "find", version).strip()


def versions(python: Path) -> dict[str, Any]:
    """The interpreter's version and those of the packages that matter."""
    script = (
        "import importlib.metadata as m, json, platform; print(json.dumps({'python': platform.python_version(), "
        "'packages': {d.metadata['Name'].lower(): d.version for d in m.distributions()}}))"
    )
    found = json.loads(run([str(python), "-c", script]))
    found["packages"] = {name: v for name, v in sorted(found["packages"].items()) if name in SHOWN_PACKAGES}
    return dict(found)


def pytest_outcome(python: Path, tests: list[str]) -> dict[str, Any]:
    """Run pytest, and count. The checkout comes first on the path of what the tests start."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        if not report.exists():
            raise CellError(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    failed = len({id(case) for case, _ in failures})
    return {
        "tests": tests,
        "passed": len(cases) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "failures": [
            {"test": f"{case.get('classname')}::{case.get('name')}", "text": (child.text or "")[-FAILURE_CHARACTERS:]}
            for case, child in failures
        ],
    }


# ---- NVRTC ----


def run_nvrtc(version: str, options: Any) -> Cell:
    """Compile every kernel with the NVRTC of a wheel, in a process of its own."""
    start = time.monotonic()
    try:
        library = fetch_nvrtc(version, options.directory)
        variables = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}  # where it looks for its second half
        command = [sys.executable, str(Path(__file__).resolve()), "--compile-with", str(library)]
        result = json.loads(run(command, variables))
    except CellError as error:
        result = {"error": str(error)}
    return Cell("nvrtc", version, {**result, "seconds": round(time.monotonic() - start, 1)})


def fetch_nvrtc(version: str, directory: Path) -> Path:
    """libnvrtc of a wheel. The packages of CUDA 12 and 13 have different names."""
    target = directory / f"nvrtc-{version}"
    major = "13" if version == "newest" else version.partition(".")[0]
    package = "nvidia-cuda-nvrtc-cu12" if major == "12" else "nvidia-cuda-nvrtc"
    wanted = package if version == "newest" else f"{package}=={version}.*"
    uv("pip", "install", "--quiet", "--target", str(target), wanted)
    found = sorted(target.glob(f"nvidia/*/lib/libnvrtc.so.{major}"))
    if not found:
        raise CellError(f"no libnvrtc.so.{major} in {wanted}")
    return found[0]


class Nvrtc:
    """The part of CuPy's binding of NVRTC that the compiler uses, for a library of our choice."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise self.NVRTCError(f"{name} failed with status {status}")

    def getVersion(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(self, source: str, name: str, headers: tuple[bytes, ...], names: tuple[bytes, ...]) -> Any:
        program = ctypes.c_void_p()
        texts, paths = ((ctypes.c_char_p * len(strings))(*strings) for strings in (headers, names))
        arguments = (ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, paths)
        self._call("nvrtcCreateProgram", *arguments)
        return program

    def compileProgram(self, program: Any, options: tuple[str, ...]) -> None:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call("nvrtcCompileProgram", program, len(options), encoded)

    def destroyProgram(self, program: Any) -> None:
        self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def getCUBIN(self, program: Any) -> bytes:
        return self._read("CUBIN", program)[:-1]  # CuPy's drops the last byte

    def getPTX(self, program: Any) -> bytes:
        return self._read("PTX", program)

    def getProgramLog(self, program: Any) -> str:
        return self._read("ProgramLog", program).rstrip(b"\0").decode()

    def _read(self, what: str, program: Any) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


def compile_with(library: str) -> dict[str, Any]:
    """Compile all kernels; what is wrong with any of them."""
    sys.path.insert(0, str(ROOT))
    from etap_rt import compiler
    from etap_rt.errors import CompileError
    from etap_rt.kernels import all_specs

    nvrtc = Nvrtc(library)
    compiler._nvrtc = lambda: nvrtc  # type: ignore[assignment]
    wrong, registers = [], 0
    for spec in all_specs():
        try:
            report = compiler.build_report(compiler._compile(compiler._job(spec, compiler.ARCH)))
        except CompileError as error:
            wrong.append(f"{spec} does not compile: {error.log[:FAILURE_CHARACTERS]}")
            continue
        registers = max(registers, report.registers)
        if report.spill_stores or report.spill_loads or report.stack:
            wrong.append(f"{spec}: {report.stack} bytes of stack, {report.spill_stores} spilled")
        if report.serialized_wgmma:
            wrong.append(f"{spec}: serialized wgmma")
    version = ".".join(map(str, nvrtc.getVersion()))
    return {
        "nvrtc": version,
        "kernels": len(all_specs()),
        "failed": len(wrong),
        "failures": wrong,
        "most_registers": registers,
    }


# ---- The table ----


def uv(*arguments: str) -> str:
    return run(["uv", *arguments])


def run(command: list[str], variables: dict[str, str] | None = None) -> str:
    """What a command prints. Raises CellError with the end of what it complains about."""
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CellError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise CellError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-FAILURE_CHARACTERS:].strip()}")
    return done.stdout


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, a line a cell."""
    lines = ["| | versions | passed | failed | skipped | s |", "|---|---|---:|---:|---:|---:|"]
    for cell in cells:
        result = cell["result"]
        found = {"Python": result.get("python"), "NVRTC": result.get("nvrtc"), **result.get("packages", {})}
        shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        passed = result.get("passed", result.get("kernels", 0) - result.get("failed", 0))
        counts = [result.get("error", "")[:60]] if result.get("error") else [passed, result.get("failed", 0)]
        counts += [""] * (2 - len(counts)) + [result.get("skipped", 0), result["seconds"]]
        lines.append(f"| {cell['part']} {cell['name']} | {shown} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def merge(old: list[dict[str, Any]], new: list[Cell]) -> list[dict[str, Any]]:
    """Cells of a report, the old ones replaced by what was run now, in the order of the matrix."""
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "sources_sha256": hash_sources()}
    cells = {(cell["part"], cell["name"]): cell for cell in old}
    for cell in new:
        cells[cell.part, cell.name] = {"part": cell.part, "name": cell.name, **about, "result": cell.result}
    order = [("python", name) for name in PYTHONS] + [("libraries", name) for name in LIBRARIES]
    order += [("nvrtc", name) for name in NVRTCS]
    return [cells[key] for key in sorted(cells, key=lambda k: (order.index(k) if k in order else len(order), k))]


def hash_sources() -> str:
    """As tools/gpu_check.py does it, so that the two reports can be compared."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.hash_sources())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("python", "libraries", "nvrtc"), help="one part of the matrix")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions of Python")
    parser.add_argument("--nvrtc", nargs="+", default=NVRTCS, help="versions of NVRTC, or newest")
    parser.add_argument("--tests", nargs="+", default=["tests/cpu"], help="what pytest is given")
    parser.add_argument("--with-packages", nargs="+", default=[], help="more packages for the tests, such as torch")
    parser.add_argument("--directory", type=Path, help="where environments are made and stay")
    parser.add_argument("--output", type=Path, default=REPORT, help="where the report goes")
    parser.add_argument("--compile-with", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_with:
        print(json.dumps(compile_with(options.compile_with)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        options.directory = (options.directory or Path(temporary)).absolute()
        cells = []
        for cell in run_cells(options):
            print(table([{"part": cell.part, "name": cell.name, "result": cell.result}]).splitlines()[-1], flush=True)
            cells.append(cell)
    try:
        old = json.loads(options.output.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        old = []
    merged = merge(old, cells)
    options.output.write_text(json.dumps({"cells": merged}, indent=2) + "\n")
    print(f"\n{table(merged)}\n\nwrote {options.output}")
    return 0 if all(cell.passed for cell in cells) else 1


def run_cells(options: Any) -> Any:
    """Run the cells that were asked for, one after the other."""
    if options.only in (None, "nvrtc"):
        for version in options.nvrtc:
            yield run_nvrtc(version, options)
    if options.only in (None, "libraries"):
        for name, (resolution, extras, python) in LIBRARIES.items():
            tests = options.tests
            if name == WITHOUT_CUPY:
                tests = [*TESTS_WITHOUT_CUPY, "-k", f"not ({NEEDS_A_COMPILER})"]
            yield run_tests("libraries", name, python, resolution, extras, tests, options)
    if options.only in (None, "python"):
        for version in options.python:
            yield run_tests("python", version, version, "highest", ("cuda13", "test"), options.tests, options)


if __name__ == "__main__":
    sys.exit(main())
