"""Run the CPU tests on every Python and with the oldest and newest libraries, and compile all kernels with every NVRTC.

    python tools/matrix.py [--only python|libraries|nvrtc] [--python 3.12 ...] [--nvrtc 12.4 ...] [--tests PATH ...]
    python tools/matrix.py --table

Needs no GPU, but uv (pip install uv), which fetches packages and, where it can, interpreters; those of pyenv are used
if it has them. Each cell is an environment of its own, deleted when the cell is done unless --directory says where
they stay; its tests run on a copy of the checkout as it was at the beginning, so editing meanwhile does no harm.

Prints each cell, and what failed in it, as soon as it is done, and writes it to tests/matrix.json; cells that were not
run keep what they said, with the sources they said it of. `--table` prints that file as the README's table. The exit
status is 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "matrix.json"
COPIED = ("etap_rt", "cuda_src", "tests", "tools", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")  # each with the newest libraries that there are for it
# One of them runs every test. The other cells leave out what compiles or computes much and is the same everywhere:
# words for pytest's -k.
EVERYTHING_ON = "3.13"
LONG = "long- or test_kernels or real_demo or random_problems"
NVRTCS = ("12.3", "12.4", "12.9", "13.0", "newest")

# What is installed: how versions are chosen, extras of the project, a torch. The newest NVRTC of CUDA 13 excludes
# all torch for CUDA 13, and of a torch for CUDA 12 CuPy would take the NVRTC; hence torch is asked for, not NVRTC.
NEWEST = ("highest", ("cuda13", "test"), ("torch>=2.11",))
# CuPy asks for a newer NumPy than we do, so the oldest NumPy can only be had without it, and without it nothing can be
# compiled.
WITHOUT_CUPY = "oldest without CuPy"
LIBRARIES = {
    "oldest": ("3.10", "lowest-direct", ("cuda13", "torch", "test"), ()),
    WITHOUT_CUPY: ("3.10", "lowest-direct", ("test",), ()),
    "newest of CUDA 12": ("3.12", "highest", ("cuda12", "test"), ("torch>=2.4,<2.11",)),
}
TESTS_WITHOUT_CUPY = [
    f"tests/cpu/test_{name}.py"
    for name in ("arguments", "bad_input", "decode", "interop", "kv_cache", "public_api", "schedule", "states")
]
NEEDS_A_COMPILER = "kernels_build or kernels_compile"  # among those, for pytest's -k
# Besides: what runs tests in several processes, and what torch 2.4 imports when it compiles but does not ask for.
TOOLS = ("pytest-xdist", "setuptools")
FAILURE_CHARACTERS = 2000  # of what a test or a command says, its end
COMPILER_CHARACTERS = 400  # of a compiler's log, its beginning
SHOWN_LINES = 3  # of each failure, on the screen
CELL_SECONDS = 3600


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


def run_tests(part: str, name: str, tests: list[str], options: Any, python: str, *installed: Any) -> Cell:
    """Tests in an environment of their own."""
    start = time.monotonic()
    environment = options.directory / f"{part}-{name}".replace(" ", "-")
    try:
        interpreter = make_environment(environment, python)
        resolution, extras, packages = installed
        install = ["pip", "install", "--quiet", "--python", str(interpreter)]
        wanted = [word for extra in extras for word in ("--extra", extra)]
        uv(*install, "--resolution", resolution, *wanted, "-r", str(options.checkout / "pyproject.toml"), *packages)
        uv(*install, *TOOLS)
        result = versions(interpreter, options.checkout)
        result |= pytest_outcome(
            interpreter, ["-n", str(options.processes), "--dist", "loadfile", *tests], options.checkout
        )
    except CellError as error:
        result = {"error": str(error)}
    finally:
        if not options.keep:
            shutil.rmtree(environment, ignore_errors=True)
    return Cell(part, name, {**result, "seconds": round(time.monotonic() - start, 1)})


def make_environment(directory: Path, version: str) -> Path:
    """The interpreter of a new virtual environment."""
    uv("venv", "--quiet", "--clear", "--python", find_python(version), str(directory))
    return directory / "bin" / "python"


def find_python(version: str) -> str:
    """An interpreter of that version: pyenv's newest, else one that uv finds or fetches."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    patches = {path.name.rpartition(".")[2]: path / "bin" / "python" for path in root.glob(f"{version}.*")}
    found = [patches[patch] for patch in sorted(filter(str.isdecimal, patches), key=int) if patches[patch].exists()]
    if found:
        return str(found[-1])
    try:
        return uv("python", "find", version).strip()
    except CellError:
        uv("python", "install", version)
        return uv("python", "find", version).strip()


