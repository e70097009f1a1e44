"""The disk cache when things go wrong: damage, strangers, no room, and processes that are killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from etap_rt import compiler, disk_cache
from etap_rt.disk_cache import LIMIT_VARIABLE, SHARED_VARIABLE
from etap_rt.kernels import KernelSpec
from tests.processes import ROOT, environment

KERNEL = 'extern "C" __global__ void k(float* out) { out[threadIdx.x] = VALUE; }\n'
OTHER_USER = 54321
A_DAY = 86400.0

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory that does not exist yet, and a compiler that has just been imported."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "k.cu").write_text(KERNEL)
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path / "sources")
    monkeypatch.setattr(compiler, "_compiled", {})
    monkeypatch.setattr(disk_cache, "_warned", False)
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(tmp_path / "below" / "cache"))
    for name in (SHARED_VARIABLE, LIMIT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "below" / "cache"


def compile_as_new_process(value: int = 3) -> compiler.Compiled:
    compiler._compiled.clear()
    return compiler.compile_spec(KernelSpec("k.cu", "k", (("VALUE", value),)))


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def keep(number: int, size: int = 1000) -> Path | None:
    """Store entry `number`: its content is its number, over and over."""
    content = str(number).encode() * size
    return disk_cache.store(key(number), "k", content[:size], {"spec": f"k{number}", "arch": "a", "seconds": 0.5})


def kept(number: int, size: int = 1000) -> bool:
    """Whether entry `number` is found; and if so, whole."""
    found = disk_cache.find(key(number))
    assert found is None or found.cubin == (str(number).encode() * size)[:size]
    return found is not None


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def make_old(path: Path, seconds: float = A_DAY) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


# ---- Damage ----


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def change_log(record: Path) -> None:
    content = json.loads(record.read_text())
    content["record"]["log"] += "more"
    record.write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "cubin cut off": lambda cubin, record: cubin.write_bytes(cubin.read_bytes()[:-100]),
    "cubin empty": lambda cubin, record: cubin.write_bytes(b""),
    "cubin longer": lambda cubin, record: cubin.write_bytes(cubin.read_bytes() + b"\0"),
    "cubin changed": lambda cubin, record: flip(cubin, 1500),
    "cubin gone": lambda cubin, record: cubin.unlink(),
    "cubin a pipe": lambda cubin, record: replace_by_pipe(cubin),
    "cubin unreadably large": lambda cubin, record: os.truncate(cubin, disk_cache.MAX_FILE_BYTES + 1),
    "record cut off": lambda cubin, record: record.write_bytes(record.read_bytes()[:-10]),
    "record empty": lambda cubin, record: record.write_bytes(b""),
    "record not JSON": lambda cubin, record: record.write_bytes(b"\xff\x00" * 100),
    "record nested too deep": lambda cubin, record: record.write_text("[" * 100_000),
    "record of another kind": lambda cubin, record: record.write_text("[1, 2]"),
    "record without a cubin": lambda cubin, record: record.write_text('{"checksum": "", "record": {}}'),
    "record a pipe": lambda cubin, record: replace_by_pipe(record),
    "log changed": lambda cubin, record: change_log(record),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_rebuilt(cache: Path, damage: str) -> None:
    whole = compile_as_new_process()
    assert whole.path is not None
    (record,) = cache.glob("*.json")
    DAMAGES[damage](whole.path, record)
    rebuilt = compile_as_new_process()
    assert not rebuilt.from_cache
    assert (rebuilt.cubin, rebuilt.path) == (whole.cubin, whole.path)
    assert whole.path.read_bytes() == whole.cubin
    assert compile_as_new_process().from_cache


def test_the_cubin_of_another_kernel_is_noticed(cache: Path) -> None:
    first, second = compile_as_new_process(1), compile_as_new_process(2)
    assert first.path is not None and second.path is not None
    shutil.copy(second.path, first.path)
    again = compile_as_new_process(1)
    assert not again.from_cache and again.cubin == first.cubin


def test_the_whole_entry_of_another_kernel_is_noticed(cache: Path) -> None:
    compile_as_new_process(1)
    (first,) = cache.glob("*.json")
    right = compile_as_new_process(2)
    (second,) = set(cache.glob("*.json")) - {first}
    shutil.copy(first, second)  # a record in itself, with its cubin, in the other one's place
    again = compile_as_new_process(2)
    assert not again.from_cache and again.cubin == right.cubin
    assert [entry.spec for entry in disk_cache.cache_entries()] == ["k[VALUE=1]", "k[VALUE=2]"]


def test_a_record_that_names_a_file_elsewhere_is_not_followed(cache: Path, tmp_path: Path) -> None:
    keep(1)
    path = cache / f"{key(1)}.json"
    record = json.loads(path.read_text())["record"]
    shutil.copy(cache / record["cubin"], tmp_path / record["cubin"])
    record["cubin"] = f"../../{record['cubin']}"
    path.write_text(json.dumps({"checksum": disk_cache._checksum(record), "record": record}))
    assert not kept(1)


def test_entries_of_another_version_are_left_to_the_cleaning(cache: Path) -> None:
    keep(1)
    path = cache / f"{key(1)}.json"
    record = json.loads(path.read_text())["record"]
    del record["key"]
    path.write_text(json.dumps({"checksum": disk_cache._checksum(record), "record": record}))
    assert disk_cache.cache_entries() == []
    assert not kept(1)
    assert keep(1) and kept(1)


def test_entries_are_listed_and_cleared_and_other_files_left_alone(cache: Path) -> None:
    compile_as_new_process(1)
    second = compile_as_new_process(2)
    (cache / "notes.json").write_text("mine")
    left = cache / f".tmp-{'0' * 16}"
    left.write_text("left by a process that was killed")
    make_old(left)
    listed = compiler.cache_entries()
    assert [entry.spec for entry in listed] == ["k[VALUE=1]", "k[VALUE=2]"]
    assert (listed[1].path, listed[1].size_bytes, listed[1].arch) == (second.path, len(second.cubin), "sm_90a")
    listed[0].path.write_bytes(b"broken")
    assert [entry.spec for entry in compiler.cache_entries()] == ["k[VALUE=2]"]
    assert compiler.clear_cache() == 5
    assert names(cache) == {"notes.json"}
    assert compiler.cache_entries() == []
    assert not compile_as_new_process(1).from_cache


def test_what_cannot_be_deleted_is_told_when_all_else_is_gone(cache: Path) -> None:
    keep(1)
    keep(2)
    (cache / f"{key(3)}.json").mkdir()
    with pytest.raises(OSError, match=key(3)):
        compiler.clear_cache()
    assert names(cache) == {f"{key(3)}.json"}


# ---- Strangers ----


def test_what_is_written_is_private_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        keep(1)
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}


def refused(cache: Path, reason: str) -> None:
    """Nothing is read from the cache nor written to it, with one warning for the process."""
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    with pytest.warns(RuntimeWarning, match=re.escape(reason)) as caught:
        first, second = compile_as_new_process(), compile_as_new_process(4)
    assert len(caught) == 1
    assert not first.from_cache and first.path is None and first.cubin.startswith(b"\x7fELF")
    assert second.path is None
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert compiler.cache_entries() == []
    assert reason in compiler.cache_problem()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702, 0o720])
def test_a_directory_that_others_may_write_is_refused(cache: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as_new_process()
    cache.chmod(mode)
    refused(cache, f"other users may write to {cache}")

    monkeypatch.setenv(SHARED_VARIABLE, "1")
    assert compile_as_new_process().from_cache
    assert compiler.cache_problem() == ""
    keep(1)
    assert (cache / f"{key(1)}.json").stat().st_mode & 0o777 == 0o644 & ~_umask(), "others may read what they share"
    monkeypatch.setenv(SHARED_VARIABLE, "0")
    assert not compile_as_new_process().from_cache


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@as_root
def test_a_directory_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as_new_process()
    os.chown(cache, OTHER_USER, -1)
    refused(cache, f"other users may write to {cache} (owner {OTHER_USER}, mode 0700)")
    monkeypatch.setenv(SHARED_VARIABLE, "1")
    assert compile_as_new_process().from_cache


@as_root
def test_files_of_another_user_are_not_believed(cache: Path) -> None:
    path = keep(1)
    assert path is not None and kept(1)
    os.chown(path, OTHER_USER, -1)
    assert not kept(1)
    assert keep(1) and kept(1)


def test_files_that_others_may_write_are_not_believed(cache: Path) -> None:
    path = keep(1)
    assert path is not None
    path.chmod(0o622)
    assert not kept(1)
    assert keep(1) and kept(1)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("which", ["record", "cubin"])
def test_a_symbolic_link_in_place_of_an_entry_is_replaced_not_followed(cache: Path, tmp_path: Path, which: str) -> None:
    cubin = keep(1)
    assert cubin is not None
    path = cubin if which == "cubin" else cache / f"{key(1)}.json"
    target = tmp_path / "target"
    path.rename(target)
    content = target.read_bytes()
    make_old(target)
    before = target.stat()
    path.symlink_to(target)
    assert not kept(1), "the same bytes, but through a link"
    assert compiler.cache_entries() == []
    target.write_bytes(b"precious")
    assert keep(1) == cubin and kept(1)
    assert not path.is_symlink() and path.read_bytes() == content
    assert target.read_bytes() == b"precious"
    assert target.stat().st_mode == before.st_mode


def test_links_are_not_followed_by_the_cleaning(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    keep(1)
    for link in (cache / f"{key(7)}.json", cache / f".tmp-{'0' * 16}"):
        link.symlink_to(target)
        make_old(link)
    monkeypatch.setattr(disk_cache, "_limit_bytes", lambda: 1)
    keep(2)
    assert len(names(cache)) == 2 and kept(2)
    assert target.read_text() == "precious"


def test_the_directory_itself_may_be_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    keep(1)
    assert kept(1) and len(names(tmp_path / "elsewhere")) == 2
    (tmp_path / "elsewhere").chmod(0o777)
    assert not kept(1), "what the link leads to is what counts"
    (tmp_path / "elsewhere").chmod(0o700)
    assert compiler.cache_problem() == "" and compiler.clear_cache() == 2
    assert cache.is_symlink() and names(tmp_path / "elsewhere") == set()


@as_root
def test_a_link_that_another_user_made_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lead to any directory of ours."""
    (tmp_path / "ours").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "ours")
    os.chown(cache, OTHER_USER, -1, follow_symlinks=False)
    refused(cache, f"other users may write to {cache} (a symbolic link of user {OTHER_USER})")
    assert names(tmp_path / "ours") == set()
    monkeypatch.setenv(SHARED_VARIABLE, "1")
    assert keep(1) and kept(1)


