"""The public class: the caller's ids in and out, saved and loaded alike, and every mistake named."""

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
import tiny
import torch

from laserrec import LaserRecommender
from laserrec.config import Layout
from laserrec.llm.backbone import load_backbone
from laserrec.util.errors import UserError

N = 12
PROMPT = {"template": "no_instruction", "max_items": 3, "max_item_tokens": 6}
NEW = pl.DataFrame({"item_id": ["new1", "new2"], "title": ["steel drill 99", "blue wood"], "brand": ["redco", None]})


def settings(folder, **sections):
    return tiny.config(folder, **{"prompt": PROMPT, "train": {"lr": 1e-2, "stage_one_epochs": 1, "stage_two_epochs": 1,
                                                            "batch_size": 32}, **sections})


@pytest.fixture(scope="module", params=list(Layout))
def model(request, llm, llm_folder, tmp_path_factory):
    """A fitted model; tests that add items load their own."""
    config = settings(llm_folder(), prompt={**PROMPT, "layout": request.param},
                      head={"id_share": 0.3, "whiten_dims": 8, "projection": True})
    folder = tmp_path_factory.mktemp("model") / "model"
    return LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.id_model(N), config, folder, False, llm())


@pytest.fixture
def copy(model, llm, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    return LaserRecommender.from_pretrained(tmp_path / "copy", llm())


def frames():
    data = tiny.planted(N, users=16)
    names = dict(zip(data.users["user"], data.users["user_id"], strict=True))
    acts = pl.DataFrame([{"user_id": names[r["user"]], "item_id": f"i{r['item']}", "timestamp": r["position"]}
                         for r in data.interactions.to_dicts()])
    return acts, data.items.drop("item")


# -- fit --------------------------------------------------------------------------------------------------------


def test_fit_on_polars_and_pandas_frames_is_the_same(llm_folder, tmp_path):
    acts, goods = frames()
    config = settings(llm_folder(), data={"min_user_interactions": 1, "min_item_interactions": 1})
    one = LaserRecommender.fit(acts, goods, config, tmp_path / "run", progress=False)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"data", "id_model", "model"}
    renamed = acts.rename({"user_id": "customer"}).to_pandas()
    two = LaserRecommender.fit(renamed, goods.to_pandas(), config, columns={"user_id": "customer"}, progress=False)
    assert np.array_equal(one.encode_items(), two.encode_items())
    top = one.recommend([["i1", "i2"]], k=3)
    assert top.equals(two.recommend([["i1", "i2"]], k=3))
    assert set(top["item_id"]) <= set(goods["item_id"]) and top["rank"].to_list() == [1, 2, 3]
    again = LaserRecommender.fit(acts, goods, config, tmp_path / "run", progress=False)
    assert np.array_equal(one.encode_items(), again.encode_items())


def test_a_finished_fit_is_loaded_and_other_settings_are_refused(llm, llm_folder, tmp_path, monkeypatch):
    from laserrec.training.train import Fit

    data, ids, folder = tiny.planted(N, users=16), tiny.id_model(N), tmp_path / "model"
    first = LaserRecommender.fit_dataset(data, ids, settings(llm_folder()), folder, False, llm())
    assert not (folder / "checkpoint.safetensors").exists()
    monkeypatch.setattr(Fit, "run", None)  # a second fit would fail
    again = LaserRecommender.fit_dataset(data, ids, settings(llm_folder()), folder, False, llm())
    assert torch.equal(again.embeddings, first.embeddings)
    with pytest.raises(UserError, match="other settings, data or ID model"):
        LaserRecommender.fit_dataset(data, ids, settings(llm_folder(), train={"seed": 5}), folder, False, llm())


def test_a_finished_fit_from_before_a_setting_existed_is_loaded(llm, llm_folder, tmp_path, monkeypatch):
    from laserrec.training.train import Fit

    data, ids, folder = tiny.planted(N, users=16), tiny.id_model(N), tmp_path / "model"
    LaserRecommender.fit_dataset(data, ids, settings(llm_folder()), folder, False, llm())
    note = json.loads((folder / "model.json").read_text())
    del note["config"]["train"]["learn_temperature"]
    (folder / "model.json").write_text(json.dumps(note | {"fingerprint": "of a version that knew fewer settings"}))
    monkeypatch.setattr(Fit, "run", None)  # a second fit would fail
    LaserRecommender.fit_dataset(data, ids, settings(llm_folder()), folder, False, llm())
    with pytest.raises(UserError, match="other settings, data or ID model"):
        LaserRecommender.fit_dataset(data, tiny.id_model(N, seed=5), settings(llm_folder()), folder, False, llm())


