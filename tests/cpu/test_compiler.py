"""The run-time compiler and its disk cache, on small sources of the tests' own."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from etap_rt import compiler, disk_cache
from etap_rt.compiler import Compiled
from etap_rt.errors import ArgumentError, ArgumentTypeError, CompileError, EtapError, UnsupportedError
from etap_rt.kernels import KernelSpec, kv_write_spec

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
    monkeypatch.setattr(disk_cache, "_warned", False)
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
    major, minor = compiler.nvrtc_version()
    other = (major, minor + 1) if (major, minor) >= compiler.NVRTC_WITH_CACHE else (major, minor - 1)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: other)
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


@pytest.mark.parametrize(("version", "told"), [((12, 3), False), ((12, 8), False), ((12, 9), True), ((13, 0), True)])
def test_an_nvrtc_with_a_cache_of_its_own_is_told_not_to_use_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], told: bool
) -> None:
    """It would give machine code without the log that the report is made of; older ones know no such option."""
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: version)
    assert ("--no-cache" in compiler._job(spec(), "sm_90a").options) == told


def test_a_log_without_a_report_is_an_error() -> None:
    with pytest.raises(EtapError, match="no report on k"):
        compiler.build_report(Compiled(spec(), "sm_90a", b"", None, "ptxas says nothing", (), 0.0, False))


def test_records_are_json_that_people_can_read(workshop: Workshop) -> None:
    workshop.compile()
    (path,) = workshop.cache.glob("*.json")
    record = json.loads(path.read_text())["record"]
    assert record["spec"] == "k[VALUE=3]"
    assert "registers" in record["log"]


# ---- kernel_sources ----

CHANGED = "#pragma once\n__device__ float inner() { return 2.0f; }\n"


@pytest.fixture
def own_sources(workshop: Workshop, tmp_path: Path) -> Path:
    """A directory that replaces one header of the workshop's sources."""
    directory = tmp_path / "my sources"
    (directory / "parts").mkdir(parents=True)
    (directory / "parts" / "inner.cuh").write_text(CHANGED)
    (directory / "notes.txt").write_bytes(b"\xff no source")
    return directory


def test_sources_of_ones_own_replace_the_shipped_ones_of_the_same_path(workshop: Workshop, own_sources: Path) -> None:
    shipped = workshop.compile()
    with compiler.kernel_sources(own_sources):
        own = workshop.compile()
        assert not own.from_cache
        assert workshop.compile().from_cache, "kept on disk as any other"
    assert own.cubin != shipped.cubin
    again = workshop.compile()
    assert again.from_cache and again.cubin == shipped.cubin

    workshop.write("parts/inner.cuh", CHANGED.replace("2.0f", "5.0f"))
    with compiler.kernel_sources(str(own_sources)):
        assert workshop.compile().from_cache, "what is replaced does not matter"
    workshop.write(
        "parts/outer.cuh", '#pragma once\n#include "parts/inner.cuh"\n__device__ float outer() { return 0; }'
    )
    with compiler.kernel_sources(own_sources):
        assert not workshop.compile().from_cache, "what is not replaced does"


def test_sources_of_ones_own_may_include_new_files(workshop: Workshop, own_sources: Path) -> None:
    (own_sources / "new").mkdir()
    (own_sources / "new" / "value.h").write_text("#define NEW_VALUE 2.0f\n")
    (own_sources / "parts" / "inner.cuh").write_text('#include "new/value.h"\n' + CHANGED.replace("2.0f", "NEW_VALUE"))
    with compiler.kernel_sources(own_sources):
        assert workshop.compile().cubin.startswith(b"\x7fELF")


def test_errors_in_sources_of_ones_own_lead_to_the_file_and_line(workshop: Workshop, own_sources: Path) -> None:
    (own_sources / "k.cu").write_text(SOURCE.replace("VALUE", "nothing"))
    (own_sources / "parts" / "inner.cuh").write_text(CHANGED.replace("2.0f", "nonsense"))
    with compiler.kernel_sources(own_sources), pytest.raises(CompileError) as caught:
        workshop.compile()
    assert f'{own_sources}/parts/inner.cuh(2): error: identifier "nonsense" is undefined' in caught.value.log
    assert f'{own_sources}/k.cu(3): error: identifier "nothing" is undefined' in caught.value.log


