"""tools/gpu_check.py without a GPU: what it writes down of tests that pass, fail and count, and what it believes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etap_rt import arguments
from etap_rt.kernels import all_specs, decode_spec
from etap_rt.schedule import SCARCE_SMS, plan_grid
from tests.cases import make_inputs
from tests.processes import ROOT, environment
from tests.tool_modules import import_tool

gpu_check = import_tool("gpu_check")
SMS_OF_AN_H200 = 132

SOME_TESTS = """
import pytest

def test_counts(record_property):
    record_property("fuzz_cases", 700)
    record_property("worst", 0.25)

@pytest.mark.parametrize("killed", [3, 5])
def test_kills(killed, record_property):
    record_property("processes_killed", killed)

def test_reports(record_property):
    record_property("sanitizer_reports", 2)
    assert "what was found" == ""

@pytest.fixture
def broken():
    raise OSError("no device")

def test_breaks(broken): pass

@pytest.mark.skip(reason="two GPUs are needed")
def test_skipped(): pass
"""


@pytest.fixture
def report_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tool looks for the committed report; it runs the tests above, on a machine of this name."""
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    monkeypatch.setattr(gpu_check, "TESTS", (str(tmp_path / "test_some.py"), "-p", "no:cacheprovider"))
    monkeypatch.setattr(gpu_check, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(gpu_check, "use_checkout", lambda: None)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(gpu_check, "compile_kernels", lambda: None)
    return tmp_path / "report.json"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return int(gpu_check.main())


def test_outcomes_and_figures_are_written_down(report_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--output", str(report_path)) == 1
    report = json.loads(report_path.read_text())
    assert (report["passed"], report["failed"], report["errors"], report["skipped"]) == (3, 1, 1, 1)
    assert report["gpu"] == "a GPU" and report["exit_status"] == 1
    assert report["sources_sha256"] == gpu_check.hash_sources()
    failed, broken = report["failures"]
    assert failed["test"].endswith("test_reports") and "what was found" in failed["text"]
    assert broken["test"].endswith("test_breaks") and "no device" in broken["text"]
    assert "two GPUs are needed" in report["skips"][0]["reason"]
    figures = {name.rpartition("::")[2]: of_test for name, of_test in report["figures"].items()}
    assert figures["test_counts"] == {"fuzz_cases": 700, "worst": 0.25}
    assert figures["test_reports"] == {"sanitizer_reports": 2}, "also of a test that fails"
    assert report["totals"] == {"fuzz_cases": 700, "sanitizer_reports": 2, "processes_killed": 8}


def test_a_run_that_is_cut_off_has_left_a_report_that_does_not_verify(
    report_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_then = report_path.parent / "of_then.json"
    path = report_path.parent / "test_cut_off.py"
    path.write_text(f"""
import shutil

def test_counts(record_property): record_property("fuzz_cases", 700)
def test_is_cut_off(): shutil.copy({str(report_path)!r}, {str(of_then)!r})
""")
    monkeypatch.setattr(gpu_check, "TESTS", (str(path), "-p", "no:cacheprovider"))
    assert run(monkeypatch, "--output", str(report_path)) == 0
    report = json.loads(of_then.read_text())
    assert (report["passed"], report["exit_status"]) == (1, pytest.ExitCode.INTERRUPTED)
    assert report["totals"] == {"fuzz_cases": 700}
    shutil.move(of_then, report_path)
    assert run(monkeypatch, "--verify") == 1


def test_kernels_are_compiled_before_the_tests(report_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, path = report_path.parent / "compiled", report_path.parent / "test_needs_kernels.py"
    path.write_text(f"from pathlib import Path\ndef test_needs_them(): assert Path({str(compiled)!r}).exists()\n")
    monkeypatch.setattr(gpu_check, "TESTS", (str(path), "-p", "no:cacheprovider"))
    monkeypatch.setattr(gpu_check, "compile_kernels", compiled.touch)
    assert run(monkeypatch, "--output", str(report_path)) == 0


def test_a_machine_without_a_gpu_has_a_status_of_its_own(
    report_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_gpu() -> None:
        raise OSError("no driver")

    monkeypatch.setattr(gpu_check, "describe_machine", no_gpu)
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err == "no usable GPU: no driver\n"
    assert not report_path.exists()


def good_report() -> dict[str, Any]:
    return {
        "date": "today",
        "sources_sha256": gpu_check.hash_sources(),
        "gpu": "a GPU",
        "pytest_arguments": [],
        "exit_status": 0,
        "passed": 9,
        "failed": 0,
        "skipped": 1,
        "totals": {name: 1000 + i for i, name in enumerate(gpu_check.TOTALS)},
    }


@pytest.mark.parametrize("pytest_arguments", [[], ["tests"]], ids=["battery", "all tests"])
def test_a_green_report_of_these_sources_is_believed(
    pytest_arguments: list[str],
    report_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report_path.write_text(json.dumps(good_report() | {"pytest_arguments": pytest_arguments}))
    assert run(monkeypatch, "--verify") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "green: 9 passed on a GPU, today, 1 skipped"
    assert second.startswith("fuzz cases 1,000, fuzz runs 1,001, ")


DOUBTS: dict[str, tuple[dict[str, Any], str]] = {
    "failures": ({"exit_status": 1, "failed": 2}, "the tests did not pass: 2 failed, 9 passed"),
    "nothing": ({"passed": 0}, "the tests did not pass: 0 failed, 0 passed"),
    "some tests": ({"pytest_arguments": ["tests", "-k", "x"]}, "not all tests ran: pytest was given ['-k', 'x']"),
    "other sources": ({"sources_sha256": "0"}, "the sources have changed since"),
    "no sanitizer": (
        {"totals": {name: 1 for name in gpu_check.TOTALS if "sanitizer" not in name}},
        "not the whole battery: the report has no sanitizer_cases, sanitizer_reports",
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_another_report_is_not_believed(
    doubt: str, report_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = DOUBTS[doubt]
    report_path.write_text(json.dumps(good_report() | changes))
    assert run(monkeypatch, "--verify") == 1
    assert capsys.readouterr().out == f"{message}\n"


def test_no_report_and_half_a_report_are_not_believed(
    report_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--verify") == 1
    report_path.write_text('{"date":')
    assert run(monkeypatch, "--verify") == 1
    assert capsys.readouterr().out.count("no report: ") == 2


def test_the_battery_has_the_tests_that_count() -> None:
    """Each figure that is added up is recorded by some test of the battery."""
    files = [path for name in gpu_check.TESTS for path in [gpu_check.ROOT / name]]
    assert all(path.exists() for path in files)
    sources = "".join(
        path.read_text() for top in files for path in ([top] if top.is_file() else sorted(top.glob("test_*.py")))
    )
    fuzz = {f"fuzz_{name}" for name in ("cases", "runs")}  # named by a loop
    assert [name for name in gpu_check.TOTALS if f'"{name}"' not in sources and name not in fuzz] == []


SUMMARIES = {
    "========= ERROR SUMMARY: 0 errors": "0",
    "========= ERROR SUMMARY: 17 errors": "17",
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": "0",
    "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)": "3",
}


@pytest.mark.parametrize("line", SUMMARIES)
def test_reports_of_a_sanitizer_are_counted(line: str) -> None:
    pytest.importorskip("cupy")
    from tests.gpu.test_sanitizer import REPORTS

    found = REPORTS.search(f"========= COMPUTE-SANITIZER\nsome output\n{line}\n")
    assert found is not None and found[1] == SUMMARIES[line]


def test_the_sanitizers_see_every_decode_kernel() -> None:
    pytest.importorskip("cupy")
    from tests.gpu.sanitizer_cases import CASES, CASES_ON_FEW

    seen = set()
    for sms, cases in ((SMS_OF_AN_H200, CASES), (SCARCE_SMS, CASES_ON_FEW)):
        for case in cases:
            call = make_inputs(case).on(np.asarray)
            problem = arguments.check(**call, out=None, lse=None).problem
            grid = plan_grid(problem.typical_rows, sms)
            about = (problem.element, problem.latent_dim, problem.rope_dim, grid.rows)
            seen.add(decode_spec(*about, own_tiles=grid.own_tiles, general=problem.general))
    assert {spec for spec in all_specs() if spec.entry == "mla_decode"} == seen


def test_processes_of_tests_import_from_where_their_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert environment(NAME="value")["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/somewhere"]
    assert environment(NAME="value")["NAME"] == "value"
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == str(ROOT)