# -- recommend --------------------------------------------------------------------------------------------------


def test_recommendations_are_the_best_cosines(model):
    histories = {"anna": ["i1", "i2"], "never seen": ["i9"]}
    got = model.recommend(histories, k=4)
    assert got.columns == ["user_id", "item_id", "score", "rank"]
    users, items = model.encode_users(histories), model.encode_items()
    for row, user in enumerate(histories):
        cosines = items @ users[row] / np.linalg.norm(items, axis=1) / np.linalg.norm(users[row])
        best = np.argsort(-cosines)[:4]
        mine = got.filter(pl.col("user_id") == user)
        assert mine["item_id"].to_list() == [f"i{b + 1}" for b in best]
        assert mine["score"].to_list() == pytest.approx(cosines[best].tolist(), abs=1e-5)
        assert mine["rank"].to_list() == [1, 2, 3, 4]


def test_every_form_of_histories_gives_the_same(model):
    rows = [["i1", "i2"], ["i9"]]
    frame = pl.DataFrame({"user_id": ["0", "0", "1"], "item_id": ["i1", "i2", "i9"]})
    want = model.recommend(rows, k=3)
    assert want["user_id"].to_list() == [0, 0, 0, 1, 1, 1]
    for other in ({0: rows[0], 1: rows[1]}, frame, frame.lazy().collect(), [tuple(r) for r in rows]):
        got = model.recommend(other, k=3)
        assert got["item_id"].to_list() == want["item_id"].to_list()
        assert got["score"].to_list() == pytest.approx(want["score"].to_list(), abs=1e-6)
    pandas = model.recommend(frame.to_pandas(), k=3)
    assert isinstance(pandas, pd.DataFrame) and pandas["item_id"].tolist() == want["item_id"].to_list()


def test_a_user_does_not_depend_on_the_others(model):
    rows = [[f"i{1 + (u + p) % N}" for p in range(1 + u % 5)] for u in range(40)]  # more than one batch
    together = model.recommend(rows, k=2)
    for u in (0, 17, 39):
        alone = model.recommend([rows[u]], k=2)
        mine = together.filter(pl.col("user_id") == u)
        assert mine["score"].to_list() == pytest.approx(alone["score"].to_list(), abs=1e-5)
        assert mine["item_id"].to_list() == alone["item_id"].to_list()


def test_seen_items_and_candidates(model):
    history = [["i1", "i2", "i3"]]
    everything = model.recommend(history, k=99)
    assert sorted(everything["item_id"]) == sorted(f"i{j}" for j in range(1, N + 1))
    new = model.recommend(history, k=99, exclude_seen=True)["item_id"].to_list()
    assert new == [i for i in everything["item_id"] if i not in ("i1", "i2", "i3")]
    few = model.recommend(history, k=99, candidates=["i9", "i2", "i5"])
    assert few["item_id"].to_list() == [i for i in everything["item_id"] if i in ("i9", "i2", "i5")]
    assert few["rank"].to_list() == [1, 2, 3]
    both = model.recommend(history, k=99, candidates=["i2", "i5"], exclude_seen=True)
    assert both["item_id"].to_list() == ["i5"]


def test_long_histories_count_by_their_end(model):
    long = [[f"i{1 + p % N}" for p in range(300)]]
    assert model.recommend(long, k=3)["score"].to_list() == pytest.approx(
        model.recommend([long[0][-50:]], k=3)["score"].to_list(), abs=1e-5)


def test_evaluator_scores_are_the_recommendations(model):
    scores = model.score(tiny.histories([1, 2], [9]))
    got = model.recommend([["i1", "i2"], ["i9"]], k=N)
    for row in (0, 1):
        mine = got.filter(pl.col("user_id") == row)
        assert mine["score"].to_list() == pytest.approx(scores[row].sort(descending=True).values.tolist(), abs=1e-5)


def test_encode_items_by_id(model):
    assert np.array_equal(model.encode_items(["i3", "i1"]), model.encode_items()[[2, 0]])