def test_the_key_of_the_sources_follows_their_contents(workshop: Workshop, own_sources: Path) -> None:
    def key() -> object:
        with compiler.kernel_sources(own_sources):
            return compiler.source_key()

    first = key()
    assert compiler.source_key() is None
    assert first is not None
    assert key() == first and hash(key()) == hash(first)
    (own_sources / "notes.txt").write_text("changed")
    assert key() == first
    (own_sources / "parts" / "inner.cuh").write_text(CHANGED + "\n")
    second = key()
    assert second != first
    (own_sources / "parts" / "inner.cuh").rename(own_sources / "k.cu")
    assert key() not in (first, second)


def test_sources_are_read_once_when_they_are_entered(workshop: Workshop, own_sources: Path) -> None:
    with compiler.kernel_sources(own_sources):
        (own_sources / "parts" / "inner.cuh").write_text("#error changed while in use\n")
        workshop.compile()


def test_sources_end_with_the_block_and_the_inner_one_counts_alone(workshop: Workshop, own_sources: Path) -> None:
    other = own_sources.parent / "other"
    other.mkdir()
    (other / "k.cu").write_text(SOURCE + "// mine\n")
    with compiler.kernel_sources(own_sources):
        outer = compiler.source_key()
        with pytest.raises(KeyError), compiler.kernel_sources(other):
            assert set(compiler._job(spec(), "sm_90a").headers) == {"parts/outer.cuh", "parts/inner.cuh"}
            assert compiler._job(spec(), "sm_90a").headers["parts/inner.cuh"] == HEADERS["parts/inner.cuh"].encode()
            raise KeyError
        assert compiler.source_key() == outer
    assert compiler.source_key() is None


def test_sources_hold_for_one_thread(workshop: Workshop, own_sources: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with compiler.kernel_sources(own_sources), ThreadPoolExecutor(1) as pool:
        assert pool.submit(compiler.source_key).result() is None
        assert compiler.source_key() is not None


def test_kernels_of_other_sources_are_loaded_beside_the_shipped_ones(
    workshop: Workshop, own_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_loaded", {})
    monkeypatch.setattr(compiler, "require_hopper", lambda device: None)
    monkeypatch.setattr(compiler.driver, "load_kernel", lambda cubin, entry, device: cubin)
    shipped: Any = compiler.load(spec(), 0)
    with compiler.kernel_sources(own_sources):
        own: Any = compiler.load(spec(), 0)
        assert compiler.load(spec(), 0) is own
    assert own != shipped
    assert compiler.load(spec(), 0) is shipped


def test_processes_that_compile_get_the_sources_of_ones_own(workshop: Workshop, own_sources: Path) -> None:
    specs = [spec(VALUE=8), spec(VALUE=9)]
    with compiler.kernel_sources(own_sources):
        in_processes = [compiled.cubin for compiled in compiler.compile_specs(specs)]
        assert all(workshop.compile(VALUE=value).from_cache for value in (8, 9))
    assert workshop.compile(VALUE=8).cubin not in in_processes


def test_directories_that_replace_nothing_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    for directory, message in (
        (tmp_path / "none", f"directory: got {tmp_path / 'none'}, accepted is a directory that exists"),
        (
            tmp_path / "empty",
            f"directory: got {tmp_path / 'empty'}, with no sources, accepted is one with a file named",
        ),
        (tmp_path / "typo", f"directory: got {tmp_path / 'typo'}, with kk.cu, accepted is one with a file named"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "typo").mkdir(exist_ok=True)
        (tmp_path / "typo" / "kk.cu").write_text(SOURCE)
        with pytest.raises(ArgumentError) as caught, compiler.kernel_sources(directory):
            pytest.fail("entered")
        assert str(caught.value).startswith(message)
    with pytest.raises(ArgumentTypeError, match="directory: got 7, accepted is a path"), compiler.kernel_sources(7):  # type: ignore[arg-type]
        pytest.fail("entered")


def test_shipped_kernels_compile_from_sources_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    source = (compiler.source_directory() / "kv_write.cu").read_text()
    (own / "kv_write.cu").write_text(source + 'extern "C" __global__ void mine() {}\n')
    with compiler.kernel_sources(own):
        assert "mine" in compiler.compile_spec(kv_write_spec()).log
    assert "'mine'" not in compiler.compile_spec(kv_write_spec()).log


def test_the_sources_of_a_checkout_are_found() -> None:
    assert (compiler.source_directory() / "hopper").is_dir()
