"""Files and folders appear whole or not at all, whenever the writer is killed and whatever the disk refuses."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
from kills import kill_at_every_step
from pydantic import BaseModel

from laserrec.util import io
from laserrec.util.errors import UserError, reading
from laserrec.util.io import (
    check_file,
    check_folder,
    locked,
    new_file,
    new_folder,
    parquet_bytes,
    read_json,
    read_record,
    recover,
    write_bytes,
    write_json,
    write_once,
    write_parquet,
    write_text,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write_generation(folder, number):
    with new_folder(folder, replace=("a",)) as new:
        write_text(new / "a", str(number))
        (new / "deep").mkdir()
        write_text(new / "deep" / "b", str(number))


def generation(folder):
    recover(folder)
    assert names(folder) == ["a", "deep"]
    a, b = (folder / "a").read_text(), (folder / "deep" / "b").read_text()
    assert a == b
    return int(a)


def test_writes_replace_and_leave_no_temporary_files(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old")
    write_text(tmp_path / "deep" / "a.txt", "ü\nnew")
    write_json(tmp_path / "deep" / "b.json", {"z": 1, "a": "ü"})
    write_parquet(tmp_path / "deep" / "c.parquet", pl.DataFrame({"x": [1]}))
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "ü\nnew".encode()
    assert (tmp_path / "deep" / "b.json").read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "ü"\n}\n'
    assert names(tmp_path / "deep") == ["a.txt", "b.json", "c.parquet"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken can't be written: Is a directory; name another place"):
        write_bytes(tmp_path / "taken", b"x")
    with pytest.raises(UserError, match=r"b.json can't be written: (Not a directory|File exists)"):
        write_json(tmp_path / "a.json" / "b.json", {})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert names(tmp_path) == ["a.json", "taken"]


def test_parquet_bytes_do_not_depend_on_how_the_frame_was_made():
    whole = pl.DataFrame({"x": range(3000), "s": [str(i % 7) for i in range(3000)]})
    pieces = pl.concat([whole[:10], whole[10:2999], whole[2999:]], rechunk=False)
    assert pieces.n_chunks() > 1
    assert parquet_bytes(pieces) == parquet_bytes(whole)


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "a") as file:  # as safetensors does
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        write_generation(tmp_path / "b", 1)
    finally:
        os.umask(before)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in ("a", "b", "b/a")] == [0o640, 0o750, 0o640]
    (tmp_path / "b").chmod(0o700)
    write_generation(tmp_path / "b", 2)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700


def test_a_folder_takes_its_name_only_when_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out", replace=("x", "a")) as folder:
        (folder / "b").write_text("2")
        assert (tmp_path / "out" / "a").exists()
    assert names(tmp_path / "out") == ["b"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", replace=("b",)) as folder:
        (folder / "c").write_text("3")
        raise KeyboardInterrupt
    assert names(tmp_path / "out") == ["b"] and names(tmp_path) == ["out"]


def test_no_other_folder_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for place, message in ((tmp_path / "mine", "is the current folder or holds it"), (Path("."), "current folder"),
                           (tmp_path, "current folder"), (Path(".."), "current folder"), (tmp_path / "link", "current"),
                           (tmp_path / "file", "is a file; name a folder"), (Path("/proc"), "is a mount point")):
        with pytest.raises(UserError, match=message), new_folder(place, replace=("letter",)):
            pytest.fail("began")
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="mine is not empty and is not replaced"), new_folder(tmp_path / "mine", ("a",)):
        pytest.fail("began")
    assert names(tmp_path) == ["file", "link", "mine"] and names(tmp_path / "mine") == ["letter"]
    with new_folder(tmp_path / "link", replace=("letter",)) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "mine") == ["new"] and (tmp_path / "link").is_symlink()


def test_killed_at_any_step_the_old_or_the_new_folder_is_there(tmp_path):
    write_generation(tmp_path / "out", 0)
    found = set()

    def look(step):
        found.add(generation(tmp_path / "out"))
        write_generation(tmp_path / "out", 0)
        assert names(tmp_path) == ["out"]

    deaths = kill_at_every_step(lambda: write_generation(tmp_path / "out", 1), look)
    assert deaths > 20 and found == {0, 1} and generation(tmp_path / "out") == 1


def test_killed_at_any_step_the_old_or_the_new_file_is_there(tmp_path):
    write_text(tmp_path / "a", "old")
    found = set()

    def work():
        io._clean_once.cache_clear()
        write_text(tmp_path / "a", "new")

    def look(step):
        found.add((tmp_path / "a").read_text())
        write_text(tmp_path / "a", "old")

    assert kill_at_every_step(work, look) > 5 and found == {"old", "new"}
    work()
    assert names(tmp_path) == ["a"]


def test_readers_and_writers_at_once(tmp_path):
    """Readers that recover, and two writers, in each other's way: always a whole folder."""
    write_generation(tmp_path / "out", 0)
    over, seen = threading.Event(), []

    def read():
        while not over.is_set():
            recover(tmp_path / "out")
            with contextlib.suppress(FileNotFoundError):
                seen.append((tmp_path / "out" / "a").read_text())

    def write(first):
        for number in range(first, first + 40):
            write_generation(tmp_path / "out", number)

    readers, writers = [threading.Thread(target=read)], [threading.Thread(target=write, args=(n,)) for n in (0, 100)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    readers[0].join()
    assert generation(tmp_path / "out") in (39, 139) and len(set(seen)) > 2
    write_generation(tmp_path / "out", 7)
    assert names(tmp_path) == ["out"]


def test_what_is_being_written_is_not_cleaned_away(tmp_path):
    (tmp_path / ".dead.0123.tmp").mkdir()
    with new_folder(tmp_path / "slow") as folder:
        write_generation(tmp_path / "fast", 1)
        (folder / "a").touch()
    assert names(tmp_path) == ["fast", "slow"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".dead.0123.tmp").mkdir()
    write_generation(tmp_path / "out", 1)
    assert names(tmp_path) == [".dead.0123.tmp", "out"]


@pytest.mark.parametrize(("number", "message"), [
    (errno.ENOSPC, "out can't be written: No space left on device; make room on the disk"),
    (errno.EACCES, "out can't be written: Permission denied; name another folder or change its permissions"),
    (errno.EIO, "out can't be written: Input/output error; name another place")])
@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_what_the_disk_refuses_is_said(tmp_path, monkeypatch, number, message, call):
    write_generation(tmp_path / "out", 1)

    def refuse(*args, **more):
        raise OSError(number, os.strerror(number))

    with (monkeypatch.context() as patch, pytest.raises(UserError, match=message),
          new_folder(tmp_path / "out", replace=("a",)) as folder):
        (folder / "a").touch()
        patch.setattr(os, call, refuse)
    assert generation(tmp_path / "out") == 1


def test_errors_of_something_else_pass(tmp_path):
    for error in (ConnectionRefusedError(111, "refused"), FileNotFoundError(2, "none", "/elsewhere"), OSError("odd")):
        with pytest.raises(type(error)) as raised, new_folder(tmp_path / "out"):
            raise error
        assert raised.value is error
    assert names(tmp_path) == []


def test_one_at_a_time(tmp_path):
    with locked(tmp_path / "deep" / "model", "fit"):
        with pytest.raises(UserError, match=rf"model is in use by fit, process {os.getpid()} on .*, since 20"), \
                locked(tmp_path / "deep" / "model", "serve"):
            pytest.fail("both have it")
        with locked(tmp_path / "deep" / "other", "fit"):
            pass
    script = ("import sys, time; from laserrec.util.io import locked\n"
              "with locked(sys.argv[1], 'another fit'): print(flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "deep" / "model")], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match=f"in use by another fit, process {other.pid}"), \
            locked(tmp_path / "deep" / "model", "fit"):
        pytest.fail("both have it")
    other.kill()
    other.wait()
    with locked(tmp_path / "deep" / "model", "fit"):
        pass


class Facts(BaseModel, strict=True):
    count: int
    name: str = ""


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is damaged: Expecting"), ("[]", "is damaged: Input should be"), ("{}", "damaged: count: Field required"),
    ('{"count": "3"}', "count: Input should be a valid integer"), ('{"count": 1, "name": null}', "name: "),
    ("[" * 200_000, "damaged"), ('{"count": ' + "9" * 5000 + "}", "damaged"), (b"\xff\xfe", "damaged")])
