"""Compiled kernels on disk: a flat directory of the user's own that any number of processes use at once.

A kernel has two files in it:

    <key>.json               what was compiled, the compiler's log and the name of the cubin, under a checksum
    <entry>-<sha256>.cubin   the machine code, named by its own content

Both are written to a temporary name and renamed into place, so readers and racing writers only ever see whole
files; what a killed process leaves is a temporary file, which is deleted when it is so old that nobody can be
writing it any more. Whatever is damaged, missing or about another kernel is as good as not there: the kernel is
compiled again and the entry replaced.

Machine code runs with the user's rights. So only what nobody but the user (and root) can have written is
believed, directory and files alike, symbolic links in place of files are not followed, and what is written is
private. The directory may be a link that the user or root has made. All files are opened relative to the directory
that was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CACHE_VARIABLE = "ETAP_RT_CACHE_DIR"
SHARED_VARIABLE = "ETAP_RT_CACHE_ALLOW_SHARED"
LIMIT_VARIABLE = "ETAP_RT_CACHE_LIMIT_MB"
LIMIT_MB = 256  # of 10**6 bytes, unless the environment says otherwise; the kernels of one version take some 6
MAX_FILE_BYTES = 1 << 26  # a larger file is none of ours
STALE_SECONDS = 600  # age from which a temporary file is what a killed process left; writing one takes no second
STORE_ATTEMPTS = 5  # while others delete what is being written, or the directory

_RECORD = re.compile(r"([0-9a-f]{64})\.json")
_CUBIN = re.compile(r"\w+-[0-9a-f]{64}\.cubin")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}")
_PATTERNS = (_RECORD, _CUBIN, _TEMPORARY)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_warned = False


class Found(NamedTuple):
    """An entry that was read."""

    record: dict[str, Any]  # as it was given to `store`
    cubin: bytes
    path: Path  # of the cubin


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A kernel in the disk cache."""

    spec: str
    arch: str
    path: Path  # of the cubin
    size_bytes: int
    seconds: float  # that NVRTC took


@dataclass(frozen=True, slots=True)
class _Directory:
    path: Path
    fd: int
    shared: bool  # others may write into it, and the user has accepted that


def cache_directory() -> Path | None:
    """Where compiled kernels are kept: ETAP_RT_CACHE_DIR if set, else in the user's cache directory.

    It need not exist yet. None when the user has no such directory (no home, for one).
    """
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        try:
            return Path(configured).expanduser().absolute()
        except RuntimeError:  # a ~ without a home
            return None
    import platformdirs

    directory = platformdirs.user_cache_path("etap_rt", appauthor=False)
    return directory if directory.is_absolute() else None


def cache_problem() -> str:
    """Why kernels cannot be kept on disk, as far as one can tell without trying; empty if nothing speaks against it."""
    try:
        directory = cache_directory()
        if directory is not None and not os.path.lexists(directory):
            existing = next(path for path in directory.parents if path.exists())
            return "" if existing.is_dir() and os.access(existing, os.W_OK) else f"{existing} cannot be written"
        with _open_directory():
            return "" if os.access(str(directory), os.W_OK) else f"{directory} cannot be written"
    except OSError as error:
        return str(error)


def cache_entries() -> list[CacheEntry]:
    """The kernels in the disk cache that are whole, sorted by name."""
    entries = []
    with suppress(OSError), _open_directory() as directory:
        with os.scandir(directory.fd) as listing:
            names = [entry.name for entry in listing]
        for name in names:
            match = _RECORD.fullmatch(name)
            found = _read_entry(directory, match[1]) if match else None
            if found:
                record = found.record
                entries.append(
                    CacheEntry(record["spec"], record["arch"], found.path, len(found.cubin), record["seconds"])
                )
    return sorted(entries, key=lambda entry: (entry.spec, entry.arch, entry.path.name))


def clear_cache() -> int:
    """Delete the kernels of the disk cache, broken ones included, and what killed processes left. Returns how many.

    Other files are left alone, and so is what another process is writing now. Raises OSError when a file cannot be
    deleted, after the others.
    """
    directory = cache_directory()
    if directory is None:
        return 0
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        names = [name for name, status in _files(fd) if not _TEMPORARY.fullmatch(name) or _is_stale(status)]
        problems = [problem for name in names if (problem := _delete(fd, name))]
    finally:
        os.close(fd)
    if problems:
        raise problems[0]
    return len(names)


def find(key: str) -> Found | None:
    """The entry of that key, which then counts as just used; None when there is none to believe."""
    try:
        with _open_directory() as directory:
            found = _read_entry(directory, key)
            if found is not None:
                for name in (f"{key}.json", found.path.name):
                    with suppress(OSError):  # a cache that can only be read is as good
                        os.utime(name, dir_fd=directory.fd, follow_symlinks=False)
            return found
    except OSError:
        return None