def test_where_a_link_leads_is_not_made(cache: Path, tmp_path: Path) -> None:
    """A disk that is not mounted, say: nothing is to be written where it will be."""
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="No such file or directory"):
        assert keep(1) is None
    assert not (tmp_path / "elsewhere").exists() and not kept(1)
    assert "No such file or directory" in compiler.cache_problem()
    assert compiler.cache_entries() == [] and compiler.clear_cache() == 0


def test_a_link_that_leads_to_itself_is_no_place(cache: Path) -> None:
    cache.parent.mkdir()
    cache.symlink_to(cache)
    with pytest.warns(RuntimeWarning, match="Too many levels of symbolic links"):
        assert keep(1) is None
    assert "Too many levels of symbolic links" in compiler.cache_problem()


# ---- No place ----


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most 100 bytes; a write beyond fails half-way, as it does on a full disk."""
    original = os.fdopen

    class Full:
        def __init__(self, fd: int, *arguments: Any, **options: Any) -> None:
            self.file = original(fd, *arguments, **options)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:100])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "fdopen", Full)


def failing_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(disk_cache.os, "replace", fail)


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETAP_RT_CACHE_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *arguments, **options: Path("~/.cache/etap_rt"))


PLACES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "below a file": (lambda patch: patch.setenv("ETAP_RT_CACHE_DIR", f"{__file__}/x"), "Not a directory"),
    "a file": (lambda patch: patch.setenv("ETAP_RT_CACHE_DIR", __file__), "File exists"),
    "read-only": (lambda patch: patch.setenv("ETAP_RT_CACHE_DIR", "/proc/etap_rt"), "/proc/etap_rt"),
    "no home": (no_home, "there is no user cache directory"),
    "full disk": (full_disk, "No space left on device"),
    "failing rename": (failing_rename, "Stale file handle"),
}


@pytest.mark.parametrize("place", PLACES)
def test_without_a_place_to_write_kernels_stay_in_memory_with_one_warning(
    cache: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, reason = PLACES[place]
    break_it(monkeypatch)
    with pytest.warns(RuntimeWarning, match="ETAP_RT_CACHE_DIR") as caught:
        first = compile_as_new_process()
        second = compiler.compile_spec(first.spec)
        assert second is first, "memory still works"
        third = compile_as_new_process(5)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert first.path is None and third.path is None
    assert first.cubin.startswith(b"\x7fELF")
    assert not cache.exists() or names(cache) == set(), "nothing half-written is left"
    assert compiler.cache_entries() == []
    assert compiler.clear_cache() == 0


def test_a_real_limit_of_the_size_of_files_leaves_nothing_half_written(cache: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.warns(RuntimeWarning, match="File too large"):
            assert keep(1, 1_000_000) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(cache) == set()
    assert keep(1, 1_000_000) and kept(1, 1_000_000)


def test_a_home_that_does_not_exist_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "ETAP_RT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setattr(disk_cache, "_warned", False)
    assert disk_cache.cache_directory() == Path("/proc/nobody/.cache/etap_rt")
    assert disk_cache.cache_problem() == "/proc cannot be written" or os.geteuid() == 0  # root may write anywhere
    with pytest.warns(RuntimeWarning, match="/proc/nobody"):
        assert keep(1) is None
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "~nobody_of_that_name/cache")
    assert disk_cache.cache_directory() is None


def test_a_relative_place_in_a_directory_that_is_gone_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", "kernels")
    with pytest.warns(RuntimeWarning, match="No such file or directory"):
        assert keep(1) is None
    assert not kept(1) and "No such file or directory" in compiler.cache_problem()


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


def test_a_cache_that_can_only_be_read_is_used_without_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as_new_process()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(disk_cache.os, name, refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_as_new_process().from_cache


def test_a_directory_that_is_deleted_while_running_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(1)
    shutil.rmtree(cache)
    assert not kept(1)
    assert keep(2) and kept(2)

    original = disk_cache._write
    deleted = []

    def delete_before_the_first_write(*arguments: Any) -> None:
        if not deleted:
            deleted.append(shutil.rmtree(cache))
        original(*arguments)

    monkeypatch.setattr(disk_cache, "_write", delete_before_the_first_write)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep(3) and kept(3)
    assert deleted


def before_each_rename(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[str]:
    """Have something happen whenever a file is complete but not yet in place. Returns the names of these files."""
    original, renamed = os.replace, []

    def replace(source: str, target: str, **options: Any) -> None:
        renamed.append(source)
        action()
        original(source, target, **options)

    monkeypatch.setattr(disk_cache.os, "replace", replace)
    return renamed


@pytest.mark.filterwarnings("error")
def test_clearing_leaves_alone_what_others_are_writing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(1)
    renamed = before_each_rename(monkeypatch, disk_cache.clear_cache)
    path = keep(2)
    assert len(renamed) == 2, "it went well at once"
    assert path is not None and not path.exists(), "the first file was in place when the second one was cleared"
    assert not kept(1) and not kept(2)
    assert len(names(cache)) == 1
    monkeypatch.undo()


@pytest.mark.parametrize("times", [1, 4, 5])
def test_a_file_that_is_deleted_while_it_is_written_is_written_again(
    cache: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions do when they clear the cache; with a warning and no exception where it does not end."""

    def delete() -> None:
        for path in cache.glob(".tmp-*") if len(renamed) <= times else ():
            path.unlink()

    renamed = before_each_rename(monkeypatch, delete)
    if times < disk_cache.STORE_ATTEMPTS:
        assert keep(1) and kept(1)
    else:
        with pytest.warns(RuntimeWarning, match="No such file or directory"):
            assert keep(1) is None
    assert not list(cache.glob(".tmp-*"))


