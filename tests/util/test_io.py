"""Files and folders appear whole or not at all."""

import json

import polars as pl
import pytest

from laserrec.util.io import new_folder, parquet_bytes, write_bytes, write_json, write_parquet, write_text


def test_writes_replace_and_leave_no_temporary_files(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old")
    write_text(tmp_path / "deep" / "a.txt", "ü\nnew")
    write_json(tmp_path / "deep" / "b.json", {"z": 1, "a": "ü"})
    write_parquet(tmp_path / "deep" / "c.parquet", pl.DataFrame({"x": [1]}))
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "ü\nnew".encode()
    assert (tmp_path / "deep" / "b.json").read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "ü"\n}\n'
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.txt", "b.json", "c.parquet"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_bytes(tmp_path / "taken", b"x")
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "taken"]


def test_parquet_bytes_do_not_depend_on_how_the_frame_was_made():
    whole = pl.DataFrame({"x": range(3000), "s": [str(i % 7) for i in range(3000)]})
    pieces = pl.concat([whole[:10], whole[10:2999], whole[2999:]], rechunk=False)
    assert pieces.n_chunks() > 1
    assert parquet_bytes(pieces) == parquet_bytes(whole)


def test_a_folder_takes_its_name_only_when_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as folder:
        (folder / "b").write_text("2")
        assert (tmp_path / "out" / "a").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "c").write_text("3")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
