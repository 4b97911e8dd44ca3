"""Files and folders are written whole or not at all: a kill or a power cut leaves either the old or the new content.

New content is written to `.NAME.XXXX.tmp` beside NAME, flushed to disk and renamed. While a folder is replaced, the old
one is called `.NAME.old` between two renames; if a kill leaves it there, `recover` renames it back. Leftovers of dead
processes are removed by the next writer. All disk failures are UserErrors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from laserrec.util.errors import UserError, reading

log = logging.getLogger(__name__)

_ADVICE = {errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room within the disk quota",
           errno.EACCES: "name another folder or change its permissions", errno.EROFS: "name another folder"}
_Record = TypeVar("_Record", bound=BaseModel)


# -- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Context with the name of a temporary file that becomes `path` when the block ends, with the permissions of the
    umask. Missing parent folders are created. Raises UserError if the disk is full or cannot be written."""
    path = Path(os.path.abspath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_once(path.parent)
        with temporary(path) as folder:
            yield folder / path.name
            os.chmod(folder / path.name, folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            _flush(folder / path.name)
            os.replace(folder / path.name, path)
            _flush(path.parent)


def check_file(path: Path | str) -> None:
    """Raises UserError where a file could not be written: call it before the work of which the file is the result."""
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():  # /dev/null would be replaced
        raise UserError(f"{path} is no plain file; name one")
    _check_parent(path)


def plain(path: Path | str) -> Path:
    """The path without `..`, so that it names the same place before and after a folder in it is made."""
    return Path(os.path.realpath(path)) if ".." in Path(path).parts else Path(path)


def check_folder(path: Path | str) -> None:
    """As `check_file`, for a folder."""
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    if path == path.parent:
        raise UserError(f"{path} is a whole file system, which can't be replaced; name a folder in it")
    _check_parent(path)
    if path.is_dir():
        _check_parent(path / "file")


def _check_parent(path: Path) -> None:
    """Try it in the nearest folder that is there: permissions alone tell too little of network and system folders."""
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{path} can't be written: {nearest} is a file; name another place")
    try:
        with temporary(nearest / path.name):
            pass
    except OSError as error:
        raise _refused(path, error) from error


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` atomically, as `new_file` does."""
    with new_file(path) as file:
        file.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically. Line ends are not changed."""
    write_bytes(path, text.encode("utf-8"))


def write_once(path: Path | str, text: str) -> bool:
    """As `write_text`, unless the file is there: of several processes one alone writes it. Whether it was this one."""
    path = Path(os.path.abspath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as folder:
            (folder / path.name).write_text(text, encoding="utf-8", newline="")
            _flush(folder / path.name)
            try:
                os.link(folder / path.name, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if path.exists():
                    return False
                os.replace(folder / path.name, path)
            _flush(path.parent)
    return True


def read_json(path: Path, advice: str) -> Any:
    """Read JSON. Raises UserError for a missing, unreadable or damaged file; `advice` says what to do about damage."""
    try:
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number or a nesting without end
        raise UserError(f"{path} is damaged: {error}; {advice}") from None


def read_record(path: Path, kind: type[_Record], advice: str) -> _Record:
    """Read JSON into a pydantic model. Raises UserError as `read_json` does, also for missing or wrong fields."""
    try:
        return kind.model_validate(read_json(path, advice))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {name + ': ' if name else ''}{first['msg']}; {advice}") from None


def write_json(path: Path | str, value: Any) -> None:
    """Write `json_text(value)` atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Format as JSON: indented, keys in their order, Unicode unescaped, with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_parquet(path: Path | str, frame: pl.DataFrame) -> None:
    """Write `parquet_bytes(frame)` atomically."""
    write_bytes(path, parquet_bytes(frame))


def parquet_bytes(frame: pl.DataFrame, metadata: dict[str, str] | None = None) -> bytes:
    """The same frame gives the same bytes (under one polars version): what shapes them is fixed here, and the
    frame's chunks, which depend on how it was made, are merged first. metadata: kept in the file's footer."""
    buffer = io.BytesIO()
    frame.rechunk().write_parquet(buffer, compression="zstd", compression_level=3, statistics=True,
                                  row_group_size=1_000_000, metadata=metadata)
    return buffer.getvalue()


# -- folders --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: Path | str, replace: Collection[str] = (), own: Collection[str] | None = None) -> Iterator[Path]:
    """Context with an empty temporary folder that becomes `path` when the block ends; it is removed if the block fails.

    replace: an existing folder is replaced only if it holds a file of one of these names, so that a mistyped path does
    not delete other files. own: names of all that the writer makes or made there; what else is in the folder is
    somebody else's and stays. None: nothing stays. Raises UserError for any other folder that is not empty, for a file,
    for a mount point or the current folder (which cannot be renamed), and if the disk is full or cannot be written.
    """
    path = Path(os.path.realpath(path))
    recover(path)
    _check_place(path, replace)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent)
        with temporary(path) as outer:
            folder = outer / path.name
            folder.mkdir()
            yield folder
            if path.is_dir():
                shutil.copymode(path, folder)
                if own is not None:
                    _keep_others(path, folder, own)
            for place, _, names in os.walk(folder):
                for name in names:
                    _flush(Path(place, name))
                _flush(Path(place))
            _swap(folder, path)


def recover(path: Path | str) -> None:
    """Call this before reading a folder that `new_folder` writes: if a writer was killed between its two renames, the
    old folder gets its name back."""
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path):
        with contextlib.suppress(OSError):  # there is none, or another reader was faster
            _aside(path).rename(path)
            _flush(path.parent)


@contextlib.contextmanager
def locked(folder: Path | str, what: str) -> Iterator[None]:
    """Hold a folder, which need not exist yet, for `what` ("fit"); the lock is `.NAME.lock` beside it and ends with the
    process. Raises UserError, which names the process, if any holds it already, this one included."""
    folder = Path(os.path.realpath(folder))
    file = folder.with_name(f".{folder.name}.lock")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{folder} is in use by {file.read_text('utf-8').strip() or 'another process'}; wait for "
                            "it to end, or name another folder") from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"{what}, process {os.getpid()} on {socket.gethostname()}, since {since}\n", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def in_turn(file: Path, doing: str, folder: str, advice: str) -> Iterator[None]:
    """Hold a lock file, and wait while another process does; the lock ends with the process. doing: what that other one
    does, for a warning. folder: what the file's folder is; advice: what to do where it can't be written, which is a
    UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.warning("another process %s; waiting for it", doing)
            lock.acquire()
    except OSError as error:
        raise UserError(f"the {folder} {file.parent} can't be written: {error.strerror}; {advice}") from None
    try:
        yield
    finally:
        lock.release()


def _check_place(path: Path, replace: Collection[str]) -> None:
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
        if path in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"{path} is the current folder or holds it, and can't be replaced; name another folder, "
                            "or start from elsewhere")
    if os.path.ismount(path):
        raise UserError(f"{path} is a mount point, which can't be replaced; name a folder in it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    with disk_errors(path):
        if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in replace):
            raise UserError(f"{path} is not empty and is not replaced; name another folder or delete it")


def _keep_others(old: Path, new: Path, own: Collection[str]) -> None:
    for entry in old.iterdir():
        if entry.name in own or entry.name.endswith((".lock", ".tmp", ".old")) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _swap(folder: Path, path: Path) -> None:
    """Give `folder` the name `path`. A reader or another writer may step between the two renames: then once more."""
    old = _aside(path)
    while True:
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                _discard(old)
                path.rename(old)
        try:
            folder.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _flush(path.parent)
    with contextlib.suppress(OSError):  # the new one is there; the next writer tries again
        _discard(old)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _discard(folder: Path) -> None:
    """Under a temporary name first: a folder called .NAME.old is complete at all times."""
    if folder.is_dir():
        with contextlib.suppress(FileNotFoundError), temporary(folder) as rubbish:  # another process was faster
            folder.rename(rubbish / folder.name)


# -- temporary folders ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A new folder beside `path` for the block. It is locked meanwhile: one that isn't is of a process that died."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process cleaned up before this one was locked
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if folder.is_dir():
                    break
            except BlockingIOError:  # and is at it
                pass
            except OSError:  # a file system without locks, where leftovers stay
                break
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def clean(parent: Path) -> None:
    """Remove the temporary folders that dead processes left in a folder."""
    for folder in parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # still locked, no folder, or not ours to remove
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


@functools.cache
def _clean_once(parent: Path) -> None:
    """A process that writes a hundred thousand files into a folder lists it once."""
    clean(parent)


def _flush(path: Path) -> None:
    """Without it a power cut after the rename can leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses while `path` is written, as a UserError."""
    try:
        yield
    except shutil.Error as error:  # of a folder that is copied: a list of (from, to, reason)
        reason = error.args[0][0][2] if isinstance(error.args[0], list) else error
        raise UserError(f"{path} can't be written: {str(reason)[:300]}; make room on the disk or name another place"
                        ) from error
    except OSError as error:
        other = error.filename is not None and not str(error.filename).startswith(str(path.parent))
        if other or error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise  # about something else that happened while this was written
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> UserError:
    number = error.errno or errno.EIO
    return UserError(f"{path} can't be written: {os.strerror(number)}; {_ADVICE.get(number, 'name another place')}")