# ---- Size ----


def test_what_was_used_least_recently_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    size = 300_000
    for number in (1, 2, 3):
        keep(number, size)
    for number, age in ((1, 3000.0), (2, 2000.0), (3, 1000.0)):
        for path in (cache / f"{key(number)}.json", *cache.glob("*.cubin")):
            if path.suffix == ".json" or path.read_bytes()[:1] == str(number).encode():
                make_old(path, age)
    assert kept(1, size), "used now, so 2 is the oldest"
    keep(4, size)
    assert [kept(number, size) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert len(names(cache)) == 6, "record and cubin went together"
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 10**6


def test_an_entry_larger_than_the_limit_is_kept_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    keep(1)
    keep(2, 2_000_000)
    assert [kept(1), kept(2, 2_000_000)] == [False, True]


def test_no_limit_and_a_limit_that_is_no_number(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "LIMIT_MB", 1)
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    for number in (1, 2, 3):
        keep(number, 600_000)
    assert all(kept(number, 600_000) for number in (1, 2, 3))
    monkeypatch.setenv(LIMIT_VARIABLE, "2 GB")
    with pytest.warns(RuntimeWarning, match=r"ETAP_RT_CACHE_LIMIT_MB is '2 GB', not a whole number of megabytes"):
        keep(4, 600_000)
    assert [kept(number, 600_000) for number in (1, 2, 3, 4)] == [False, False, False, True]


def test_temporary_files_of_killed_processes_go_and_those_of_living_ones_stay(cache: Path) -> None:
    keep(1)
    old, new, foreign = (cache / name for name in (f".tmp-{'0' * 16}", f".tmp-{'1' * 16}", ".tmp-mine"))
    for path in (old, new, foreign):
        path.write_text("half a ker")
    make_old(old)
    make_old(foreign)
    keep(2)
    assert not old.exists() and new.exists() and foreign.exists()


# ---- Many processes ----

WRITER = """
import hashlib, importlib.util, random, sys
spec = importlib.util.spec_from_file_location("disk_cache", sys.argv[1])
disk_cache = sys.modules["disk_cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk_cache)
rng, counts = random.Random(sys.argv[2]), {"read": 0, "missing": 0, "written": 0}
print("ready", flush=True)
while not counts["read"] or sys.argv[3] == "for ever" or sum(counts.values()) < 200:
    number = rng.randrange(12)
    key = hashlib.sha256(str(number).encode()).hexdigest()
    content = (str(number).encode() * 1_000_000)[: 200_000 * (1 + number)]
    found = disk_cache.find(key)
    if found is None or rng.random() < 0.2:
        counts["missing" if found is None else "written"] += 1
        disk_cache.store(key, "k", content, {"spec": str(number), "arch": "a", "seconds": 0.5})
    else:
        counts["read"] += 1
        assert found.cubin == content, "a partial file was loaded"
    if rng.random() < 0.01:
        disk_cache.clear_cache()
print(*counts.values())
"""


def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )


