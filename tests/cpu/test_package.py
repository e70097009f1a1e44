"""What is shipped: the wheel and the source distribution, and what importing them needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import etap_rt

ROOT = Path(__file__).parents[2]
WITHOUT_GPU_LIBRARIES = "import sys; sys.modules.update({name: None for name in ('torch', 'cupy', 'cuda')})\n"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(directory)], cwd=ROOT, check=True)
    return directory


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def run(code: str, path: Path, cwd: Path, **environment: str | None) -> str:
    """Run Python code in a new process that imports etap_rt from `path`; a variable that is None is not there."""
    changed = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    variables = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_wheel_is_pure_python_with_the_cuda_sources_in_it(wheel: Path) -> None:
    assert wheel.name == f"etap_rt-{etap_rt.__version__}-py3-none-any.whl"
    shipped = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"etap_rt/{path.relative_to(ROOT)}" for path in (ROOT / "cuda_src").rglob("*.cu*")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "etap_rt").rglob("*.py")}
    assert "etap_rt/cuda_src/mla_decode.cu" in sources
    assert "etap_rt/cuda_src/hopper/wgmma.cuh" in sources
    assert sources | modules | {"etap_rt/py.typed"} <= shipped
    assert {name.partition("/")[0] for name in shipped} == {"etap_rt", f"etap_rt-{etap_rt.__version__}.dist-info"}


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    info = f"etap_rt-{etap_rt.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        assert b"etap-rt = etap_rt.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["Version"] == etap_rt.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cuda12", "cuda13", "torch", "test", "tools", "dev"}
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(text.partition(">")[0] for text in required) == ["ml-dtypes", "numpy", "platformdirs", "rich"]


def test_the_source_distribution_can_be_built_and_tested(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "cuda_src/mla_decode.cu", "tests/cases.py")
    assert set(wanted) <= names


def test_kernels_compile_from_a_wheel_that_was_never_unpacked(wheel: Path, tmp_path: Path) -> None:
    code = (
        "from etap_rt import compiler, kernels\n"
        "compiled = compiler.compile_spec(kernels.kv_write_spec())\n"
        "print(compiler.__file__, compiled.path.parent, compiled.cubin[1:4].decode(), sep='|')\n"
    )
    module, cache, magic = run(code, wheel, tmp_path, ETAP_RT_CACHE_DIR=str(tmp_path / "cache")).split("|")
    assert module.startswith(str(wheel))
    assert (cache, magic) == (str(tmp_path / "cache"), "ELF")


def test_nothing_is_written_into_the_package(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    code = (
        "from etap_rt import compiler, kernels\n"
        "compiled = compiler.compile_spec(kernels.kv_write_spec())\n"
        "print(compiler.source_directory())\n"
    )
    assert run(code, site, tmp_path, ETAP_RT_CACHE_DIR=str(tmp_path / "cache")) == str(site / "etap_rt" / "cuda_src")
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "cupy", "cuda", "rich", "platformdirs", "safetensors"}
    # Of what is loaded before, as by the .pth files of an environment, nobody can blame etap_rt.
    code = f"import sys\nheavy = {heavy!r} - set(sys.modules)\nimport etap_rt\nprint(sorted(heavy & set(sys.modules)))"
    assert run(code, ROOT, tmp_path) == "[]"


@pytest.mark.parametrize("home", ["missing", "not set", "a file"])
def test_without_gpu_libraries_and_home_the_cpu_backend_works(home: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    homes = {"missing": str(tmp_path / "nobody"), "not set": None, "a file": str(tmp_path / "file")}
    code = WITHOUT_GPU_LIBRARIES + (
        "import numpy as np, etap_rt\n"
        "q, cache = np.ones((1, 1, 2, 576), np.float16), np.ones((1, 64, 576), np.float16)\n"
        "table, lengths = np.zeros((1, 1), np.int32), np.array([3], np.int32)\n"
        "print(etap_rt.mla_decode(q, cache, table, lengths, softmax_scale=0.1).min())\n"
    )
    unset = {"XDG_CACHE_HOME": None, "ETAP_RT_CACHE_DIR": None}
    assert run(code, ROOT, tmp_path, HOME=homes[home], **unset) == "1.0"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing was written"


def test_without_gpu_libraries_the_command_line_works(tmp_path: Path) -> None:
    code = WITHOUT_GPU_LIBRARIES + "from etap_rt.cli import main\nmain(['cache']), main(['doctor'])\n"
    text = run(code, ROOT, tmp_path, ETAP_RT_CACHE_DIR=str(tmp_path / "cache"))
    assert "0 kernels in" in text
    assert "pip install 'etap-rt[cuda13]'" in text
    assert "Decode on the GPU does not work here." in text