VERSIONS = """
import contextlib, importlib.metadata as m, json, platform
with contextlib.suppress(ImportError):
    import torch  # a torch for another CUDA brings its own NVRTC, which CuPy then takes
from etap_rt import compiler, errors
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
cupy = [v for name, v in found.items() if name.startswith("cupy-cuda")]
try:
    nvrtc = ".".join(map(str, compiler.nvrtc_version()))
except errors.UnsupportedError:
    nvrtc = None
print(json.dumps({"python": platform.python_version(), "numpy": found["numpy"], "cupy": (cupy or [None])[0],
                  "nvrtc": nvrtc, "torch": found.get("torch")}))
"""


def versions(python: Path, checkout: Path) -> dict[str, Any]:
    """The versions of the interpreter and of the packages that matter, None for those that are not there."""
    found: dict[str, Any] = json.loads(run([str(python), "-c", VERSIONS], {"PYTHONPATH": str(checkout)}))
    return found


def pytest_outcome(python: Path, arguments: list[str], checkout: Path) -> dict[str, Any]:
    """Run pytest, and count. Raises CellError if it did not get as far as running tests."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        # The checkout comes first on the path of what the tests start.
        variables = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=CELL_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise CellError(f"pytest was not done after {CELL_SECONDS} s") from error
        if done.returncode not in (0, 1) or not report.exists():  # 0: all passed, 1: some failed
            raise CellError(f"pytest ended with status {done.returncode}: {end_of(done.stdout + done.stderr)}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skips = [child.get("message", "") for case in cases for child in case if child.tag == "skipped"]
    failed = len({id(case) for case, _ in failures})
    return {
        "arguments": arguments,
        "passed": len(cases) - failed - len(skips),
        "failed": failed,
        "skipped": len(skips),
        "skip_reasons": dict(Counter(skips).most_common()),
        "failures": [
            f"{case.get('classname')}::{case.get('name')}\n{end_of(child.text or '')}".replace(f"{checkout}/", "")
            for case, child in failures
        ],
    }


# ---- NVRTC ----


def run_nvrtc(version: str, options: Any) -> Cell:
    """Compile every kernel with the NVRTC of a wheel, in processes of their own: each compiles one at a time."""
    start = time.monotonic()
    try:
        library = fetch_nvrtc(version, options.directory)
        variables = {"LD_LIBRARY_PATH": str(library.parent)}  # where it looks for its second half
        command = [sys.executable, str(options.checkout / "tools" / "matrix.py"), "--compile-with", str(library)]
        shares = [[*command, "--share", str(i), str(options.processes)] for i in range(options.processes)]
        with ThreadPoolExecutor() as pool:
            done = [json.loads(text) for text in pool.map(lambda share: run(share, variables), shares)]
        failures = sorted(text for share in done for text in share["failures"])
        result = {
            "nvrtc": done[0]["nvrtc"],
            "kernels": sum(share["kernels"] for share in done),
            "failed": len({text.partition(": ")[0] for text in failures}),
            "most_registers": max(share["most_registers"] for share in done),
            "failures": failures,
        }
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


def compile_with(library: str, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Compile every kernel, or one share of them, and say what is wrong with which."""
    sys.path.insert(0, str(ROOT))
    from etap_rt import compiler
    from etap_rt.errors import CompileError
    from etap_rt.kernels import all_specs

    nvrtc = Nvrtc(library)
    compiler._nvrtc = lambda: nvrtc  # type: ignore[assignment]
    specs, failures, registers = all_specs()[share::shares], [], 0
    for spec in specs:
        try:
            report = compiler.build_report(compiler._compile(compiler._job(spec, compiler.ARCH)))
        except CompileError as error:
            failures.append(f"{spec}: does not compile: {error.log[:COMPILER_CHARACTERS]}")
            continue
        registers = max(registers, report.registers)
        if report.spill_stores or report.spill_loads or report.stack:
            failures.append(
                f"{spec}: spills, {report.spill_stores} bytes stored, {report.spill_loads} loaded, "
                f"{report.stack} of stack, {report.registers} registers"
            )
        if report.serialized_wgmma:
            failures.append(f"{spec}: serialized wgmma")
    version = ".".join(map(str, nvrtc.getVersion()))
    return {"nvrtc": version, "kernels": len(specs), "failures": failures, "most_registers": registers}


# ---- Commands ----


def uv(*arguments: str) -> str:
    """Of the environment that this runs in, if it has one."""
    beside = Path(sys.executable).with_name("uv")
    return run([str(beside) if beside.exists() else "uv", *arguments])