def await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]


def end(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a process that was not killed; the lines that it printed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not errors
    return output.splitlines()


def assert_clean_for_a_later_process(cache: Path) -> int:
    """Everything that is there is whole; what killed processes left goes when its time has come. Returns how much."""
    left = list(cache.glob(".tmp-*"))
    for path in left:
        make_old(path)
    keep(1000)
    assert not list(cache.glob(".tmp-*"))
    records = list(cache.glob("*.json"))
    for path in records:
        json.loads(path.read_text())
    return len(left)


def test_writers_that_are_killed_at_any_moment_leave_no_partial_file(
    cache: Path, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(5)
    module = str(ROOT / "etap_rt" / "disk_cache.py")
    running = [start(WRITER, module, str(i), "for ever") for i in range(16)]
    for process in running:
        await_ready(process)
    try:
        killed = 0
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline or killed < 16:
            time.sleep(rng.uniform(0, 0.1))
            index = rng.randrange(16)
            running[index].kill()
            errors = running[index].communicate()[1]
            assert (running[index].returncode, errors) == (-signal.SIGKILL, "")
            killed += 1
            running[index] = start(WRITER, module, str(killed + 16), "for ever")
            await_ready(running[index])
        for process in running:
            assert process.poll() is None, f"not killed, and still it ended: {process.communicate()[1]}"
            process.kill()
            assert process.communicate()[1] == ""
    finally:
        for process in running:
            process.kill()
    left = assert_clean_for_a_later_process(cache)
    totals: Counter[str] = Counter()
    for line in end(start(WRITER, module, "last", "a while")):
        if line != "ready":
            totals.update(dict(zip(("read", "missing", "written"), map(int, line.split()))))
    assert totals["read"] > 0
    record_property("processes_started", killed + 16 + 1)
    record_property("processes_killed", killed + 16)
    record_property("survivors", 1)
    record_property("entries", len(disk_cache.cache_entries()))
    record_property("temporary_files_left_and_removed", left)


COMPILER = """
import hashlib, random, sys
from etap_rt import compiler
from etap_rt.kernels import batch_update_spec, kv_write_spec, page_copy_spec
compiler.nvrtc_version()
print("ready", flush=True)
sys.stdin.readline()
rng = random.Random(sys.argv[1])
specs = [kv_write_spec(), page_copy_spec(), batch_update_spec()]
for _ in range(3):
    for spec in rng.sample(specs, len(specs)):
        compiler._compiled.clear()
        compiled = compiler.compile_spec(spec)
        print(spec.entry, hashlib.sha256(compiled.cubin).hexdigest(), compiled.from_cache, flush=True)
    if rng.random() < 0.2:
        compiler.clear_cache()
"""


def compile_alone(cache: Path) -> list[list[str]]:
    """What one more process gets: entry, SHA-256 of the machine code and whether it was in the cache, several times."""
    process = start(COMPILER, "alone", ETAP_RT_CACHE_DIR=str(cache))
    output, errors = process.communicate("go\n", timeout=120)
    assert (process.returncode, errors) == (0, "")
    return [line.split() for line in output.splitlines() if line != "ready"]


def test_sixteen_processes_compile_at_once_while_half_of_them_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    # In a process like the others: this one may have another NVRTC, that of a torch it has imported.
    right = {entry: sha256 for entry, sha256, _ in compile_alone(tmp_path / "alone")}
    cache = tmp_path / "together"
    processes = [start(COMPILER, str(i), ETAP_RT_CACHE_DIR=str(cache)) for i in range(16)]
    for process in processes:
        await_ready(process)
    for process in processes:  # a line starts each of them; none waits for another
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    rng = random.Random(7)
    victims = processes[8:]
    for process in victims:
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
    killed = 0
    origins: Counter[str] = Counter()
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 or process in victims
        assert not errors
        killed += process.returncode != 0
        for line in output.splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # the process was killed while it wrote this
            entry, sha256, from_cache = line.split()
            assert sha256 == right[entry], "every kernel that anybody got is the right one"
            origins[from_cache] += 1
    assert origins["True"] and origins["False"]
    for entry, sha256, _ in compile_alone(cache):
        assert sha256 == right[entry]
    monkeypatch.setenv("ETAP_RT_CACHE_DIR", str(cache))
    record_property("processes_started", len(processes) + 2)
    record_property("processes_killed", killed)
    record_property("survivors", len(processes) + 2 - killed)
    record_property("entries", len(disk_cache.cache_entries()))
    record_property("kernels_compiled", origins["False"])
    record_property("kernels_read", origins["True"])
    record_property("temporary_files_left_and_removed", assert_clean_for_a_later_process(cache))
