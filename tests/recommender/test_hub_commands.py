"""The command line takes models by their name on a hub, and puts them there."""

import json
import os
import re
import shutil
import subprocess
import sys

import fake_hub
import polars as pl
import pytest
import tiny
from fake_hub import TOKEN

from laserrec.batch import ray_engine as batch_ray
from laserrec.cli import main as cli
from laserrec.recommender import hub
from laserrec.recommender.folder import model_identity
from laserrec.recommender.scorers import load_scorer
from laserrec.util.device import CPU

N = 12
REPO = "my-shop/laser-tools"


@pytest.fixture(scope="module")
def folder(fit, tmp_path_factory):
    out = tmp_path_factory.mktemp("share") / "model"
    fit(tiny.planted(N, users=16), out, train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    return out


@pytest.fixture
def there(monkeypatch, tmp_path):
    with fake_hub.used(monkeypatch, tmp_path / "cache") as server:
        yield server


def files(server, branch="main"):
    repo = server.repos[REPO]
    return repo.commits[repo.branches[branch]]


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["laserrec", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        streams = capsys.readouterr()
        return code, *(re.sub(r"\s+", " ", text) for text in (streams.out, streams.err))

    return call


def test_push_and_use_by_name(there, folder, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    own = shutil.copytree(folder, tmp_path / "own")
    code, out, err = run("push", own, REPO, "--private", "--licence", "Apache-2.0", "--data-name", "Planted",
                         "--json", tmp_path / "push.json")
    assert code == 0, err
    facts = json.loads((tmp_path / "push.json").read_text())
    assert facts["repo"] == REPO and facts["commit"] in out and there.repos[REPO].private
    assert "the LLM of this model is the local folder" in err
    card = files(there)["README.md"].decode()
    assert "license: apache-2.0" in card and f"# {REPO}" in card and "| data set | Planted |" in card
    code, out, err = run("recommend", REPO, "--history", "i1,i2", "--k", 3, "--json", tmp_path / "hub.json")
    assert code == 0, err
    run("recommend", own, "--history", "i1,i2", "--k", 3, "--json", tmp_path / "own.json")
    assert json.loads((tmp_path / "hub.json").read_text()) == json.loads((tmp_path / "own.json").read_text())
    pl.DataFrame({"user_id": ["a", "b"], "items": [["i1"], ["i2", "i3"]]}).write_parquet(tmp_path / "h.parquet")
    code, out, err = run("batch", REPO, tmp_path / "h.parquet", tmp_path / "out", "--quiet")
    assert code == 0 and "2 users, 2 answered" in out, err
    assert model_identity(own) == json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]
    code, _, err = run("recommend", "my-shop/nothing", "--history", "i1")
    assert code == 2 and err.startswith("error: there is no folder my-shop/nothing here") and "Traceback" not in err
    code, _, err = run("push", tmp_path / "none", REPO)
    assert code == 2 and "none is not a model folder" in err


def test_an_index_by_name(there, folder, run, tmp_path, monkeypatch):
    hub.push_folder(folder, REPO, token=TOKEN)
    code, out, err = run("index", "build", REPO, tmp_path / "index", "--kind", "exact", "--queries", 5)
    assert code == 0 and f"{N} items" in out, err
    for name, flags in (("plain", ()), ("index", ("--index", tmp_path / "index"))):
        code, _, err = run("recommend", REPO, "--history", "i1,i2", "--json", tmp_path / f"{name}.json", *flags)
        assert code == 0, err
    by_index, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("index", "plain"))
    assert [row["item_id"] for row in by_index] == [row["item_id"] for row in plain]
    assert [row["score"] for row in by_index] == pytest.approx([row["score"] for row in plain])


def test_rays_workers_get_the_folder_that_a_name_stands_for(there, folder, run, tmp_path, monkeypatch):
    asked = []

    def ran(*arguments):
        asked.append(arguments)
        return dict.fromkeys(("users", "answered", "no_known_item", "nothing_left", "items", "unknown_items", "parts",
                              "parts_missing"), 0)

    monkeypatch.setattr(batch_ray, "run", ran)
    hub.push_folder(folder, REPO, token=TOKEN)
    pl.DataFrame({"user_id": ["a"], "items": [["i1"]]}).write_parquet(tmp_path / "h.parquet")
    code, _, err = run("batch", REPO, tmp_path / "h.parquet", tmp_path / "out", "--engine", "ray", "--index", "x")
    assert code == 0, err
    job = asked[0][0]
    assert (tmp_path / "cache") in job.model.parents and model_identity(job.model) == model_identity(folder)
    assert str(job.index) == "x"


def test_serve_by_name_keeps_changes_outside_the_cache(there, folder, run, tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    from laserrec.server import listening

    facts = []

    def look(app, *_):
        client = TestClient(app, base_url="http://127.0.0.1")
        facts.append(client.get("/v1/model").json())
        new = {"item_id": f"x{len(facts)}", "title": "glue"}
        assert client.post("/v1/items", json={"items": [new]}).status_code == 201

    hub.push_folder(folder, REPO, token=TOKEN)
    monkeypatch.setattr(listening, "run", look)
    monkeypatch.chdir(tmp_path)
    for name in (REPO, f"{REPO}@main"):  # another revision goes on with the same changes
        code, _, err = run("serve", name)
        assert code == 0, err
    assert [(f["name"], f["added"]) for f in facts] == [(REPO, 0), (f"{REPO}@main", 1)]
    assert (tmp_path / "served" / REPO / "items.parquet").is_file()
    assert not list((tmp_path / "cache").rglob("served"))


def test_evaluate_by_name(there, folder):
    hub.push_folder(folder, REPO, token=TOKEN)
    rows, data = tiny.histories([0, 1], [8]), tiny.planted(N, users=16)
    one, two = (load_scorer(name, data, CPU)[0] for name in (REPO, str(folder)))
    assert one.score(rows).equal(two.score(rows))


def test_the_environment_names_the_hub_and_the_token(there, folder, tmp_path):
    """As a user has it: a process of its own, nothing replaced."""
    hub.push_folder(folder, REPO, private=True, token=TOKEN)
    env = {**os.environ, **fake_hub.environment(there.url, tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "laserrec", "recommend", REPO, "--history", "i1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "recommended next" in done.stdout, done.stderr
