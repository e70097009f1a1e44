"""tools/matrix.py, as far as it goes without fetching anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etap_rt import compiler, kernels
from etap_rt.kernels import KernelSpec
from tests.tool_modules import import_tool

matrix = import_tool("matrix")


def library() -> str:
    """The libnvrtc that CuPy has loaded."""
    compiler.nvrtc_version()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnvrtc.so" in line}
    return mapped.pop()


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
    assert result["kernels"] == 2 and result["failed"] == 1
    assert "nonsense" in result["failures"][0]
    assert result["most_registers"] == compiler.build_report(expected).registers
    assert result["nvrtc"] == ".".join(map(str, compiler.nvrtc_version()))
    assert compiler._compile(compiler._job(spec, "sm_90a")).cubin == expected.cubin


def test_spills_and_serialized_products_fail(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compiler.Report(
        registers=255, spill_stores=8, spill_loads=4, stack=16, shared=0, serialized_wgmma=True, wgmma=()
    )
    monkeypatch.setattr(kernels, "all_specs", lambda: [KernelSpec("good.cu", "k", ())])
    monkeypatch.setattr(compiler, "build_report", lambda compiled: report)
    assert matrix.compile_with(library())["failures"] == ["k[]: 16 bytes of stack, 8 spilled", "k[]: serialized wgmma"]


def test_outcomes_of_pytest_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_c(): pass\n@pytest.mark.parametrize('x', [1, 2])\ndef test_d(x): pass\n"
    )
    outcome = matrix.pytest_outcome(Path(sys.executable), [str(path)])
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (3, 1, 1)
    assert outcome["failures"][0]["test"].endswith("test_b") and "1 == 2" in outcome["failures"][0]["text"]
    with pytest.raises(matrix.CellError, match="pytest ended with status"):
        matrix.pytest_outcome(Path("/bin/false"), [])


def test_versions_are_those_of_the_environment() -> None:
    import numpy

    found = matrix.versions(Path(sys.executable))
    assert found["python"] == sys.version.split()[0].rstrip("+")
    assert found["packages"]["numpy"] == numpy.__version__


def test_an_interpreter_of_pyenv_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("3.10.2", "3.10.13", "3.1.4"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python").touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.find_python("3.10").startswith(f"{tmp_path}/versions/3.10.")
    assert matrix.find_python("3.1") == f"{tmp_path}/versions/3.1.4/bin/python"
    monkeypatch.setattr(matrix, "uv", lambda *arguments: "/there/python\n")
    assert matrix.find_python("3.13") == "/there/python"


def test_what_cannot_be_set_up_is_a_cell_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*arguments: str) -> str:
        raise matrix.CellError("no network")

    monkeypatch.setattr(matrix, "uv", nothing)
    options = SimpleNamespace(directory=tmp_path, tests=[], with_packages=[])
    for cell in (
        matrix.run_tests("python", "3.12", "3.12", "highest", ("test",), [], options),
        matrix.run_nvrtc("12.4", options),
    ):
        assert not cell.passed and cell.result["error"] == "no network"
    with pytest.raises(matrix.CellError, match="no_such_program is not installed"):
        matrix.run(["no_such_program"])
    with pytest.raises(matrix.CellError, match="false"):
        matrix.run(["false"])


def test_tests_that_need_no_compiler_are_there() -> None:
    assert [path for path in matrix.TESTS_WITHOUT_CUPY if not (matrix.ROOT / path).exists()] == []


def test_cells_that_were_not_run_keep_what_they_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "matrix.json"

    def run_cells(options: Any) -> Any:
        for version in options.nvrtc:
            result = {"nvrtc": version, "kernels": 23, "failed": int(version == "12.9"), "seconds": 1.0}
            yield matrix.Cell("nvrtc", version, result)

    def main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--output", str(output), *arguments])
        return int(matrix.main())

    monkeypatch.setattr(matrix, "run_cells", run_cells)
    assert main("--nvrtc", "13.0", "12.4") == 0
    assert main("--nvrtc", "12.9") == 1
    cells = json.loads(output.read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["12.4", "12.9", "13.0"]
    assert all(len(cell["sources_sha256"]) == 64 for cell in cells)
    assert "| nvrtc 12.9 | NVRTC 12.9 | 22 | 1 | 0 | 1.0 |" in capsys.readouterr().out
