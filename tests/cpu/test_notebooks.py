"""The notebooks run from top to bottom on the CPU backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests.tool_modules import ROOT

DIRECTORY = ROOT / "tools" / "notebooks"
NOTEBOOKS = ("1_first_steps", "2_how_it_works", "3_change_the_kernel")


def import_execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", DIRECTORY / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in DIRECTORY.glob("*.ipynb")) == list(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = DIRECTORY / f"{name}.ipynb"
    before = path.read_bytes()
    assert import_execute().main([str(path), "--output", str(tmp_path)]) == 0
    notebook = nbformat.read(tmp_path / path.name, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert path.read_bytes() == before


def test_a_cell_that_fails_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1 / 0)")])
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook, path)
    assert import_execute().main([str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
