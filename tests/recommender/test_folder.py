"""The model folder: what is in it, what is checked, and what is refused with which words."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.llm.backbone import load_backbone
from laserrec.methods.laser.ranker import FEATURES
from laserrec.recommender.folder import known_items, model_identity, read_note, shared_files, update_note
from laserrec.recommender.scorers import check_scorer
from laserrec.util import checkpoint
from laserrec.util.errors import UserError

N = 12
ASK = [["i1", "i2"], ["i9"]]


@pytest.fixture(scope="module")
def model(fit, tmp_path_factory):
    return fit(tiny.planted(N, users=16), tmp_path_factory.mktemp("model") / "model",
               head={"id_share": 0.3, "id_product": True, "whiten_dims": 8, "projection": True})


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def note_of(folder):
    return json.loads((folder / "model.json").read_text())


def edit(folder, **changes):
    (folder / "model.json").write_text(json.dumps({**note_of(folder), **changes}))


def test_saved_and_loaded_is_the_same(model, folder, llm):
    again = LaserRecommender.from_pretrained(folder, llm())
    assert again.recommend(ASK, k=N).equals(model.recommend(ASK, k=N))
    assert again.facts == model.facts and again.config == model.config and again.items.equals(model.items)


def test_what_it_holds(folder, llm):
    note = note_of(folder)
    assert note["format"] == 3 and note["n_items"] == note["n_known"] == N and note["method"] == "laser"
    nested = {"id_model/model.json", "id_model/weights.safetensors"}
    assert set(note["files"]) == {"weights.safetensors", "items.parquet", "items.safetensors", "log.jsonl", *nested}
    assert set(shared_files(folder)) == {*note["files"], "model.json", "README.md"}
    # The LLM is named, and nothing of it is here.
    assert note["backbone"] == {"name": llm().name, "revision": None, "sha256": llm().sha256}
    weights = checkpoint.load(folder / "weights.safetensors")[0]
    assert {n.split(".")[0] for n in weights} == {"reader", "head"}
    assert {n.split(".")[1] for n in weights if n.startswith("reader")} == {"mformer", "suffix"}
    assert checkpoint.load(folder / "items.safetensors")[0]["vectors"].shape[0] == N


def test_a_save_keeps_what_others_put_there(model, folder):
    (folder / "served").mkdir()
    (folder / "served" / "items.parquet").write_bytes(b"what callers added")
    (folder / "LICENSE").write_text("mine")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "a.txt").write_text("years of work")
    (folder / "checkpoint.safetensors").write_bytes(b"of a fit that went before")
    model.save_pretrained(folder)
    assert (folder / "notes" / "deep" / "a.txt").read_text() == "years of work"
    assert not (folder / "checkpoint.safetensors").exists()
    assert (folder / "served" / "items.parquet").read_bytes() == b"what callers added"
    assert (folder / "LICENSE").read_text() == "mine" and "LICENSE" in shared_files(folder)
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("/etc/hostname")
    assert "LICENSE" not in shared_files(folder)  # no stranger's file goes to others through a link


def test_a_save_that_fails_leaves_the_old_model(model, folder, llm, monkeypatch):
    from laserrec.recommender import folder as module

    monkeypatch.setattr(module, "write_card", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder)
    assert LaserRecommender.from_pretrained(folder, llm()).recommend(ASK, k=N).equals(model.recommend(ASK, k=N))
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_a_save_replaces_no_strangers_folder(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and is not replaced"):
        model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("name", "message"), [
    ("training.jsonl", "is not empty and is not replaced"), ("checkpoint.safetensors", "is not empty"),
    ("model.json", r"model\.json is not laserrec's; name another folder")])
def test_a_save_replaces_no_other_programs_model(model, tmp_path, name, message):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_text('{"architectures": ["Llama"]}')
    with pytest.raises(UserError, match=message):
        model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / name).read_text() == '{"architectures": ["Llama"]}'


# -- the LLM ----------------------------------------------------------------------------------------------------


def test_loading_finds_the_backbone_by_name(model, folder):
    again = LaserRecommender.from_pretrained(folder)
    assert again.model.reader.backbone.tensor_hash() == model.model.reader.backbone.tensor_hash()


def test_other_backbone_weights_are_refused(folder, settings, tmp_path):
    other = tiny.save_llm(tmp_path / "other", "llama", seed=3)
    config = settings(backbone={"name": str(other), "precision": "fp32"}).backbone
    for backbone in (load_backbone(config), other, str(other)):
        with pytest.raises(UserError, match=r"means nothing to other weights\. Get the weights it was fitted with"):
            LaserRecommender.from_pretrained(folder, backbone)


def test_weights_that_changed_in_their_place_are_refused(model, folder, llm_folder, tmp_path):
    """The folder's name is the same, its bytes are not."""
    place = shutil.copytree(llm_folder(), tmp_path / "llm")
    assert LaserRecommender.from_pretrained(folder, place).embeddings.equal(model.embeddings)
    tiny.save_llm(place, "llama", seed=3)
    with pytest.raises(UserError, match=r"was fitted with an LLM of sha256 .* here has"):
        LaserRecommender.from_pretrained(folder, place)


