"""Models to and from a small hub on loopback: what goes up comes down, and every refusal says what to do."""

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

from laserrec import LaserRecommender
from laserrec.batch import ray_engine as batch_ray
from laserrec.cli import main as cli
from laserrec.recommender import hub
from laserrec.recommender.folder import KNOWN_FILES, model_identity
from laserrec.util.errors import UserError

N = 12
REPO = "my-shop/laser-tools"


@pytest.fixture(scope="module")
def folder(llm, llm_folder, tmp_path_factory):
    config = tiny.config(llm_folder(), train={"stage_one_epochs": 0, "stage_two_epochs": 0})
    out = tmp_path_factory.mktemp("share") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, out, False, llm())
    return out


@pytest.fixture
def model(folder, llm):
    return LaserRecommender.from_pretrained(folder, llm())


@pytest.fixture
def there(monkeypatch, tmp_path):
    with fake_hub.used(monkeypatch, tmp_path / "cache") as server:
        yield server


def files(server, branch="main"):
    repo = server.repos[REPO]
    return repo.commits[repo.branches[branch]]


# -- there and back ---------------------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_went(there, model, llm):
    model.add_items(pl.DataFrame({"item_id": ["new"], "title": ["steel drill"]}))
    address = model.push_to_hub(REPO, private=True, token=TOKEN, commit_message="first", licence="MIT")
    repo = there.repos[REPO]
    assert repo.private and repo.messages[-1] == "first" and address.endswith(repo.branches["main"])
    assert sum("/commit/" in line for line in there.asked) == 1  # all or nothing
    back = LaserRecommender.from_pretrained(REPO, llm(), token=TOKEN)
    ask = [["i1", "new"], ["i9"]]
    got, want = back.recommend(ask, k=99), model.recommend(ask, k=99)
    assert got.drop("score").equals(want.drop("score")) and "new" in got["item_id"]
    assert got["score"].to_list() == pytest.approx(want["score"].to_list(), abs=1e-5)


def test_only_the_models_own_files_go_up_and_the_llm_does_not(there, folder, llm_folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "served").mkdir()
    (own / "served" / "items.parquet").write_bytes(b"what callers added")
    (own / "notes.txt").write_text("mine")
    assert (own / "tensorboard").is_dir()  # the curves of the training, which nobody who loads the model needs
    with open(own / "training.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")  # nor are they counted as damage
    hub.push_folder(own, REPO, token=TOKEN)
    assert set(files(there)) == {*KNOWN_FILES, ".gitattributes"} - {"student.safetensors"}  # it is not distilled
    assert (llm_folder() / "model.safetensors").read_bytes() not in files(there).values()


def test_a_second_push_deletes_what_the_model_no_longer_has_and_keeps_what_others_put_there(there, model, folder):
    hub.push_folder(folder, REPO, token=TOKEN)
    assert "log.jsonl" in files(there)
    repo = there.repos[REPO]
    repo.commit("main", {**files(there), "notes.md": b"the owner's"})
    model.push_to_hub(REPO, token=TOKEN)  # saved anew, without the fit's log
    assert "log.jsonl" not in files(there) and files(there)["notes.md"] == b"the owner's"


def test_a_branch_is_made_and_loaded(there, model, llm):
    model.push_to_hub(REPO, token=TOKEN)
    before = dict(files(there))
    model.add_items(pl.DataFrame({"item_id": ["only here"], "title": ["blue paint"]}))
    model.push_to_hub(REPO, token=TOKEN, revision="spring")
    model.push_to_hub(REPO, token=TOKEN, revision="spring")  # the branch is there now
    assert files(there) == before
    for back in (LaserRecommender.from_pretrained(REPO, llm(), revision="spring"),
                 LaserRecommender.from_pretrained(f"{REPO}@spring", llm())):
        assert "only here" in back.items["item_id"].to_list()
    assert len(LaserRecommender.from_pretrained(REPO, llm()).items) == N


def test_what_was_loaded_once_is_loaded_without_a_network(there, model, llm, monkeypatch):
    from huggingface_hub import constants

    model.push_to_hub(REPO, token=TOKEN)
    LaserRecommender.from_pretrained(REPO, llm())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(LaserRecommender.from_pretrained(REPO, llm()).items) == N


def test_files_that_are_no_models_are_not_downloaded(there, model, llm, tmp_path):
    model.push_to_hub(REPO, token=TOKEN)
    there.repos[REPO].commit("main", {**files(there), "evil.pkl": b"x", "id_model/more.bin": b"x"})
    LaserRecommender.from_pretrained(REPO, llm())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".pkl", ".bin")]
    assert not [line for line in there.asked if "evil" in line or "more.bin" in line]


