"""The run-time compiler and its disk cache, on small sources of the tests' own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from etap_rt import compiler
from etap_rt.compiler import Compiled
from etap_rt.errors import CompileError, EtapError, UnsupportedError
from etap_rt.kernels import KernelSpec

SOURCE = """
#include "parts/outer.cuh"
extern "C" __global__ void k(float* out) { out[threadIdx.x] = outer() + VALUE; }
extern "C" __global__ void other(float* out) {
    __shared__ float exchange[96];
    exchange[threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = exchange[threadIdx.x ^ 1];
}
"""
HEADERS = {
    "parts/outer.cuh": '#pragma once\n#include "parts/inner.cuh"\n__device__ float outer() { return inner(); }\n',
    "parts/inner.cuh": "#pragma once\n__device__ float inner() { return 1.0f; }\n",
    "parts/unused.cuh": "#error not included\n",
}


@dataclass
class Workshop:
    """A source directory, a cache directory, and a compiler that has just been imported."""

    sources: Path
    cache: Path

    def write(self, name: str, text: str) -> None:
        path = self.sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def compile(self, entry: str = "k", arch: str = "sm_90a", **defines: int) -> Compiled:
        """Compile k.cu as a new process would, with nothing in memory."""
        compiler._compiled.clear()
        return compiler.compile_spec(spec(entry, **defines), arch)

    @property
    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []


def spec(entry: str = "k", **defines: int) -> KernelSpec:
    return KernelSpec("k.cu", entry, tuple(sorted({"VALUE": 3, **defines}.items())))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop(tmp_path / "sources", tmp_path / "cache" / "below")
    for name, text in {"k.cu": SOURCE, **HEADERS}.items():
        made.write(name, text)
    monkeypatch.setattr(compiler, "source_directory", lambda: made.sources)
    monkeypatch.setattr(compiler, "_compiled", {})
    monkeypatch.setattr(compiler, "_warned", False)
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(made.cache))
    return made


def test_a_kernel_is_compiled_once_and_then_read_from_disk(workshop: Workshop) -> None:
    first = workshop.compile()
    assert (first.spec, first.arch, first.from_cache) == (spec(), "sm_90a", False)
    again = workshop.compile()
    assert again.from_cache
    assert (again.cubin, again.log, again.path, again.seconds) == (first.cubin, first.log, first.path, first.seconds)
    assert again.path is not None
    assert again.path.read_bytes() == first.cubin


def test_a_kernel_in_memory_is_not_read_again(workshop: Workshop) -> None:
    first = compiler.compile_spec(spec())
    for path in workshop.files:
        path.unlink()
    assert compiler.compile_spec(spec()) is first


def test_the_cubin_is_a_whole_elf_file(workshop: Workshop) -> None:
    cubin = workshop.compile().cubin
    offset, size, count = (int.from_bytes(cubin[at : at + n], "little") for at, n in ((0x20, 8), (0x36, 2), (0x38, 2)))
    assert cubin.startswith(b"\x7fELF")
    assert offset + size * count <= len(cubin), "the program headers, at the end, are all there"


@pytest.mark.parametrize("name", ["k.cu", "parts/outer.cuh", "parts/inner.cuh"])
def test_any_change_of_the_sources_is_compiled(workshop: Workshop, name: str) -> None:
    before = workshop.compile()
    path = workshop.sources / name
    path.write_text(path.read_text().replace("float", "float /* changed */"))
    assert not workshop.compile().from_cache
    path.write_text(path.read_text().replace(" /* changed */", ""))
    assert workshop.compile().cubin == before.cubin
    assert workshop.compile().from_cache


def test_a_header_that_is_not_included_does_not_matter(workshop: Workshop) -> None:
    workshop.compile()
    workshop.write("parts/unused.cuh", "#error changed\n")
    assert workshop.compile().from_cache


def test_headers_that_appear_later_are_noticed(workshop: Workshop) -> None:
    workshop.write("k.cu", SOURCE + '#if __has_include("late.cuh")\n#include "late.cuh"\n#endif\n')
    workshop.compile()
    workshop.write("late.cuh", "#pragma once\n")
    assert not workshop.compile().from_cache


@pytest.mark.parametrize(
    "changes",
    [{"VALUE": 4}, {"MORE": 1}, {"entry": "other"}, {"arch": "sm_90"}],
    ids=["value", "define", "entry", "arch"],
)
def test_what_is_asked_for_is_part_of_the_key(workshop: Workshop, changes: Any) -> None:
    workshop.compile()
    assert not workshop.compile(**changes).from_cache
    assert workshop.compile().from_cache
    assert workshop.compile(**changes).from_cache


def test_another_nvrtc_compiles_anew(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.compile()
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 1))
    assert not workshop.compile().from_cache


def test_options_are_part_of_the_key(workshop: Workshop) -> None:
    job = compiler._job(spec(), "sm_90a")
    keys = {
        compiler._key(spec(), options, (13, 0), job.source, job.headers)
        for options in (job.options, job.options[:-1], (*job.options, "-lineinfo"), ("".join(job.options),))
    }
    assert len(keys) == 4


def test_contents_do_not_run_together_in_the_key() -> None:
    pairs = [(b"ab", {"c": b"d"}), (b"abc", {"": b"d"}), (b"a", {"b": b"cd"}), (b"ab", {"cd": b""}), (b"abcd", {})]
    assert len({compiler._key(spec(), (), (13, 0), source, headers) for source, headers in pairs}) == len(pairs)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "cubin cut off": lambda cubin, record: cubin.write_bytes(cubin.read_bytes()[:-100]),
    "cubin empty": lambda cubin, record: cubin.write_bytes(b""),
    "cubin longer": lambda cubin, record: cubin.write_bytes(cubin.read_bytes() + b"\0"),
    "cubin changed": lambda cubin, record: flip(cubin, 1500),
    "cubin gone": lambda cubin, record: cubin.unlink(),
    "record cut off": lambda cubin, record: record.write_bytes(record.read_bytes()[:-10]),
    "record empty": lambda cubin, record: record.write_bytes(b""),
    "record not JSON": lambda cubin, record: record.write_bytes(b"\xff\x00" * 100),
    "record of another kind": lambda cubin, record: record.write_text("[1, 2]"),
    "record without a cubin": lambda cubin, record: record.write_text('{"checksum": "", "record": {}}'),
    "log changed": lambda cubin, record: record.write_text(record.read_text().replace("registers", "Registers")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_rebuilt(workshop: Workshop, damage: str) -> None:
    whole = workshop.compile()
    assert whole.path is not None
    (record,) = workshop.cache.glob("*.json")
    DAMAGES[damage](whole.path, record)
    rebuilt = workshop.compile()
    assert not rebuilt.from_cache
    assert (rebuilt.cubin, rebuilt.path) == (whole.cubin, whole.path)
    assert whole.path.read_bytes() == whole.cubin
    assert workshop.compile().from_cache


ONE_OF_EIGHT = """
import hashlib, pathlib, sys
from etap_rt import compiler
from etap_rt.kernels import KernelSpec
compiler.source_directory = lambda: pathlib.Path(sys.argv[1])
compiler.nvrtc_version()
print("ready", flush=True)
sys.stdin.readline()
compiled = compiler.compile_spec(KernelSpec("k.cu", "k", (("VALUE", 3),)))
assert compiled.path.read_bytes() == compiled.cubin
print(hashlib.sha256(compiled.cubin).hexdigest(), flush=True)
"""


def test_eight_processes_at_once_all_get_the_kernel(workshop: Workshop) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_EIGHT, str(workshop.sources)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    results = []
    for process in processes:  # the first line starts each of them; none waits for another
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        results.append(process.communicate()[0].strip())
        assert process.returncode == 0
    assert len(set(results)) == 1
    assert [path.suffix for path in workshop.files] == [".json", ".cubin"]
    assert workshop.compile().from_cache


def test_eight_threads_at_once_compile_one_time(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    compiled_here = []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda job: compiled_here.append(job) or original(job))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(compiler.compile_spec, [spec()] * 8))
    assert len(compiled_here) == 1
    assert all(result.cubin == results[0].cubin for result in results)


def test_many_kernels_are_compiled_in_processes_of_their_own(workshop: Workshop) -> None:
    first = compiler.compile_spec(spec(VALUE=1))
    finished: list[Compiled] = []
    specs = [spec(VALUE=1), spec(VALUE=2), spec("other"), spec(VALUE=2)]
    results = compiler.compile_specs(specs, finished=finished.append)
    assert [result.spec for result in results] == specs
    assert results[0] is first
    assert {result.spec for result in finished} == set(specs)
    assert all(result.path is not None and result.path.exists() for result in results)
    assert workshop.compile("other").cubin == results[2].cubin
    assert all(result.from_cache for result in compiler.compile_specs(specs[2:]) if result.spec == spec(VALUE=2))


def test_an_error_in_another_process_arrives_whole(workshop: Workshop) -> None:
    with pytest.raises(CompileError) as caught:
        compiler.compile_specs([KernelSpec("k.cu", "k", ()), KernelSpec("k.cu", "k", (("X", 1),))])
    assert 'identifier "VALUE" is undefined' in caught.value.log
    assert caught.value.spec in (KernelSpec("k.cu", "k", ()), KernelSpec("k.cu", "k", (("X", 1),)))


@pytest.mark.parametrize("place", ["below a file", "a file", "no user cache directory", "full disk"])
def test_without_a_place_to_write_kernels_stay_in_memory_with_one_warning(
    workshop: Workshop, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    if place == "no user cache directory":
        monkeypatch.delenv("ETAP_RT_CACHE_DIR")
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda *arguments, **options: Path("~/.cache/etap_rt"))
    elif place == "full disk":

        def full(path: Path, content: bytes) -> int:
            with path.open("wb") as file:
                file.write(content[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "file" / ("x" if place == "below a file" else "")))

    with pytest.warns(RuntimeWarning, match="ETAP_RT_CACHE_DIR") as caught:
        first = compiler.compile_spec(spec())
        assert compiler.compile_spec(spec()) is first, "memory still works"
        second = compiler.compile_spec(spec(VALUE=5))
    assert len(caught) == 1
    assert first.path is None
    assert second.path is None
    assert first.cubin.startswith(b"\x7fELF")
    assert workshop.files == [], "nothing half-written is left"
    assert compiler.cache_entries() == []
    assert compiler.clear_cache() == 0


def test_a_cache_that_can_only_be_read_is_used_without_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.compile()

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(compiler, "_write_file", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert workshop.compile().from_cache


def test_the_environment_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "there"))
    assert compiler.cache_directory() == tmp_path / "there"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "~/kernels")
    assert compiler.cache_directory() == tmp_path / "kernels"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "kernels")
    assert compiler.cache_directory() == tmp_path / "kernels"
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_directory() == platformdirs.user_cache_path("etap_rt", appauthor=False)


def test_a_compile_error_says_what_was_compiled_how_and_why_not(workshop: Workshop) -> None:
    workshop.write("parts/inner.cuh", "__device__ float inner() { return nonsense; }\n")
    with pytest.raises(CompileError) as caught:
        workshop.compile()
    error = caught.value
    assert isinstance(error, EtapError)
    assert error.spec == spec()
    assert "-DVALUE=3" in error.options
    assert "-arch=sm_90a" in error.options
    assert 'parts/inner.cuh(1): error: identifier "nonsense" is undefined' in error.log
    for part in (str(spec()), "-DVALUE=3", error.log.strip()):
        assert part in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.spec, copy.options, copy.log) == (error.spec, error.options, error.log)
    assert workshop.files == []


def test_a_header_that_is_not_there_is_a_compile_error(workshop: Workshop) -> None:
    workshop.write("k.cu", '#include "parts/none.cuh"\n')
    with pytest.raises(CompileError, match=r'cannot open source file "parts/none.cuh"'):
        workshop.compile()


def test_an_architecture_that_nvrtc_does_not_know_is_a_compile_error(workshop: Workshop) -> None:
    with pytest.raises(CompileError, match="sm_12"):
        workshop.compile(arch="sm_12")


def test_without_cupy_the_error_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(UnsupportedError, match=r"etap-rt\[cuda13\]"):
        workshop.compile()


def test_an_nvrtc_that_cannot_compile_for_hopper_is_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", lambda: (12, 2))
    with pytest.raises(UnsupportedError, match=r"NVRTC 12\.2 .*NVRTC 12\.3 or newer"):
        workshop.compile()


def test_the_report_is_about_the_entry_that_was_asked_for(workshop: Workshop) -> None:
    report = compiler.build_report(workshop.compile("other"))
    assert report.shared == 96 * 4
    assert 0 < report.registers < 64
    assert (report.stack, report.spill_stores, report.spill_loads, report.wgmma) == (0, 0, 0, ())
    assert not report.serialized_wgmma
    assert compiler.build_report(workshop.compile("k")).shared == 0


def test_the_report_shows_local_memory(workshop: Workshop) -> None:
    body = "float a[64]; for (int i = 0; i < 64; ++i) a[i * n % 64] = out[i]; out[0] = a[n];"
    workshop.write("k.cu", f'extern "C" __global__ void k(float* out, int n) {{ {body} }}')
    assert compiler.build_report(workshop.compile()).stack == 64 * 4


def test_the_report_shows_spills(workshop: Workshop) -> None:
    body = "float a[64]; for (int i = 0; i < 64; ++i) a[i] = out[i]; __syncthreads();"
    body += "for (int i = 0; i < 64; ++i) out[63 - i] = a[i] * a[i ^ 21];"
    workshop.write("k.cu", f'extern "C" __global__ void __maxnreg__(32) k(float* out) {{ {body} }}')
    report = compiler.build_report(workshop.compile())
    assert report.registers == 32
    assert report.spill_stores > 0
    assert report.spill_loads > 0


@pytest.mark.parametrize("between", ["", "d[0] += p.out[threadIdx.x];"], ids=["asynchronous", "serialized"])
def test_the_report_counts_wgmma_and_says_whether_it_was_serialized(workshop: Workshop, between: str) -> None:
    operands = "{%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(4))
    workshop.write(
        "k.cu",
        f"""
        struct Params {{ float* out; unsigned long long a; }};
        __device__ __forceinline__ void multiply(float (&d)[4], unsigned long long a) {{
            asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {operands}" : {outputs} : "l"(a));
        }}
        extern "C" __global__ void k(const __grid_constant__ Params p) {{
            float d[4] = {{p.out[0], p.out[1], p.out[2], p.out[3]}};
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            multiply(d, p.a);
            {between}
            multiply(d, p.a + 1);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            p.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
        }}""",
    )
    report = compiler.build_report(workshop.compile())
    assert report.wgmma == (("m64n8k16", 2),)
    assert report.serialized_wgmma == bool(between)


def test_a_log_without_a_report_is_an_error() -> None:
    with pytest.raises(EtapError, match="no report on k"):
        compiler.build_report(Compiled(spec(), "sm_90a", b"", None, "ptxas says nothing", (), 0.0, False))


def test_entries_are_listed_and_cleared_and_other_files_left_alone(workshop: Workshop) -> None:
    workshop.compile()
    kept = workshop.compile("other")
    (workshop.cache / "notes.json").write_text("mine")
    (workshop.cache / f".tmp-{'0' * 16}").write_text("left by a process that was killed")
    listed = compiler.cache_entries()
    assert [entry.spec for entry in listed] == [str(spec()), str(spec("other"))]
    assert (listed[1].path, listed[1].size_bytes, listed[1].arch) == (kept.path, len(kept.cubin), "sm_90a")
    listed[0].path.write_bytes(b"broken")
    assert [entry.spec for entry in compiler.cache_entries()] == [str(spec("other"))]
    assert compiler.clear_cache() == 5
    assert [path.name for path in workshop.files] == ["notes.json"]
    assert compiler.cache_entries() == []
    assert not workshop.compile().from_cache


def test_records_are_json_that_people_can_read(workshop: Workshop) -> None:
    workshop.compile()
    (path,) = workshop.cache.glob("*.json")
    record = json.loads(path.read_text())["record"]
    assert record["spec"] == "k[VALUE=3]"
    assert "registers" in record["log"]


def test_the_sources_of_a_checkout_are_found() -> None:
    assert (compiler.source_directory() / "hopper").is_dir()
