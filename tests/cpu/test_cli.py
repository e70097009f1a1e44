"""The command line, in this process with kernels of the tests' own, and once for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from etap_rt import cli, compiler, demo, doctor, driver
from etap_rt.errors import EtapError, UnsupportedError
from etap_rt.kernels import KernelSpec, decode_spec
from tests.processes import environment

STAND_IN = 'extern "C" __global__ void mla_decode(float* out) { out[threadIdx.x] = ROWS + LATENT_DIM; }\n'
SPECS = [decode_spec("bfloat16", 512, 64, rows) for rows in (8, 16)]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source directory with a stand-in for the decode kernel, which compiles in no time, and an empty cache."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "mla_decode.cu").write_text(STAND_IN)
    monkeypatch.setattr(compiler, "source_directory", lambda: directory)
    monkeypatch.setattr(compiler, "_compiled", {})
    monkeypatch.setattr(cli, "all_specs", lambda: SPECS)
    monkeypatch.setattr(demo, "ROW_TILES", (8,))
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "cache"))
    return directory


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise UnsupportedError("no driver here", "a GPU")

    monkeypatch.setattr(driver, "device_count", nothing)
    monkeypatch.setattr(driver, "driver_version", nothing)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(arguments)
    return status, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status, text = run(capsys, *arguments, "--json")
    return status, json.loads(text)


@pytest.mark.usefixtures("sources", "no_gpu")
def test_the_demo_without_a_gpu_says_so_and_decodes_and_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "demo")
    assert status == 0
    assert "No GPU that can run the kernels: no driver here; needed: a GPU." in text
    assert "Decoded 16 requests of 30 to 960 tokens" in text
    assert "Compiled 2 decode kernels for sm_90a" in text
    assert text.endswith("In tolerance of the float64 result.\n")


@pytest.mark.usefixtures("sources", "no_gpu")
def test_the_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(capsys, "demo")
    assert status == 0
    assert result["accepted"]
    assert 0 < result["error"] <= result["accepted_error"]
    assert 0 < result["lse_error"] <= result["accepted_lse_error"]
    assert len(result["lengths"]) == 16
    assert result["no_gpu"] == "no driver here; needed: a GPU"
    assert result["compiled"] == [str(decode_spec(dtype, 512, 64, 8)) for dtype in ("bfloat16", "float16")]
    tokens, seconds = sum(result["lengths"]), result["median_us"] * 1e-6
    assert result["tb_per_s"] == pytest.approx(tokens * 576 * 2 / seconds * 1e-12)
    assert result["tflop_per_s"] == pytest.approx(2 * 16 * tokens * (576 + 512) / seconds * 1e-12)


@pytest.mark.usefixtures("sources", "no_gpu")
def test_the_demo_fails_when_the_result_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ACCEPTED_ERROR", 1e-6)
    status, text = run(capsys, "demo")
    assert status == 1
    assert text.endswith("OUT OF TOLERANCE of the float64 result.\n")


@pytest.mark.usefixtures("sources", "no_gpu")
def test_the_demo_without_nvrtc_still_decodes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    status, text = run(capsys, "demo")
    assert status == 0
    assert "Compiled no kernels: kernels cannot be compiled here" in text


@pytest.mark.usefixtures("no_gpu")
def test_a_kernel_that_does_not_compile_fails_with_the_log(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "mla_decode.cu").write_text(STAND_IN + "nonsense;")
    for verb in ("demo", "compile"):
        assert cli.main([verb]) == 1
        errors = capsys.readouterr().err
        assert "etap-rt: mla_decode[GENERAL=0, IS_BF16=1" in errors
        assert "nonsense" in errors


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose work is done by the CPU backend."""
    monkeypatch.setattr(demo, "why_no_gpu", lambda: "")
    monkeypatch.setattr(demo, "gpu_library", lambda: "numpy")
    monkeypatch.setattr(demo, "SHORTEST_ON_GPU", 3)
    monkeypatch.setattr(driver, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(demo, "time_on_gpu", lambda trial, other: (61.0, 50.0, 70.0))


@pytest.mark.usefixtures("pretended_gpu")
def test_the_demo_on_a_gpu_tells_time_and_rates(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "demo")
    assert status == 0
    assert "on NVIDIA H200, with arrays of numpy." in text
    assert "time        61.0 us a call, median of 3 (50.0 to 70.0), L2 cache cleaned" in text
    assert "TB/s of cache read" in text
    assert "TFLOP/s" in text
    assert "No GPU" not in text
    assert run_json(capsys, "demo")[1]["no_gpu"] is None


def test_times_on_the_gpu_are_those_of_the_call_after_cleaning_the_l2_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

    class Trial:
        def __init__(self, name: str) -> None:
            self.name = name

        def decode(self) -> None:
            log.append(self.name)

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda start, end: 0.05)
    trial, other = Trial("call"), Trial("clean")
    assert demo.time_on_gpu(trial, other) == (50.0,) * demo.GPU_RUNS  # type: ignore[arg-type]
    assert log == ["clean", "clean", "record", "call", "record", "synchronize"] * demo.GPU_RUNS


@pytest.mark.usefixtures("sources", "no_gpu")
def test_the_doctor_without_a_gpu_finds_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(capsys, "doctor")
    assert status == 1
    assert not result["gpu_decode"]
    states = {finding["name"]: finding["state"] for finding in result["findings"]}
    assert states["NVRTC"] == states["compile"] == states["cache"] == "ok"
    assert states["driver"] == states["GPU"] == states["decode"] == "missing"
    compiler._compiled.clear()  # as in a new process
    status, text = run(capsys, "doctor")
    assert status == 1
    assert f"{decode_spec('bfloat16', 512, 64, 16)} read from the disk cache" in text
    assert text.endswith("Decode on the GPU does not work here.\n")