def test_a_folder_here_goes_before_the_hub(there, folder, llm, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    LaserRecommender.from_pretrained(REPO, llm())
    assert there.asked == []
    with pytest.raises(UserError, match="a revision is for a model on the hub"):
        LaserRecommender.from_pretrained(REPO, llm(), revision="main")


# -- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_not_there_or_not_shown(there, model, llm):
    with pytest.raises(UserError, match=r"no folder my-shop/laser-tools here, and the hub shows no repository.*log in"):
        LaserRecommender.from_pretrained(REPO, llm())
    there.new(REPO, private=True)
    with pytest.raises(UserError, match=r"shows no repository my-shop/laser-tools to you.*HF_TOKEN"):
        LaserRecommender.from_pretrained(REPO, llm(), token="another's")
    with pytest.raises(UserError, match="has no revision 'spring'"):
        LaserRecommender.from_pretrained(REPO, llm(), revision="spring", token=TOKEN)
    with pytest.raises(UserError, match=r"is no model of laserrec: it has no model\.json"):
        LaserRecommender.from_pretrained(REPO, llm(), token=TOKEN)


def test_a_gated_model(there, model, llm):
    model.push_to_hub(REPO, token=TOKEN)
    there.repos[REPO].gated = True
    with pytest.raises(UserError, match="is gated: ask for access on its page"):
        LaserRecommender.from_pretrained(REPO, llm())


def test_who_may_not_write_is_told(there, model):
    with pytest.raises(UserError, match=r"not let you write to my-shop/laser-tools \(403\).*don't have the rights"):
        model.push_to_hub(REPO, token="a reader's")
    assert there.repos == {}
    there.new(REPO)
    with pytest.raises(UserError, match=r"does not let you write to .* \(403\).*log in with .hf auth login."):
        model.push_to_hub(REPO, token="a reader's")
    assert list(files(there)) == [".gitattributes"]


@pytest.mark.parametrize("name", ["tools", "a/b/c", "my shop/tools", "my-shop/tools@main", "-a/--"])
def test_a_name_that_is_none(there, folder, name):
    with pytest.raises(UserError, match="is no name on the hub"):
        hub.push_folder(folder, name, token=TOKEN)
    assert not any("/commit/" in line for line in there.asked)


def test_no_network(there, model, llm, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set and no whole copy is in the cache"):
        LaserRecommender.from_pretrained(REPO, llm())
    with pytest.raises(UserError, match="was not pushed: HF_HUB_OFFLINE is set"):
        model.push_to_hub(REPO, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fake_hub.point_to(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match="can't be reached and no whole copy is in the cache"):
        LaserRecommender.from_pretrained(REPO, llm())
    with pytest.raises(UserError, match=r"was not pushed: .* can't be reached"):
        model.push_to_hub(REPO, token=TOKEN)


def test_a_hub_that_rests(there, model, llm):
    there.fail_with = 500
    with pytest.raises(UserError, match=r"can't do this now \(500\): try again later.*the fake hub rests"):
        model.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(UserError, match=r"can't do this now \(500\): try again later"):
        LaserRecommender.from_pretrained(REPO, llm())


def test_a_file_that_was_changed_on_the_way(there, model, llm):
    model.push_to_hub(REPO, token=TOKEN)
    whole = files(there)
    there.repos[REPO].commit("main", {**whole, "adapter.safetensors": whole["adapter.safetensors"][:-5]})
    with pytest.raises(UserError, match=r"adapter\.safetensors is cut short.*copy or download the folder anew"):
        LaserRecommender.from_pretrained(REPO, llm())


def test_a_changed_folder_is_not_pushed(there, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "items.safetensors").write_bytes((own / "items.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"items\.safetensors has changed"):
        hub.push_folder(own, REPO, token=TOKEN)
    assert there.asked == []


def test_a_strangers_code_is_not_run(there, model, llm, folder):
    model.push_to_hub(REPO, token=TOKEN)
    note = json.loads(files(there)["model.json"])
    note["config"]["backbone"]["trust_remote_code"] = True
    there.repos[REPO].commit("main", {**files(there), "model.json": json.dumps(note).encode()})
    with pytest.raises(UserError, match="wants to run Python code that is shipped with the LLM"):
        LaserRecommender.from_pretrained(REPO)
    with pytest.raises(UserError, match="wants to run Python code"):
        LaserRecommender.from_pretrained(REPO, str(llm().name))
    LaserRecommender.from_pretrained(REPO, llm())  # the caller's own, loaded already


# -- the command line -------------------------------------------------------------------------------------------


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
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads((tmp_path / "plain.json").read_text())


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
    import uvicorn
    from fastapi.testclient import TestClient

    facts = []

    def look(app, **options):
        client = TestClient(app)
        facts.append(client.get("/v1/model").json())
        new = {"item_id": f"x{len(facts)}", "title": "glue"}
        assert client.post("/v1/items", json={"items": [new]}).status_code == 201

    hub.push_folder(folder, REPO, token=TOKEN)
    monkeypatch.setattr(uvicorn, "run", look)
    monkeypatch.chdir(tmp_path)
    for name in (REPO, f"{REPO}@main"):  # another revision goes on with the same changes
        code, _, err = run("serve", name)
        assert code == 0, err
    assert [(f["name"], f["added"]) for f in facts] == [(REPO, 0), (f"{REPO}@main", 1)]
    assert (tmp_path / "served" / REPO / "items.parquet").is_file()
    assert not list((tmp_path / "cache").rglob("served"))


def test_evaluate_by_name(there, folder, run, tmp_path):
    from laserrec.recommender.scorers import load_scorer

    hub.push_folder(folder, REPO, token=TOKEN)
    rows = tiny.histories([1, 2], [9])
    assert load_scorer(REPO, tiny.planted(N, users=16))(rows).equal(load_scorer(str(folder), tiny.planted(N))(rows))


def test_the_environment_names_the_hub_and_the_token(there, folder, tmp_path):
    """As a user has it: a process of its own, nothing replaced."""
    hub.push_folder(folder, REPO, private=True, token=TOKEN)
    env = {**os.environ, **fake_hub.environment(there.url, tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "laserrec", "recommend", REPO, "--history", "i1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "recommended next" in done.stdout, done.stderr