@pytest.mark.parametrize(("ask", "message"), [
    (lambda m: m.recommend([["i1", "nope", "nada"]]), "history of user 0: 2 unknown item ids, first .'nope', 'nada'"),
    (lambda m: m.recommend({"anna": []}), "history of user 'anna': it is empty"),
    (lambda m: m.recommend({"anna": ["nope"]}, unknown="drop"), "no item of it is in the catalogue"),
    (lambda m: m.recommend(["i1", "i2"]), "one list of item ids; give a list of histories"),
    (lambda m: m.recommend([1, 2]), "one list of item ids; give a list of histories"),
    (lambda m: m.recommend({"anna": "i1"}), "history of user 'anna' is 'i1', not a list"),
    (lambda m: m.recommend("i1"), "expected a dict, a list of lists or a frame, not str"),
    (lambda m: m.recommend([]), "no histories"),
    (lambda m: m.recommend([["i1"]], k=0), "k is 0; it must be at least 1"),
    (lambda m: m.recommend([["i1"]], k=-3), "at least 1"),
    (lambda m: m.recommend([["i1"]], candidates=["i1", "nope"]), "candidates: 1 unknown item ids, first .'nope'"),
    (lambda m: m.recommend([["i1"]], unknown="ignore"), 'unknown is "error" or "drop"'),
    (lambda m: m.recommend(pl.DataFrame({"user": ["a"], "item_id": ["i1"]})), "column user_id is missing"),
    (lambda m: m.encode_items(["nope"]), "item_ids: 1 unknown"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x"]})), "column title is missing"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["i1"], "title": ["saw"]})), "in the catalogue already"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x", "x"], "title": ["saw", "saw"]})), "repeated"),
    (lambda m: m.add_items(pl.DataFrame({"item_id": ["x", "y"], "title": ["saw", " "]})), "1 have no title, .*'y'"),
])
def test_mistakes_are_named(model, ask, message):
    before = len(model.items)
    with pytest.raises(UserError, match=message):
        ask(model)
    assert len(model.items) == before


def test_unknown_items_can_be_dropped(model):
    got = model.recommend([["nope", "i1", "i2"]], k=3, unknown="drop")
    assert got.equals(model.recommend([["i1", "i2"]], k=3))


# -- items that come later --------------------------------------------------------------------------------------


def test_added_items_are_recommended_and_read(copy):
    before = copy.recommend([["i1"]], k=N)
    assert copy.add_items(NEW) == 2
    lent = copy.embeddings[:, -tiny.ID_MODEL.d_id :].norm(dim=1)
    assert torch.allclose(lent[N:], lent[:N].mean(), atol=1e-5)
    after = copy.recommend([["i1"]], k=99)
    assert sorted(after["item_id"]) == sorted([*before["item_id"], "new1", "new2"])
    old = after.filter(pl.col("item_id").str.starts_with("i"))
    assert old["item_id"].to_list() == before["item_id"].to_list()
    alone, mixed = copy.recommend([["new1"]], k=3), copy.recommend([["i1", "new2"]], k=3)
    assert alone.height == mixed.height == 3
    # In its text an item is nearest to itself when the user's side reads it the same way.
    assert not np.allclose(copy.encode_users([["new1"]]), copy.encode_users([["new2"]]), atol=1e-3)


def test_added_items_are_saved(copy, llm, tmp_path):
    copy.add_items(NEW.to_pandas())
    copy.save_pretrained(tmp_path / "more")
    again = LaserRecommender.from_pretrained(tmp_path / "more", llm())
    ask = [["i1", "new2"], ["new1"]]
    got, want = again.recommend(ask, k=99), copy.recommend(ask, k=99)
    assert got.drop("score").equals(want.drop("score"))
    assert np.allclose(got["score"], want["score"], atol=1e-5)  # the new texts were read in other batches
    assert again.items["item"].to_list() == list(range(1, N + 3))
    again.add_items(pl.DataFrame({"item_id": ["third"], "title": ["glue"]}))
    assert again.recommend(ask, k=99)["item_id"].n_unique() == N + 3


# -- the folder -------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(model, llm, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    ask = [["i1", "i2"], ["i9"]]
    assert again.recommend(ask, k=N).equals(model.recommend(ask, k=N))
    assert again.facts == model.facts
    assert again.encoder.laser.config == model.encoder.laser.config