def test_damaged_json_is_named(tmp_path, text, message):
    (tmp_path / "f.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"f.json .*{message}") as error:
        read_record(tmp_path / "f.json", Facts, "make it again")
    assert str(error.value).endswith("; make it again") and len(str(error.value)) < 400


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none", "")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        read_json(tmp_path, "")


@pytest.mark.parametrize(("place", "message"), [
    ("file/x", r"x can't be written: .*file is a file"), ("/proc/x/y", r"/proc/x/y can't be written"), ("file", "")])
def test_a_place_that_can_not_be_written_is_told_at_once(tmp_path, place, message):
    (tmp_path / "file").touch()
    for check in (check_file, check_folder):
        if message or check is check_folder:
            with pytest.raises(UserError, match=message or "file is a file; name a folder"):
                check(tmp_path / place)
    assert names(tmp_path) == ["file"]
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_file(tmp_path)
    with pytest.raises(UserError, match="/dev/null is no plain file"):
        check_file("/dev/null")


def test_a_whole_file_system_is_no_place_for_a_folder():
    with pytest.raises(UserError, match="/ is a whole file system"):
        check_folder("/")


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_file(tmp_path / "deep" / "file")
    check_folder(tmp_path / "deep" / "folder")
    check_folder(tmp_path)
    assert names(tmp_path) == []


def test_what_may_not_be_read_is_said(tmp_path):
    with pytest.raises(UserError, match=r"^/x/y can't be read: Permission denied; give this user"), reading(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/x/y")
    with pytest.raises(UserError, match=f"^{tmp_path} can't be read: it broke$"), reading(tmp_path):
        raise OSError("it broke")
    with pytest.raises(FileNotFoundError), reading(tmp_path):
        raise FileNotFoundError


def test_a_folder_that_can_not_be_copied_is_told_clearly(tmp_path):
    with pytest.raises(UserError, match="No space left"), io.disk_errors(tmp_path / "model"):
        raise io.shutil.Error([("a", "b", "[Errno 28] No space left on device")])


def test_write_once_leaves_what_is_there(tmp_path, monkeypatch):
    assert write_once(tmp_path / "new" / "a", "1\n") and not write_once(tmp_path / "new" / "a", "2\n")
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError()))  # no links there
    assert write_once(tmp_path / "new" / "b", "1\n") and not write_once(tmp_path / "new" / "b", "2\n")
    assert {file.name: file.read_text() for file in (tmp_path / "new").iterdir()} == {"a": "1\n", "b": "1\n"}