@pytest.mark.usefixtures("sources", "pretended_gpu")
def test_the_doctor_where_all_is_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver_version", lambda: 13000)
    monkeypatch.setattr(driver, "device_count", lambda: 1)
    monkeypatch.setattr(driver, "sm_count", lambda device: 132)
    monkeypatch.setattr(driver, "compute_capability", lambda device: (9, 0))
    status, text = run(capsys, "doctor")
    assert status == 0
    assert "0: NVIDIA H200, 132 SMs" in text
    assert "of the output's size away from float64" in text
    assert text.endswith("Decode on the GPU works here.\n")

    monkeypatch.setattr(demo, "ACCEPTED_ERROR", 1e-6)
    status, text = run(capsys, "doctor")
    assert status == 1
    assert "wrong result" in text

    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (14, 0))
    assert "the driver is for CUDA 13.0, the compiler for CUDA 14; needed" in run(capsys, "doctor")[1]


def test_the_doctor_survives_what_a_broken_installation_raises() -> None:
    def broken() -> str:
        raise ZeroDivisionError("very broken")

    finding = doctor._finding("it", broken)
    assert (finding.state, finding.text) == ("missing", "ZeroDivisionError: very broken")


def test_the_doctor_says_where_the_cache_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "cannot be written; set ETAP_RT_CACHE_DIR" in doctor._cache().text
    monkeypatch.setattr(compiler, "cache_directory", lambda: None)
    assert doctor._cache().state == "note"


@pytest.mark.usefixtures("sources")
def test_compile_builds_all_kernels_into_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(capsys, "compile", "--report", "--arch", "sm_90a")
    assert status == 0
    assert [kernel["kernel"] for kernel in result["kernels"]] == [str(spec) for spec in SPECS]
    for kernel in result["kernels"]:
        assert Path(kernel["path"]).stat().st_size == kernel["bytes"]
        assert not kernel["from_cache"]
        assert kernel["report"]["registers"] > 0
        assert kernel["report"]["spill_store_bytes"] == kernel["report"]["stack_bytes"] == 0
        assert kernel["report"]["wgmma"] == {}
    compiler._compiled.clear()  # as in a new process
    status, text = run(capsys, "compile", "--report")
    assert status == 0
    assert str(SPECS[1]) in text
    assert text.count("disk cache") == len(SPECS)
    assert "registers" in text
    assert "registers" not in run(capsys, "compile")[1]


@pytest.mark.usefixtures("sources")
def test_the_cache_is_listed_and_cleared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"0 kernels in {tmp_path / 'cache'}." in run(capsys, "cache")[1]
    run(capsys, "compile")
    status, listed = run_json(capsys, "cache")
    assert status == 0
    assert listed["directory"] == str(tmp_path / "cache")
    assert {kernel["kernel"] for kernel in listed["kernels"]} == {str(spec) for spec in SPECS}
    assert str(SPECS[0]) in run(capsys, "cache")[1]
    assert "Deleted 4 files." in run(capsys, "cache", "--clear")[1]
    assert run_json(capsys, "cache", "--clear")[1] == {
        "directory": str(tmp_path / "cache"),
        "problem": None,
        "deleted_files": 0,
        "kernels": [],
    }


@pytest.mark.usefixtures("sources")
def test_a_cache_that_is_refused_is_listed_with_the_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, "compile")
    (tmp_path / "cache").chmod(0o777)
    assert f"No more can be kept: other users may write to {tmp_path / 'cache'}" in run(capsys, "cache")[1]
    result = run_json(capsys, "cache")[1]
    assert "chmod go-w" in result["problem"]
    assert result["kernels"] == []


def test_the_cache_without_a_place(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETAP_RT_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *arguments, **options: Path("~/.cache"))
    assert "0 kernels and no place for any; set ETAP_RT_CACHE_DIR." in run(capsys, "cache")[1]
    assert run_json(capsys, "cache")[1]["directory"] is None


@pytest.mark.parametrize("error", [EtapError("the reason"), PermissionError("the reason")], ids=repr)
def test_an_error_that_people_can_mend_is_one_line_and_status_1(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: demo.Step) -> None:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "etap-rt: the reason\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["compile", "--arch", "sm_80"], ["demo", "--fast"]])
def test_arguments_that_are_not_understood_end_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_progress_is_shown_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cli._progress() as step:
        step("working on [it]")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with cli._progress() as step:
        step("working on [it]")
    assert "working on [it]" in capsys.readouterr().err


def test_kernels_compile_for_the_cache_in_processes_and_tell_progress(
    sources: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Told:
        def __enter__(self) -> Any:
            return told.append

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(cli, "_progress", Told)
    specs = [KernelSpec("mla_decode.cu", "mla_decode", (("LATENT_DIM", n), ("ROWS", 1))) for n in range(3)]
    monkeypatch.setattr(cli, "all_specs", lambda: specs)
    run(capsys, "compile")
    assert told == ["compiling 3 kernels", "1 of 3 kernels", "2 of 3 kernels", "3 of 3 kernels"]


def test_the_real_demo_on_this_machine_ends_in_tolerance() -> None:
    command = [sys.executable, "-m", "etap_rt", "demo", "--json"]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["accepted"]
    assert result["not_compiled"] is None
    assert len(result["compiled"]) == (10 if result["no_gpu"] else 0)
