"""Every change of a file is seen and named."""

import hashlib

import pytest

from laserrec.util import manifest
from laserrec.util.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"first file")
    (tmp_path / "sub" / "b").write_bytes(b"second")
    return tmp_path


def test_what_is_described(folder):
    files = manifest.describe(folder, ["a", "sub/b"])
    assert files == {"a": {"bytes": 10, "sha256": hashlib.sha256(b"first file").hexdigest()},
                     "sub/b": {"bytes": 6, "sha256": hashlib.sha256(b"second").hexdigest()}}
    manifest.check(folder, files, "copy it anew")


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: (f / "sub" / "b").unlink(), r"sub/b is missing; copy it anew$"),
    (lambda f: (f / "sub" / "b").write_bytes(b"seco"), r"sub/b is cut short: it has 4 of 6 bytes; copy it anew$"),
    (lambda f: (f / "a").write_bytes(b"first file."), r"/a has changed: it has 11 bytes instead of 10; copy it anew$"),
    (lambda f: (f / "a").write_bytes(b"First file"), r"/a has changed: its sha256 is \w+\.{3} instead of \w+\.{3}"),
])
def test_a_change_is_named(folder, change, message):
    files = manifest.describe(folder, ["a", "sub/b"])
    change(folder)
    with pytest.raises(UserError, match=message):
        manifest.check(folder, files, "copy it anew")


def test_sizes_are_looked_at_before_anything_is_read(folder, monkeypatch):
    files = manifest.describe(folder, ["a", "sub/b"])
    (folder / "sub" / "b").write_bytes(b"x")
    monkeypatch.setattr(manifest, "file_sha256", lambda file: pytest.fail("was read"))
    with pytest.raises(UserError, match="cut short"):
        manifest.check(folder, files, "")


@pytest.mark.parametrize("files", [
    None, [], 3, {"a": None}, {"a": {}}, {"a": {"bytes": "10", "sha256": "x"}}, {"a": {"bytes": 10, "sha256": 1}},
    {"a": {"bytes": True, "sha256": "x"}}, {"/etc/passwd": {"bytes": 1, "sha256": "x"}},
    {"sub/../../x": {"bytes": 1, "sha256": "x"}}, {"a\0": {"bytes": 1, "sha256": "x"}}])
def test_a_list_of_another_form_is_refused(folder, files):
    with pytest.raises(UserError, match=r"the list of files of .* is damaged; copy it anew"):
        manifest.check(folder, files, "copy it anew")


def test_links_are_refused_where_asked(folder):
    files = manifest.describe(folder, ["a", "sub/b"])
    (folder / "a").rename(folder / "elsewhere")
    (folder / "a").symlink_to(folder / "elsewhere")
    manifest.check(folder, files, "")
    with pytest.raises(UserError, match="/a is a link, which is not followed; copy"):
        manifest.check(folder, files, "copy it", links=False)
    (folder / "sub").rename(folder / "there")
    (folder / "sub").symlink_to(folder / "there")
    with pytest.raises(UserError, match="/sub/b is a link"):
        manifest.check(folder, {"sub/b": files["sub/b"]}, "copy it", links=False)