def test_the_backbone_is_named_and_not_copied(model, llm, tmp_path):
    model.save_pretrained(tmp_path / "m")
    note = json.loads((tmp_path / "m" / "model.json").read_text())
    assert note["backbone"]["sha256"] == llm().sha256 and note["backbone"]["name"] == llm().name
    from laserrec.util import checkpoint

    names = set(checkpoint.load(tmp_path / "m" / "adapter.safetensors")[0])
    assert {n.split(".")[0] for n in names} <= {"mformer", "suffix", "head"}


def test_loading_finds_the_backbone_by_name(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = LaserRecommender.from_pretrained(tmp_path / "m")
    assert again.encoder.laser.backbone.tensor_hash() == model.encoder.laser.backbone.tensor_hash()


def test_other_backbone_weights_are_refused(model, llm_folder, tmp_path):
    model.save_pretrained(tmp_path / "m")
    tiny.save_llm(tmp_path / "other", "llama", seed=3)
    config = settings(tmp_path / "other").backbone
    for other in (load_backbone(config), tmp_path / "other", str(tmp_path / "other")):
        with pytest.raises(UserError, match=r"means nothing to other weights\. Get the weights it was trained with"):
            LaserRecommender.from_pretrained(tmp_path / "m", other)


def test_a_branch_that_went_on_is_passed_over_for_the_commit_that_was_trained_with(model, llm_folder, tmp_path,
                                                                                   monkeypatch):
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place, old, new = tmp_path / "cache" / "models--lab--llm", "a" * 40, "b" * 40
    shutil.copytree(llm_folder(), place / "snapshots" / old)
    tiny.save_llm(place / "snapshots" / new, "llama", seed=9)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(new)
    model.save_pretrained(tmp_path / "m")
    config = config_of(tmp_path / "m")
    note = json.loads((tmp_path / "m" / "model.json").read_text())
    edit(tmp_path / "m", config={**config, "backbone": {**config["backbone"], "name": "lab/llm"}},
         backbone={**note["backbone"], "name": "lab/llm", "revision": old})
    again = LaserRecommender.from_pretrained(tmp_path / "m")
    assert again.recommend([["i1"]], k=3).equals(model.recommend([["i1"]], k=3))
    edit(tmp_path / "m", backbone={**note["backbone"], "name": "lab/llm", "revision": None})
    with pytest.raises(UserError, match="means nothing to other weights"):
        LaserRecommender.from_pretrained(tmp_path / "m")


def test_weights_that_changed_in_their_place_are_refused(model, llm_folder, llm, tmp_path):
    """The folder's name is the same, its bytes are not."""
    import shutil

    place = shutil.copytree(llm_folder(), tmp_path / "llm")
    model.save_pretrained(tmp_path / "m")
    assert LaserRecommender.from_pretrained(tmp_path / "m", place).embeddings.equal(model.embeddings)
    tiny.save_llm(place, "llama", seed=3)
    with pytest.raises(UserError, match=r"was trained with backbone .* of sha256 .* here has"):
        LaserRecommender.from_pretrained(tmp_path / "m", place)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "model.json").unlink(), "is not a model folder; make one with laserrec fit"),
    (lambda f: (f / "adapter.safetensors").write_bytes(b"xx"), r"adapter\.safetensors is cut short: it has 2 of"),
    (lambda f: (f / "items.safetensors").unlink(), r"items\.safetensors is missing; copy or download the folder anew"),
    (lambda f: (f / "items.parquet").unlink(), r"items\.parquet is missing"),
    (lambda f: flip(f / "items.parquet"), r"items\.parquet has changed: its sha256 is"),
    (lambda f: flip(f / "adapter.safetensors"), r"adapter\.safetensors has changed"),
    (lambda f: flip(f / "id_model" / "model.safetensors"), r"id_model/model\.safetensors has changed"),
    (lambda f: (f / "model.json").write_text("{"), r"model\.json.*damaged"),
    (lambda f: (f / "model.json").write_text("[]"), r"model\.json is not a model's: its format is None"),
    (lambda f: edit(f, format=99), r"has format 99 and laserrec [\d.]+ knows formats up to 2.*pip install --upgrade"),
    (lambda f: edit(f, files={}), r"model\.json is damaged: it lacks files of adapter\.safetensors"),
    (lambda f: edit(f, files={**manifest_of(f), "../evil": {"bytes": 1, "sha256": ""}}), r"names files .* '\.\./evil'"),
    (lambda f: edit(f, config={"train": {"nonsense": 1}}), r"train\.nonsense"),
    (lambda f: edit(f, config={**config_of(f), "mformer": {"prefix": "none"}}), "doesn't fit the settings"),
])
def test_a_spoilt_folder_is_named(model, llm, tmp_path, spoil, message):
    model.save_pretrained(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        LaserRecommender.from_pretrained(tmp_path / "m", llm())


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "adapter.safetensors").write_bytes(b"xx"), "damaged or not a safetensors file"),
    (lambda f: (f / "items.safetensors").unlink(), "no such file"),
    (lambda f: (f / "items.parquet").unlink(), "no such file"),
    (lambda f: (f / "items.parquet").write_bytes(b"xx"), r"items\.parquet is damaged"),
])
def test_a_spoilt_folder_of_the_first_format_is_named_too(model, llm, tmp_path, spoil, message):
    as_format_1(model, tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        LaserRecommender.from_pretrained(tmp_path / "m", llm())


def test_a_folder_of_the_first_format_is_loaded(model, llm, tmp_path):
    """As written before there were checksums and cards."""
    as_format_1(model, tmp_path / "m")
    again = LaserRecommender.from_pretrained(tmp_path / "m", llm())
    assert again.recommend([["i1", "i2"]], k=N).equals(model.recommend([["i1", "i2"]], k=N))
    again.save_pretrained(tmp_path / "n")
    assert json.loads((tmp_path / "n" / "model.json").read_text())["format"] == 2


def as_format_1(model, folder):
    model.save_pretrained(folder)
    note = json.loads((folder / "model.json").read_text())
    for name in ("laserrec", "n_items", "files"):
        del note[name]
    (folder / "model.json").write_text(json.dumps({**note, "format": 1}))
    (folder / "README.md").unlink()


def test_what_was_recorded_makes_no_other_model(model, tmp_path):
    from laserrec.recommender.folder import model_identity, update_note

    model.save_pretrained(tmp_path / "m")
    before = model_identity(tmp_path / "m")
    update_note(tmp_path / "m", results=[], card={"licence": "mit"})
    assert model_identity(tmp_path / "m") == before
    as_format_1(model, tmp_path / "old")
    assert model_identity(tmp_path / "old") == before
    edit(tmp_path / "m", removed=[3])
    assert model_identity(tmp_path / "m") != before


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def manifest_of(folder):
    return json.loads((folder / "model.json").read_text())["files"]


def config_of(folder):
    return json.loads((folder / "model.json").read_text())["config"]


def edit(folder, **changes):
    note = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**note, **changes}))


