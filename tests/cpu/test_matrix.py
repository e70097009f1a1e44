"""tools/matrix.py, as far as it goes without fetching anything."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etap_rt import compiler, kernels
from etap_rt.kernels import KernelSpec
from tests.tool_modules import import_tool

matrix = import_tool("matrix")


def library() -> str:
    """The libnvrtc that CuPy has loaded. There may be another one, of torch."""
    major, _ = compiler.nvrtc_version()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnvrtc.so" in line}
    return next(path for path in mapped if f"libnvrtc.so.{major}" in path)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.cu").write_text(
        '#include "two.cuh"\nextern "C" __global__ void k(float* x) { x[0] = TWO; }\n#ifdef BAD\nnonsense\n#endif\n'
    )
    (tmp_path / "two.cuh").write_text("#define TWO 2\n")
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    monkeypatch.setattr(compiler, "_nvrtc", compiler._nvrtc)  # put back afterwards
    return tmp_path


def test_a_library_of_our_choice_compiles_what_cupys_binding_compiles(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = KernelSpec("good.cu", "k", ())
    expected = compiler._compile(compiler._job(spec, "sm_90a"))
    monkeypatch.setattr(kernels, "all_specs", lambda: [spec, KernelSpec("good.cu", "k", (("BAD", 1),))])
    result = matrix.compile_with(library())
    assert result["kernels"] == 2
    (failure,) = result["failures"]
    assert failure.startswith("k[BAD=1]: does not compile: ") and "nonsense" in failure
    assert result["most_registers"] == compiler.build_report(expected).registers
    assert result["nvrtc"] == ".".join(map(str, compiler.nvrtc_version()))
    assert compiler._compile(compiler._job(spec, "sm_90a")).cubin == expected.cubin
    shares = [matrix.compile_with(library(), share, 2) for share in range(2)]
    assert [(share["kernels"], len(share["failures"])) for share in shares] == [(1, 0), (1, 1)]


def test_spills_and_serialized_products_fail(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compiler.Report(
        registers=255, spill_stores=8, spill_loads=4, stack=16, shared=0, serialized_wgmma=True, wgmma=()
    )
    monkeypatch.setattr(kernels, "all_specs", lambda: [KernelSpec("good.cu", "k", ())])
    monkeypatch.setattr(compiler, "build_report", lambda compiled: report)
    assert matrix.compile_with(library())["failures"] == [
        "k[]: spills, 8 bytes stored, 4 loaded, 16 of stack, 255 registers",
        "k[]: serialized wgmma",
    ]


def options(tmp_path: Path, **changes: Any) -> Any:
    found = {"directory": tmp_path, "checkout": matrix.ROOT, "processes": 2, "keep": False, "tests": []}
    return SimpleNamespace(**{**found, **changes})


def test_shares_of_the_kernels_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def share(command: list[str], variables: dict[str, str]) -> str:
        failures = ["a[X=1]: spills, 8", "a[X=1]: serialized wgmma"] if command[-2] == "0" else []
        return json.dumps({"nvrtc": "12.4", "kernels": 13, "failures": failures, "most_registers": 150})

    monkeypatch.setattr(matrix, "fetch_nvrtc", lambda version, directory: directory / "libnvrtc.so")
    monkeypatch.setattr(matrix, "run", share)
    cell = matrix.run_nvrtc("12.4", options(tmp_path))
    assert not cell.passed
    assert (cell.result["kernels"], cell.result["failed"], len(cell.result["failures"])) == (26, 1, 2)


def test_outcomes_of_pytest_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='why')\ndef test_c(): pass\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_d(x): pass\n"
    )
    outcome = matrix.pytest_outcome(Path(sys.executable), [str(path)], tmp_path)
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (3, 1, 1)
    assert outcome["skip_reasons"] == {"why": 1}
    (failure,) = outcome["failures"]
    assert re.match(r"\w*test_it::test_b\n", failure) and "1 == 2" in failure
    assert matrix.complaints(outcome)[0].endswith("test_it.py:3: AssertionError")


@pytest.mark.parametrize("content", ["", "import no_such_module\n"], ids=["no tests", "a file that cannot be read"])
def test_without_tests_a_cell_has_failed(tmp_path: Path, content: str) -> None:
    (tmp_path / "test_it.py").write_text(content)
    with pytest.raises(matrix.CellError, match="pytest ended with status [25]: "):
        matrix.pytest_outcome(Path(sys.executable), ["test_it.py"], tmp_path)
    with pytest.raises(matrix.CellError, match="pytest ended with status"):
        matrix.pytest_outcome(Path("/bin/false"), [], tmp_path)


def test_versions_are_those_of_the_environment() -> None:
    import numpy

    found = matrix.versions(Path(sys.executable), matrix.ROOT)
    assert found["python"] == sys.version.split()[0].rstrip("+")
    assert found["numpy"] == numpy.__version__
    assert found["nvrtc"] == ".".join(map(str, compiler.nvrtc_version()))
    assert (found["torch"] is None) == (importlib.util.find_spec("torch") is None)


def test_the_newest_interpreter_of_pyenv_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("3.10.9", "3.10.13", "3.1.4"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python").touch()
    (tmp_path / "versions" / "3.10.14" / "bin").mkdir(parents=True)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.find_python("3.10") == f"{tmp_path}/versions/3.10.13/bin/python"
    assert matrix.find_python("3.1") == f"{tmp_path}/versions/3.1.4/bin/python"
    monkeypatch.setattr(matrix, "uv", lambda *arguments: "/there/python\n")
    assert matrix.find_python("3.13") == "/there/python"


def test_what_cannot_be_set_up_is_a_cell_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*arguments: str) -> str:
        raise matrix.CellError("no network")

    monkeypatch.setattr(matrix, "uv", nothing)
    for cell in (
        matrix.run_tests("python", "3.12", [], options(tmp_path), "3.12", *matrix.NEWEST),
        matrix.run_nvrtc("12.4", options(tmp_path)),
    ):
        assert not cell.passed and cell.result["error"] == "no network"
        assert matrix.complaints(cell.result) == ["no network"] and matrix.outcome(cell.result) == "not run"
    with pytest.raises(matrix.CellError, match="no_such_program is not installed"):
        matrix.run(["no_such_program"])
    with pytest.raises(matrix.CellError, match="false"):
        matrix.run(["false"])


@pytest.mark.parametrize("keep", [False, True])
def test_environments_stay_only_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    commands = []

    def make(directory: Path, version: str) -> Path:
        directory.mkdir()
        return directory / "bin" / "python"

    monkeypatch.setattr(matrix, "make_environment", make)
    monkeypatch.setattr(matrix, "uv", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(matrix, "versions", lambda python, checkout: {"python": "3.10.2"})
    monkeypatch.setattr(matrix, "pytest_outcome", lambda python, arguments, checkout: {"arguments": arguments})
    installed = ("3.10", "lowest-direct", ("x", "y"), ("torch>=9",))
    cell = matrix.run_tests("libraries", "a b", ["t"], options(tmp_path, keep=keep), *installed)
    assert cell.passed
    assert cell.result["python"] == "3.10.2" and cell.result["arguments"] == ["-n", "2", "--dist", "loadfile", "t"]
    assert " ".join(commands[0]).endswith(
        f" --resolution lowest-direct --extra x --extra y -r {matrix.ROOT}/pyproject.toml torch>=9"
    )
    assert (tmp_path / "libraries-a-b").exists() == keep


def test_tests_that_need_no_compiler_are_there() -> None:
    assert [path for path in matrix.TESTS_WITHOUT_CUPY if not (matrix.ROOT / path).exists()] == []


def test_a_copy_of_the_checkout_is_about_the_same_sources(tmp_path: Path) -> None:
    checkout = matrix.copy_checkout(tmp_path)
    assert matrix.hash_sources(checkout) == matrix.hash_sources(matrix.ROOT)
    assert sorted(path.name for path in checkout.iterdir()) == sorted(matrix.COPIED)
    assert not list(checkout.rglob("__pycache__"))


def test_cells_that_were_not_run_keep_what_they_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "matrix.json"

    def run_cells(options: Any) -> Iterator[Any]:
        for version in options.nvrtc:
            failures = ["k[]: spills, 8 bytes stored"] if version == "12.9" else []
            result = {"nvrtc": version, "kernels": 23, "failed": len(failures), "failures": failures, "seconds": 1.0}
            yield matrix.Cell("nvrtc", version, result)

    def main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--output", str(output), *arguments])
        return int(matrix.main())

    monkeypatch.setattr(matrix, "run_cells", run_cells)
    assert main("--nvrtc", "13.0", "12.4") == 0
    assert main("--nvrtc", "12.9") == 1
    assert "k[]: spills, 8 bytes stored\n" in capsys.readouterr().out
    cells = json.loads(output.read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["12.4", "12.9", "13.0"]
    assert all(len(cell["sources_sha256"]) == 64 for cell in cells)
    assert main("--table") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| NVRTC 12.9 |  |  |  | 12.9 |  | 22 of 23 kernels, 1 spill |"


def test_the_table_names_versions_and_counts() -> None:
    result = {"python": "3.10.2", "numpy": "1.24.0", "cupy": None, "nvrtc": None, "torch": None}
    result |= {"passed": 1200, "failed": 0, "skipped": 3, "failures": []}
    cells = [{"part": "libraries", "name": "oldest", "result": result}]
    cells.append({"part": "python", "name": "3.12", "result": {**result, "failed": 2}})
    assert matrix.table(cells).splitlines()[2:] == [
        "| oldest | 3.10.2 | 1.24.0 |  |  |  | 1200 passed, 3 skipped |",
        "| Python 3.12 | 3.10.2 | 1.24.0 |  |  |  | 1200 passed, 2 failed, 3 skipped |",
    ]


def test_the_table_of_the_readme_is_that_of_the_report() -> None:
    assert matrix.table(matrix.read_report(matrix.REPORT)) in (matrix.ROOT / "README.md").read_text()
