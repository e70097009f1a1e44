"""tools/reproduce.py with tools that measure nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.tool_modules import ROOT, import_tool

reproduce = import_tool("reproduce")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was run; the tools that measure copy the committed results, those that only read are the real ones."""
    commands: list[tuple[str, ...]] = []
    real = reproduce.run

    def run(tool: str, *arguments: str, capture: bool = False) -> Any:
        commands.append((tool, *arguments))
        if "--markdown" in arguments or "--compare" in arguments:
            return real(tool, *arguments, capture=capture)
        if "--json" in arguments:
            output = Path(arguments[arguments.index("--json") + 1])
            shutil.copy(ROOT / "tools" / "results" / output.name, output)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce.driver, "device_name", lambda device: "NVIDIA H200")
    return commands


def test_one_command_measures_draws_tabulates_and_compares(
    ran: list[tuple[str, ...]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(["--output", str(tmp_path), "--flashmla-so", "a.so", "--fa3-so", "b.so"]) == 0
    tools = [tool for tool, *_ in ran]
    assert tools == ["bench", "peer_bench", "accuracy", "trace", "trace", "roofline", *reproduce.FILES, "bench"]
    libraries = ("--flashmla-so", "a.so", "--fa3-so", "b.so")
    assert ran[1][1:5] == ran[2][2:6] == libraries
    written = {path.name for path in tmp_path.iterdir()}
    results = map(Path, reproduce.result_files(tmp_path, "h200").values())
    assert written == {*(path.name for path in results), "tables.md", *(f"{name}.json" for name in reproduce.TRACES)}
    tables = (tmp_path / "tables.md").read_text()
    for heading in ("|  | 512 | 1K |", "| others / ours |", "|  | parts | etap_rt |"):
        assert heading in tables
    assert "0 slower, 0 faster" in capfd.readouterr().out


def test_pictures_are_those_that_the_readme_shows() -> None:
    drawn = {"throughput.png", "share_of_floor.png", "roofline.png"}  # by peer_bench, into its directory
    for command in reproduce.measurements(Path("results"), "h200", []):
        drawn |= {Path(text).name for text in command if text.endswith(".png")}
    committed = {path.name for path in (ROOT / "tools" / "results").glob("*.png")}
    assert committed == drawn
    shown = re.findall(r"tools/results/(\w+\.png)", (ROOT / "README.md").read_text())
    assert shown and drawn.issuperset(shown)


def test_every_argument_is_one_that_the_tool_knows(capsys: pytest.CaptureFixture[str]) -> None:
    for tool, *arguments in reproduce.measurements(Path("results"), "h200", ["--flashmla-so", "a", "--fa3-so", "b"]):
        help_text = subprocess.run(
            [reproduce.sys.executable, str(reproduce.TOOLS / f"{tool}.py"), "--help"], stdout=subprocess.PIPE, text=True
        ).stdout
        assert all(text in help_text for text in arguments if text.startswith("--"))


def test_a_tool_that_fails_is_named_and_the_others_run(
    ran: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    working = reproduce.run

    def run(tool: str, *arguments: str, capture: bool = False) -> Any:
        done = working(tool, *arguments, capture=capture)
        return subprocess.CompletedProcess(arguments, 2) if tool == "accuracy" and not capture else done

    monkeypatch.setattr(reproduce, "run", run)
    assert reproduce.main(["--output", str(tmp_path)]) == 1
    assert [tool for tool, *_ in ran].count("trace") == 2
    assert "failed: accuracy" in capsys.readouterr().out


def test_committed_tables_name_gpu_driver_versions_and_date() -> None:
    shown = [*reproduce.result_files(reproduce.RESULTS, "h200").values(), reproduce.RESULTS / "h100.json"]
    for path in map(Path, shown):
        results = json.loads(path.read_text())
        assert results["gpu"] and results["driver"] and results["date"] and results["versions"]["nvrtc"]


@pytest.mark.parametrize(
    ("name", "word"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200")]
)
def test_files_are_named_by_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    monkeypatch.setattr(reproduce.driver, "device_name", lambda device: name)
    assert reproduce.gpu_of_this_machine() == word


def test_without_a_gpu_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_gpu(device: int) -> str:
        raise reproduce.EtapError("no GPU")

    monkeypatch.setattr(reproduce.driver, "device_name", no_gpu)
    monkeypatch.setattr(reproduce, "run", lambda *arguments, **options: pytest.fail("a tool was run"))
    assert reproduce.main(["--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