def test_an_unfinished_fit_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="unfinished fit; run the same laserrec fit again to resume"):
        LaserRecommender.from_pretrained(tmp_path)


def test_a_learnt_offset_moves_the_historys_own_items(llm, llm_folder, tmp_path):
    """It is learnt, it is saved, and the scores of seen items alone are changed by it."""
    config = settings(llm_folder(), prompt=PROMPT, head={"seen_offset": True, "id_share": 0.2})
    planted = tiny.planted(N, users=16), tiny.id_model(N)
    model = LaserRecommender.fit_dataset(*planted, config, tmp_path / "model", False, llm())
    laser = model.encoder.laser
    assert float(laser.seen_offset.detach()) != -1.0
    again = LaserRecommender.from_pretrained(tmp_path / "model", llm())
    assert torch.equal(again.encoder.laser.seen_offset, laser.seen_offset)
    rows = [np.array([1, 2, 2], dtype=np.int32), np.array([5], dtype=np.int32)]
    with_offset = model.score(rows)
    with torch.no_grad():
        laser.seen_offset.fill_(0.0)
    without = model.score(rows)
    moved = (with_offset - without).abs() > 1e-6
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 4]]


@pytest.mark.parametrize("table", ["llm_start", "text"])
def test_an_id_model_made_from_text_goes_the_whole_way(llm_folder, llm, tmp_path, table):
    config = settings(llm_folder(), prompt=PROMPT, id_model={
        **tiny.ID_MODEL.model_dump(), "items": table, "seen_offset": True, "max_epochs": 2})
    acts, goods = frames()
    model = LaserRecommender.fit(acts, goods, config, tmp_path, progress=False)
    again = LaserRecommender.from_pretrained(tmp_path / "model")
    rows = [np.array([1, 2], dtype=np.int32)]
    assert torch.allclose(again.score(rows), model.score(rows), atol=1e-5)
