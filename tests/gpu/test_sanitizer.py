"""compute-sanitizer over sanitizer_cases.py, all tools at once: each keeps a core busy rather than the GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etap_rt.compiler import compile_specs
from etap_rt.kernels import all_specs
from tests.gpu import sanitizer_cases
from tests.processes import ROOT, environment

SECONDS = 300
TOOLS = {
    # CuPy asks CUDA questions whose answer may be an error; what matters to us is what kernels do.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
    "synccheck": (),
}

# The last line of each tool: "ERROR SUMMARY: 0 errors", or "RACECHECK SUMMARY: 0 hazards displayed (...)".
REPORTS = re.compile(r"^=+ \w+ SUMMARY: (\d+) ", re.MULTILINE)

Run = subprocess.Popen[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, Path]]]:
    """What every tool prints, and the process that is at it."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    compile_specs(all_specs())  # all cores do it once, so that the processes below find them on disk
    directory = tmp_path_factory.mktemp("sanitizer")
    started = {}
    for tool, options in TOOLS.items():
        output = directory / tool
        command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "99"]
        command += [sys.executable, "-m", "tests.gpu.sanitizer_cases"]
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, text=True
            )
        started[tool] = (process, output)
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(
    runs: dict[str, tuple[Run, Path]], tool: str, record_property: Callable[[str, object], None]
) -> None:
    process, output = runs[tool]
    process.wait(timeout=SECONDS)
    text = output.read_text()
    reports = REPORTS.search(text)
    shown = "\n".join(line for line in text.splitlines() if not line.startswith("=========         Host"))[-6000:]
    assert reports is not None, f"the sanitizer did not do its work:\n{shown}"
    record_property("sanitizer_cases", len(sanitizer_cases.CASES) + len(sanitizer_cases.CASES_ON_FEW))
    record_property("sanitizer_reports", int(reports[1]))
    assert (process.returncode, reports[1]) == (0, "0"), shown
