"""The real command in its own process: driven over loopback, ended in order, mistakes in one line."""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from running import running

from laserrec import LaserRecommender
from laserrec.cli import serve as cli_serve
from laserrec.server.service import Service
from laserrec.server.settings import Limits
from laserrec.util.errors import UserError
from laserrec.util.io import locked


def test_it_answers_over_loopback(model_folder):
    with running(model_folder, "--threads", "1") as port:
        url, body = f"http://127.0.0.1:{port}/v1/recommend", json.dumps({"history": ["i3"]}).encode()
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            assert len(json.load(answer)["items"]) > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert 'route="/v1/recommend",status="200"} 1.0' in answer.read().decode()


def test_a_server_that_can_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="not a model folder"), running(tmp_path):
        pass


def test_another_address_without_a_token_is_warned_of(model_folder, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "laserrec", "serve", str(model_folder), "--host", "0.0.0.0",
                                "--port", "0", "--state", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    text = process.stderr.readline() + process.stderr.readline()
    process.terminate()
    assert "no API token is set" in " ".join((text + process.communicate(timeout=30)[1]).split())


@pytest.mark.parametrize(("host", "inside"), [("127.0.0.1", True), ("::1", True), ("localhost", True),
                                              ("0.0.0.0", False), ("example.org", False)])
def test_loopback(host, inside):
    assert cli_serve._loopback(host) == inside


def test_the_token_comes_from_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LASERREC_API_TOKEN", "from-environment")
    assert cli_serve._read_token(None) == "from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert cli_serve._read_token(tmp_path / "token") == "from-file"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        cli_serve._read_token(tmp_path / "token")
    with pytest.raises(UserError, match="can't be read"):
        cli_serve._read_token(tmp_path / "none")


@pytest.mark.parametrize(("flags", "message"), [
    (["--max-batch", "0"], "max-batch is 0"), (["--timeout", "0"], "timeout-seconds is 0"),
    (["--max-queue", "0"], "max-queue is 0"), (["--queue-seconds", "nan"], "queue-seconds is nan"),
    (["--port", "99999"], "port is 99999"), (["--port", "-1"], "port is -1"), (["--threads", "0"], "threads is 0"),
    (["--host", ""], "host is empty"), (["--allowed-hosts", "http://x"], "allowed host 'http://x'"),
    (["--max-wait-ms", "-1"], "max-wait-seconds is -0.001"), (["--read-timeout", "0"], "read-seconds is 0"),
    (["--host", "203.0.113.7"], "can't listen"),
])
def test_settings_that_can_not_work_are_refused_before_the_model_is_loaded(flags, message, monkeypatch):
    import signal

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("laserrec.server.service.Service.opened", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        cli_serve.serve_app(["no-such-model", *flags], exit_on_error=False, result_action="return_value")


def test_a_state_that_can_not_be_kept_is_told_before_the_model_is_loaded(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LaserRecommender, "from_pretrained", lambda *args, **options: pytest.fail("it loads"))
    (tmp_path / "file").touch()
    with (pytest.raises(UserError, match="file is a file; name a folder"),
          Service.opened(model_folder, tmp_path / "file", Limits())):
        pass
    with (locked(tmp_path / "state", "a server"), pytest.raises(UserError, match="state is in use by a server"),
          Service.opened(model_folder, tmp_path / "state", Limits())):
        pass


def test_a_model_is_not_replaced_while_a_server_keeps_its_changes_there(model_folder, tmp_path):
    own = Path(shutil.copytree(model_folder, tmp_path / "model"))
    item = {"item_id": "new", "title": "saw", "brand": None, "category": None}
    with Service.opened(own, own / "served", Limits()) as service:
        service.add([item]).future.result(60)
        with pytest.raises(UserError, match=r"served is in use by a server, process \d+"):
            LaserRecommender.from_pretrained(own).save_pretrained(own)
        service.model.save_pretrained(tmp_path / "other")  # elsewhere it may go
        service.remove("i1").future.result(60)
    LaserRecommender.from_pretrained(own).save_pretrained(own)
    with Service.opened(own, own / "served", Limits()) as service:
        assert service.listing.row("new") is not None and service.listing.row("i1") is None
