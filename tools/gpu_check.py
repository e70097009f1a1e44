"""Run the whole battery on a machine with a GPU and write what came out to tests/gpu_report.json.

    python tools/gpu_check.py [--output FILE] [pytest's arguments]
    python tools/gpu_check.py --verify

The battery is the tests in tests/gpu, a minute of fuzzing and the sanitizers among them, and the disk cache under
fire; with the argument `tests` it is all tests, as `python -m pytest` runs them. CI has no GPU, so the report is
committed; it says which sources it is about. `--verify` tells whether the committed report is green, of the whole
battery, and about the sources as they are now. Works from source, nothing has to be installed but what the tests
import. The report is written anew after every test: a run that is cut off, in whatever way, leaves one of what it did,
which does not verify. The exit status is pytest's, 1 if the report does not verify, 2 without a usable GPU.

A test adds figures to the report through pytest's fixture `record_property`. Those in TOTALS are also added up over all
tests, and a report without one of them is not one of the whole battery: what should have counted it was skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"
TESTS = ("tests/gpu", "tests/cpu/test_cache_under_fire.py")
ALL_TESTS = "tests"
TOTALS = (
    "fuzz_cases",
    "fuzz_runs",
    "fuzz_failures",
    "drawn_cases",  # by hypothesis
    "sanitizer_cases",
    "sanitizer_reports",
    "calls",  # in one process, while its memory was watched
    "replays",  # of one graph
    "processes_started",  # that share a disk cache
    "processes_killed",
    "survivors",
)
SOURCES = {"cuda_src": (".cu", ".cuh"), "etap_rt": (".py",)}
FAILURE_CHARACTERS = 2000


class Recorder:
    """A pytest plugin that keeps the outcome of every test."""

    def __init__(self, after_each: Callable[[], None]) -> None:
        self.after_each = after_each
        self.counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "xfailed": 0}
        self.failures: list[dict[str, str]] = []
        self.skips: list[dict[str, str]] = []
        self.figures: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail("errors", report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail("failed" if report.when == "call" else "errors", report)
        elif report.skipped:
            self.counts["xfailed" if hasattr(report, "wasxfail") else "skipped"] += 1
            self.skips.append({"test": report.nodeid, "reason": _skip_reason(report)})
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "call" and report.user_properties:
            self.figures[report.nodeid] = dict(report.user_properties)

    def pytest_runtest_logfinish(self) -> None:
        self.after_each()

    def _fail(self, count: str, report: pytest.CollectReport | pytest.TestReport) -> None:
        self.counts[count] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else report.longreprtext
        text = text.replace(f"{ROOT}{os.sep}", "")  # where the checkout lies says nothing
        self.failures.append({"test": report.nodeid, "text": text[:FAILURE_CHARACTERS]})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=REPORT, help="where the report goes")
    parser.add_argument("--verify", action="store_true", help="look at the committed report, run nothing")
    options, pytest_arguments = parser.parse_known_args()
    if options.verify:
        return verify()
    output = options.output.absolute()
    use_checkout()
    try:
        machine = describe_machine()
    except Exception as error:  # no driver, no GPU, no CuPy: each has an exception of its own
        print(f"no usable GPU: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()

    def write(status: int) -> None:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "sources_sha256": sources,
            **machine,
            "pytest_arguments": pytest_arguments,
            "exit_status": status,
            "seconds": round(time.monotonic() - start, 1),
            **recorder.counts,
            "totals": add_up(recorder.figures),
            "failures": recorder.failures,
            "skips": recorder.skips,
            "figures": recorder.figures,
        }
        part = output.with_suffix(".part")  # a run may be cut off while it writes
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(output)

    sources = hash_sources()
    compile_kernels()
    recorder = Recorder(after_each=lambda: write(pytest.ExitCode.INTERRUPTED))
    tests = () if ALL_TESTS in pytest_arguments else TESTS
    status = int(pytest.main([*tests, *pytest_arguments], plugins=[recorder]))
    write(status)
    print(f"wrote {output}")
    return status


def compile_kernels() -> None:
    """Fill the disk cache, several kernels at once; tests would wait for them one after the other.

    What does not compile is for the tests to report.
    """
    subprocess.run([sys.executable, "-m", "etap_rt", "compile"], check=False)


def add_up(figures: dict[str, dict[str, Any]]) -> dict[str, int]:
    """The figures of TOTALS, over all tests that have them."""
    found = {name: [of_test[name] for of_test in figures.values() if name in of_test] for name in TOTALS}
    return {name: sum(numbers) for name, numbers in found.items() if numbers}


def verify() -> int:
    """Print what is wrong with the committed report, if anything is."""
    try:
        report = json.loads(REPORT.read_text())
    except (OSError, ValueError) as error:
        print(f"no report: {error}")
        return 1
    wrong = []
    if report["exit_status"] or not report["passed"]:
        wrong.append(f"the tests did not pass: {report['failed']} failed, {report['passed']} passed")
    if limits := [argument for argument in report["pytest_arguments"] if argument != ALL_TESTS]:
        wrong.append(f"not all tests ran: pytest was given {limits}")
    if missing := [name for name in TOTALS if name not in report.get("totals", {})]:
        wrong.append(f"not the whole battery: the report has no {', '.join(missing)}")
    if report["sources_sha256"] != hash_sources():
        wrong.append("the sources have changed since")
    if wrong:
        print("\n".join(wrong))
    else:
        print(f"green: {report['passed']} passed on {report['gpu']}, {report['date']}, {report['skipped']} skipped")
        print(", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in report["totals"].items()))
    return 1 if wrong else 0


def use_checkout() -> None:
    """Make this checkout what gets imported, here and in processes that tests start."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def describe_machine() -> dict[str, Any]:
    """GPU, driver and versions. Raises if the GPU cannot run the kernels."""
    from etap_rt import compiler, driver

    compiler.require_hopper(0)
    return {
        "gpu": driver.device_name(0),
        "sms": driver.sm_count(0),
        "driver": _kernel_driver(),
        "versions": {
            "cuda_driver": driver.format_version(driver.driver_version()),
            "nvrtc": ".".join(map(str, compiler.nvrtc_version())),
            "python": platform.python_version(),
            **{name: _module_version(name) for name in ("numpy", "cupy", "torch")},
        },
    }


def hash_sources() -> str:
    """SHA-256 over names and contents of the package and the CUDA sources."""
    digest = hashlib.sha256()
    for folder, suffixes in SOURCES.items():
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _kernel_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _module_version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None


def _skip_reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


if __name__ == "__main__":
    sys.exit(main())