def store(key: str, entry: str, cubin: bytes, record: dict[str, Any]) -> Path | None:
    """Keep a kernel and return the cubin's path; None, after a warning, if that is not possible.

    `record` is kept with it, as JSON; it has at least the spec, arch and seconds of CacheEntry.
    """
    sha256 = hashlib.sha256(cubin).hexdigest()
    name = f"{entry}-{sha256}.cubin"
    record = {**record, "key": key, "cubin": name, "sha256": sha256}
    text = json.dumps({"checksum": _checksum(record), "record": record}).encode()
    files = {name: cubin, f"{key}.json": text}
    try:
        for _ in range(STORE_ATTEMPTS - 1):
            with suppress(FileNotFoundError):  # somebody deleted the directory, or the file, while we were at it
                return _write_entry(files) / name
        return _write_entry(files) / name
    except OSError as error:
        _warn_once(str(error))
        return None


def _write_entry(files: dict[str, bytes]) -> Path:
    with _open_directory(create=True) as directory:
        for name, content in files.items():
            _write(directory, name, content)
        _clean_up(directory, keep=files.keys())
        return directory.path


@contextmanager
def _open_directory(create: bool = False) -> Iterator[_Directory]:
    """The cache directory. Raises OSError with the reason when there is none, or none to be trusted."""
    path = cache_directory()
    if path is None:
        raise FileNotFoundError("there is no user cache directory")
    if create and not path.is_symlink():  # where a link leads is not ours to make
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status, link = os.fstat(fd), os.lstat(path)
        foreign_link = stat.S_ISLNK(link.st_mode) and not _is_trusted_owner(link)
        shared = foreign_link or not _is_private(status)
        if shared and os.environ.get(SHARED_VARIABLE) != "1":
            who = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
            if foreign_link:
                who = f"a symbolic link of user {link.st_uid}"
            raise PermissionError(
                f"other users may write to {path} ({who}); make it yours alone with chown and chmod go-w, "
                f"or accept it with {SHARED_VARIABLE}=1"
            )
        yield _Directory(path, fd, shared)
    finally:
        os.close(fd)


def _is_private(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written a file or directory."""
    return _is_trusted_owner(status) and not status.st_mode & _WRITABLE_BY_OTHERS


def _is_trusted_owner(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _read_entry(directory: _Directory, key: str) -> Found | None:
    """An entry that is whole; None when it is not there, cut off, changed, or about another kernel."""
    try:
        content = json.loads(_read(directory, f"{key}.json"))
        record: dict[str, Any] = content["record"]
        if content["checksum"] != _checksum(record) or record["key"] != key or not _CUBIN.fullmatch(record["cubin"]):
            return None
        cubin = _read(directory, record["cubin"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if hashlib.sha256(cubin).hexdigest() != record["sha256"]:
        return None
    return Found(record, cubin, directory.path / record["cubin"])


def _read(directory: _Directory, name: str) -> bytes:
    """A file of the directory. Raises OSError when it is not there, or not one that we can have written."""
    # Without O_NONBLOCK, opening a pipe that somebody put there would wait for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=directory.fd)
    try:
        status = os.fstat(fd)
        trusted = directory.shared or _is_private(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES or not trusted:
            raise PermissionError(f"{name} is not a file of this cache")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def _write(directory: _Directory, name: str, content: bytes) -> None:
    temporary = f".tmp-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644 if directory.shared else 0o600, dir_fd=directory.fd)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory.fd)
        raise


def _clean_up(directory: _Directory, keep: Any) -> None:
    """Delete stale temporary files and, above the limit of size, files least recently used, but none in `keep`.

    A record and its cubin are used together, so they go together. Processes that read what is deleted compile it
    again; a process that has it in memory does not notice.
    """
    files = []
    for name, status in _files(directory.fd):
        if not _TEMPORARY.fullmatch(name):
            files.append((status.st_mtime_ns, name, status.st_size))
        elif _is_stale(status):
            _delete(directory.fd, name)
    limit = _limit_bytes()
    excess = sum(size for _, _, size in files) - limit if limit else 0
    for _, name, size in sorted(files):
        if excess <= 0:
            break
        if name not in keep:
            _delete(directory.fd, name)
            excess -= size


def _files(fd: int) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a cache directory that are the cache's by their names; of links, the links."""
    with os.scandir(fd) as listing:
        for entry in listing:
            if any(pattern.fullmatch(entry.name) for pattern in _PATTERNS):
                with suppress(OSError):  # another process may have deleted it
                    yield entry.name, entry.stat(follow_symlinks=False)


def _delete(fd: int, name: str) -> OSError | None:
    """Delete a file of a directory, unless another process has; what went wrong, if anything."""
    try:
        os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _is_stale(status: os.stat_result) -> bool:
    """Whether a temporary file is so old that its writer must be dead."""
    return status.st_mtime < time.time() - STALE_SECONDS


def _limit_bytes() -> int:
    """Most bytes that the cache may have, 0 for any number."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text and not text.isdecimal():
        warnings.warn(
            f"{LIMIT_VARIABLE} is {text!r}, not a whole number of megabytes (0 for no limit); "
            f"{LIMIT_MB} is used instead",
            RuntimeWarning,
            stacklevel=2,
        )
        text = ""
    return int(text or LIMIT_MB) * 10**6


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled kernels cannot be kept on disk ({reason}), so each process compiles them anew; "
            f"set {CACHE_VARIABLE} to a directory of your own that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
