"""What the doctor tells support, on machines that are made up."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from etap_rt import demo, doctor, driver
from etap_rt.errors import EtapError, UnsupportedError


def test_every_finding_is_made_without_a_gpu() -> None:
    names = [finding.name for finding in doctor.examine(lambda text: None)]
    assert names == ["Python", "CuPy", "NVRTC", "compile", "driver", "GPU", "decode", "cache", "torch", "environment"]


def test_nvrtc_is_named_with_its_file() -> None:
    assert "libnvrtc.so" in doctor._nvrtc()


def test_a_library_that_is_not_loaded_has_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._mapped("libnothing.so") == ""
    maps = tmp_path / "maps"
    line = "7f00-7f10 r-xp 00000000 08:01 5  /usr/lib/a directory/libcuda.so.580.95\n"
    maps.write_text("7f00-7f10 rw-p 00000000 00:00 0\n" + 2 * line)
    monkeypatch.setattr(doctor, "MAPPED_FILES", maps)
    assert doctor._mapped("libcuda.so") == "/usr/lib/a directory/libcuda.so.580.95"
    monkeypatch.setattr(doctor, "MAPPED_FILES", tmp_path / "none")
    assert doctor._mapped("libcuda.so") == ""


def test_two_cupy_packages_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_package_names", lambda: ["cupy-cuda12x", "numpy", "cupy-cuda13x"])
    monkeypatch.setattr(driver, "driver_version", lambda: 12040)
    finding = doctor._finding("CuPy", doctor._cupy)
    assert finding.state == "missing"
    assert "cupy-cuda12x and cupy-cuda13x are installed over each other" in finding.text
    assert "pip uninstall cupy-cuda12x cupy-cuda13x; pip install 'etap-rt[cuda12]'" in finding.text


def test_a_missing_cupy_names_the_package_that_fits_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(driver, "driver_version", lambda: 13000)
    assert doctor._finding("CuPy", doctor._cupy).text.endswith("needed: pip install 'etap-rt[cuda13]'")

    def no_driver() -> int:
        raise UnsupportedError("no driver", "one")

    monkeypatch.setattr(driver, "driver_version", no_driver)
    assert "[cuda12] with a driver for CUDA 12" in doctor._finding("CuPy", doctor._cupy).text


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2026\n", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
        ("something else\n", ""),
    ],
)
def test_the_driver_is_named_by_its_own_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(doctor, "MODULE_VERSION", tmp_path / "version")
    assert doctor._module_version() == version
    monkeypatch.setattr(driver, "driver_version", lambda: 13000)
    assert doctor._driver().startswith(f"{version}, for CUDA 13.0 and older" if version else "for CUDA 13.0 and older")
    monkeypatch.setattr(doctor, "MODULE_VERSION", tmp_path / "none")
    assert doctor._module_version() == ""


def test_the_self_test_repeats_the_call_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "gpu_library", lambda: "numpy")
    monkeypatch.setattr(doctor, "TRIAL_LENGTHS", (1, 65))
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.3)
    assert "the same bits " in doctor._decode()


def test_the_self_test_notices_changing_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "gpu_library", lambda: "numpy")
    monkeypatch.setattr(doctor, "TRIAL_LENGTHS", (1, 65))
    decode = demo.Trial.decode

    def unstable(trial: demo.Trial, return_lse: bool = False) -> Any:
        result = decode(trial, return_lse)
        if not return_lse:
            result[0, 0, 0, 0] += 1
        return result

    monkeypatch.setattr(demo.Trial, "decode", unstable)
    with pytest.raises(EtapError, match="call 1 gave another result than the first"):
        doctor._decode()


def test_variables_that_matter_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*doctor.VARIABLES, "ETAP_RT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert doctor._environment().text == "nothing set that matters"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "/there")
    assert doctor._environment().text == "CUDA_VISIBLE_DEVICES=3, ETAP_RT_CACHE_DIR=/there"
