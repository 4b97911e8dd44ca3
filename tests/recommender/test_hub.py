"""Models to and from a small hub on loopback: what goes up comes down, and every refusal says what to do."""

import json
import shutil
from dataclasses import replace

import fake_hub
import polars as pl
import pytest
import tiny
from fake_hub import TOKEN

from laserrec import LaserRecommender
from laserrec.recommender import hub
from laserrec.recommender.folder import KNOWN_FILES
from laserrec.util.errors import UserError

N = 12
REPO = "my-shop/laser-tools"


@pytest.fixture(scope="module")
def folder(fit, tmp_path_factory):
    out = tmp_path_factory.mktemp("share") / "model"
    fit(tiny.planted(N, users=16), out, train={"stage_one_epochs": 0, "stage_two_epochs": 0})
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
    assert set(files(there)) == {*KNOWN_FILES, ".gitattributes"}
    assert (llm_folder() / "model.safetensors").read_bytes() not in files(there).values()


def test_a_second_push_deletes_what_the_model_no_longer_has_and_keeps_what_others_put_there(there, model, folder):
    hub.push_folder(folder, REPO, token=TOKEN)
    assert "log.jsonl" in files(there) and json.loads(files(there)["model.json"])["format"] == 3
    repo = there.repos[REPO]
    repo.commit("main", {**files(there), "notes.md": b"the owner's"})
    model.fitted = replace(model.fitted, log=None)
    model.push_to_hub(REPO, token=TOKEN)
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
    there.repos[REPO].commit("main", {**whole, "weights.safetensors": whole["weights.safetensors"][:-5]})
    with pytest.raises(UserError, match=r"weights\.safetensors is cut short.*copy or download the folder anew"):
        LaserRecommender.from_pretrained(REPO, llm())


def test_a_changed_folder_is_not_pushed(there, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "items.safetensors").write_bytes((own / "items.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"items\.safetensors has changed"):
        hub.push_folder(own, REPO, token=TOKEN)
    (own / "items.safetensors").unlink()
    (own / "items.safetensors").symlink_to(folder / "items.safetensors")
    with pytest.raises(UserError, match=r"items\.safetensors is a link, which is not followed"):
        hub.push_folder(own, REPO, token=TOKEN)
    assert there.asked == []


def test_a_strangers_code_is_not_run(there, model, llm, folder, llm_folder, tmp_path):
    """Nothing in a model folder can allow what the caller did not."""
    shady = shutil.copytree(llm_folder(), tmp_path / "shady")
    kind = json.loads((shady / "config.json").read_text())
    (shady / "config.json").write_text(json.dumps({**kind, "model_type": "shady", "auto_map": {
        name: f"evil.{name}" for name in ("AutoConfig", "AutoModel")}}))
    (shady / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass AutoConfig: pass\n")
    model.push_to_hub(REPO, token=TOKEN)
    note = json.loads(files(there)["model.json"])
    assert "trust_remote_code" not in note["config"]["backbone"] or not note["config"]["backbone"]["trust_remote_code"]
    note["config"]["backbone"] |= {"name": str(shady), "trust_remote_code": True}
    there.repos[REPO].commit("main", {**files(there), "model.json": json.dumps(note).encode()})
    for backbone in (None, shady):
        with pytest.raises(UserError):
            LaserRecommender.from_pretrained(REPO, backbone)
    assert not (tmp_path / "ran").exists()