def run(command: list[str], variables: dict[str, str] | None = None) -> str:
    """What a command prints. Raises CellError with the end of what it complains about."""
    try:
        done = subprocess.run(command, env={**os.environ, **(variables or {})}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CellError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise CellError(f"{' '.join(command)}: {end_of(done.stderr or done.stdout)}")
    return done.stdout


def end_of(text: str) -> str:
    return text.strip()[-FAILURE_CHARACTERS:]


# ---- The table ----

HEADINGS = ("Python", "NumPy", "CuPy", "NVRTC", "torch")
NAMES = {"python": "Python {}", "libraries": "{}", "nvrtc": "NVRTC {}"}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, a line a cell."""
    lines = [f"| | {' | '.join(HEADINGS)} | outcome |", f"|---{'|---' * len(HEADINGS)}|---|"]
    for cell in cells:
        result = cell["result"]
        found = [result.get(heading.lower()) or "" for heading in HEADINGS]
        name = NAMES[cell["part"]].format(cell["name"])
        lines.append(f"| {name} | {' | '.join(found)} | {outcome(result)} |")
    return "\n".join(lines)


def outcome(result: dict[str, Any]) -> str:
    if "error" in result:
        return "not run"
    if "kernels" in result:
        good = f"{result['kernels'] - result['failed']} of {result['kernels']} kernels"
        what = Counter("spill" if ": spills" in text else "fail" for text in result["failures"])
        return ", ".join([good, *(f"{count} {kind}" for kind, count in what.items())])
    counts = {kind: result[kind] for kind in ("passed", "failed", "skipped")}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def complaints(result: dict[str, Any]) -> list[str]:
    """What a cell that failed has to say, short."""
    if "error" in result:
        return [result["error"]]
    shown = []
    for text in result["failures"]:
        first, *others = text.splitlines()
        shown.append("\n    ".join([first, *others[-SHOWN_LINES:]]))
    return shown


def merge(old: list[dict[str, Any]], cell: Cell, sources: str) -> list[dict[str, Any]]:
    """Cells of a report, one of them replaced by what was run now, in the order of the matrix."""
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "sources_sha256": sources}
    cells = {(found["part"], found["name"]): found for found in old}
    cells[cell.part, cell.name] = {"part": cell.part, "name": cell.name, **about, "result": cell.result}
    order = [("python", name) for name in PYTHONS] + [("libraries", name) for name in LIBRARIES]
    order += [("nvrtc", name) for name in NVRTCS]
    return [cells[key] for key in sorted(cells, key=lambda k: (order.index(k) if k in order else len(order), k))]


def read_report(path: Path) -> list[dict[str, Any]]:
    try:
        cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    except FileNotFoundError:
        return []
    return cells


def hash_sources(checkout: Path) -> str:
    """As tools/gpu_check.py does it, so that the two reports can be compared."""
    spec = importlib.util.spec_from_file_location("gpu_check", checkout / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.hash_sources())


def copy_checkout(target: Path) -> Path:
    """What tests need of this checkout."""
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, target / name)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("python", "libraries", "nvrtc"), help="one part of the matrix")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions of Python")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES, help="sets of libraries")
    parser.add_argument("--nvrtc", nargs="+", default=NVRTCS, help="versions of NVRTC, or newest")
    parser.add_argument("--tests", nargs="+", default=["tests/cpu"], help="what pytest is given")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that test or compile at once")
    parser.add_argument("--directory", type=Path, help="where environments are made and stay")
    parser.add_argument("--output", type=Path, default=REPORT, help="where the report goes")
    parser.add_argument("--table", action="store_true", help="print the report, run nothing")
    parser.add_argument("--compile-with", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_with:
        print(json.dumps(compile_with(options.compile_with, *options.share)))
        return 0
    if options.table:
        print(table(read_report(options.output)))
        return 0
    return run_all(options)


def run_all(options: Any) -> int:
    """Run the cells that were asked for, and write each down."""
    with tempfile.TemporaryDirectory() as temporary:
        options.keep = options.directory is not None
        options.directory = (options.directory or Path(temporary)).absolute()
        (Path(temporary) / "checkout").mkdir()
        options.checkout = copy_checkout(Path(temporary) / "checkout")
        sources, passed = hash_sources(options.checkout), True
        for cell in run_cells(options):
            passed = passed and cell.passed
            print("\n".join([table([vars(cell)]).splitlines()[-1], *complaints(cell.result)]), flush=True)
            cells = merge(read_report(options.output), cell, sources)
            options.output.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
    print(f"wrote {options.output}")
    return 0 if passed else 1


def run_cells(options: Any) -> Iterator[Cell]:
    """Run the cells that were asked for, one after the other."""
    if options.only in (None, "nvrtc"):
        for version in options.nvrtc:
            yield run_nvrtc(version, options)
    if options.only in (None, "libraries"):
        for name in options.libraries:
            tests = [*options.tests, "-k", f"not ({LONG})"]
            if name == WITHOUT_CUPY:
                tests = [*TESTS_WITHOUT_CUPY, "-k", f"not ({LONG} or {NEEDS_A_COMPILER})"]
            yield run_tests("libraries", name, tests, options, *LIBRARIES[name])
    if options.only in (None, "python"):
        for version in options.python:
            tests = options.tests if version == EVERYTHING_ON else [*options.tests, "-k", f"not ({LONG})"]
            yield run_tests("python", version, tests, options, version, *NEWEST)


if __name__ == "__main__":
    sys.exit(main())