def test_a_branch_that_went_on_is_passed_over_for_the_commit_that_was_trained_with(model, folder, llm_folder, tmp_path,
                                                                                   monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place, old, new = tmp_path / "cache" / "models--lab--llm", "a" * 40, "b" * 40
    shutil.copytree(llm_folder(), place / "snapshots" / old)
    tiny.save_llm(place / "snapshots" / new, "llama", seed=9)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(new)
    note = note_of(folder)
    edit(folder, config={**note["config"], "backbone": {**note["config"]["backbone"], "name": "lab/llm"}},
         backbone={**note["backbone"], "name": "lab/llm", "revision": old})
    again = LaserRecommender.from_pretrained(folder)
    assert again.recommend([["i1"]], k=3).equals(model.recommend([["i1"]], k=3))
    edit(folder, backbone={**note["backbone"], "name": "lab/llm", "revision": None})
    with pytest.raises(UserError, match="means nothing to other weights"):
        LaserRecommender.from_pretrained(folder)


# -- damage -----------------------------------------------------------------------------------------------------


def forge(folder, section, **changes):
    """Settings that claim something else than the weights are."""
    tree = note_of(folder)["config"]
    edit(folder, config={**tree, section: {**tree[section], **changes}})


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "model.json").unlink(), "is not a model folder; make one with fit"),
    (lambda f: (f / "weights.safetensors").write_bytes(b"xx"), r"weights\.safetensors is cut short: it has 2 of"),
    (lambda f: (f / "items.safetensors").unlink(), r"items\.safetensors is missing; copy or download the folder anew"),
    (lambda f: (f / "items.parquet").unlink(), r"items\.parquet is missing"),
    (lambda f: flip(f / "items.parquet"), r"items\.parquet has changed: its sha256 is"),
    (lambda f: flip(f / "weights.safetensors"), r"weights\.safetensors has changed"),
    (lambda f: flip(f / "id_model" / "weights.safetensors"), r"id_model/weights\.safetensors has changed"),
    (lambda f: (f / "id_model" / "model.json").write_text("{}"), r"id_model/model\.json is cut short"),
    (lambda f: (f / "model.json").write_text("{"), r"model\.json.*damaged"),
    (lambda f: (f / "model.json").write_text("[]"), r"model\.json is not a model's: its format is None"),
    (lambda f: edit(f, format=True), r"model\.json is not a model's: its format is True"),
    (lambda f: edit(f, format=99), r"has format 99 and laserrec [\d.]+ reads format 3.*pip install --upgrade"),
    (lambda f: edit(f, format=2), r"has format 2 and .* reads format 3; it was made by an older version: fit again"),
    (lambda f: edit(f, method="magic"), "unknown method 'magic'; there are: laser"),
    (lambda f: edit(f, files={}), r"model\.json is damaged: files of weights\.safetensors.* missing"),
    (lambda f: edit(f, files={**note_of(f)["files"], "../evil": {"bytes": 1, "sha256": ""}}),
     r"damaged: files of \.\./evil"),
    (lambda f: edit(f, n_known=N + 1), r"damaged: n_known, n_items"),
    (lambda f: edit(f, n_items=N + 1), r"items\.parquet is not this model's catalogue: it has 12 rows of 13"),
    (lambda f: edit(f, backbone={"name": "x"}), r"damaged: backbone missing or not as a model has it"),
    (lambda f: edit(f, config={"train": {"nonsense": 1}}), r"train\.nonsense"),
    (lambda f: forge(f, "mformer", prefix="none"), "don't fit its settings"),
    (lambda f: forge(f, "mformer", experts=10**7), r"does not fit the settings beside it: reader\.mformer\.experts"),
    (lambda f: edit(f, method="sasrec"), r"does not fit the settings beside it: item\.weight has shape None"),
])
def test_a_spoilt_folder_is_named(folder, llm, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        LaserRecommender.from_pretrained(folder, llm())


@pytest.mark.parametrize(("shape", "message"), [
    ((4, FEATURES - 1), f"fitted with an earlier version .* has {FEATURES - 1} inputs, not {FEATURES}; fit it again"),
    ((), "fitted with an earlier version"), ((4, FEATURES + 1), "fitted with a later version .*pip install --upgrade")])
def test_a_ranking_network_of_another_version_is_told_by_whoever_looks_at_the_folder(folder, llm, shape, message):
    file = folder / "weights.safetensors"
    weights = checkpoint.load(file)[0]
    checkpoint.save(file, {**weights, "ranker.hidden.weight": torch.zeros(shape)})
    for look in (read_note, known_items, model_identity, lambda f: check_scorer(str(f)),
                 lambda f: LaserRecommender.from_pretrained(f, llm())):
        with pytest.raises(UserError, match=message):
            look(folder)
    checkpoint.save(file, {**weights, "ranker.hidden.weight": torch.zeros(4, FEATURES)})
    assert len(known_items(folder)) == N


def test_an_unfinished_fit_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="unfinished fit; start the same fit again to go on with it"):
        LaserRecommender.from_pretrained(tmp_path)


def test_what_was_recorded_makes_no_other_model(folder):
    before = model_identity(folder)
    update_note(folder, results=[], card={"licence": "mit"})
    assert model_identity(folder) == before and read_note(folder)["card"] == {"licence": "mit"}
    edit(folder, removed=[3])
    assert model_identity(folder) != before
