"""Items' own vectors and further columns, from a caller's frames to recommendations."""

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from laserrec.config import Config
from laserrec.data.dataset import Dataset
from laserrec.data.prompt import item_line
from laserrec.llm.text_features import TextFeatures
from laserrec.llm.whitening import fit_whitening, whiten
from laserrec.methods.all import METHODS
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.scorers import zero_shot
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

N, DIMS = 15, 6
ACTS, ITEMS = tiny.planted_tables(N, 40)
INSTANT = {"id_model": {"kind": "none"}, "prompt": {"layout": "none", "item_side": "mean"},
           "mformer": {"prefix": "none"}, "head": {"whiten_dims": 4, "seen_offset": True},
           "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}, "neighbours": {"count": 4, "l2": 1.0},
           "data": {"min_user_interactions": 2, "min_item_interactions": 1}}


def own_vectors(seed: int = 0) -> pl.DataFrame:
    values = np.random.default_rng(seed).normal(size=(N, DIMS)).astype(np.float32)
    return pl.DataFrame({"item_id": ITEMS["item_id"], "vector": values.tolist()})


def config(folder, vectors: str = "beside", **sections) -> Config:
    base = {name: INSTANT.get(name, {}) | sections.get(name, {}) for name in {*INSTANT, *sections}}
    base["backbone"] = {"name": str(folder), "precision": "fp32", "item_vectors": vectors} | base.get("backbone", {})
    return tiny.config(folder, **base)


def fit(tree, vectors=None, items=ITEMS, folder=None, method="laser") -> LaserRecommender:
    return LaserRecommender.fit(ACTS, items, tree, folder, progress=False, method=method, vectors=vectors)


@pytest.fixture
def no_llm(monkeypatch):
    monkeypatch.setattr(TextFeatures, "backbone", property(lambda self: pytest.fail("the LLM is loaded")))


def test_vectors_stand_beside_the_llms_and_are_whitened_on_their_own(llm_folder):
    items = tiny.items(N).join(own_vectors().with_columns(pl.col("vector").cast(pl.Array(pl.Float32, DIMS))), "item_id")
    features = TextFeatures(config(llm_folder()).backbone, config(llm_folder()).prompt, CPU)
    means, llm = features.means(items), features.llm_means(items)
    width = llm.shape[1]
    assert features.parts(items) == 2 and means.shape == (N, 2 * width) and torch.equal(means[:, :width], llm)
    own = torch.tensor(items["vector"].to_numpy())
    assert torch.equal(means[:, width : width + DIMS], own) and not means[:, width + DIMS :].any()
    found = features.vectors(items)
    alone = whiten(own, *fit_whitening(own, DIMS))
    assert torch.allclose(found[:, found.shape[1] // 2 :][:, :DIMS], alone, atol=1e-4)
    plain = items.drop("vector")
    assert features.parts(plain) == 1 and torch.equal(features.means(plain), llm)


@pytest.mark.parametrize("wide", [2, 70])
def test_any_width_goes_beside_any_llm(llm_folder, wide):
    vectors = own_vectors().with_columns(vector=pl.Series([[float(j), *[0.5 * j**2] * (wide - 1)] for j in range(N)]))
    assert fit(config(llm_folder(), backbone={"mean_layers": (1, 2)}), vectors).embeddings.shape[1] == 3 * 4


def test_vectors_narrower_than_the_whitening_keep_their_width(no_llm):
    model = fit(config("no such llm", "instead", head={"whiten_dims": 512}), own_vectors())
    assert model.embeddings.shape[1] == DIMS and model.recommend([["i1", "i2"]], k=3).height == 3


def test_in_place_of_the_llm_it_is_not_even_loaded(no_llm, tmp_path):
    tree = config("no such llm", "instead")
    model = fit(tree, own_vectors(), folder=tmp_path / "kept")
    assert model.fitted.backbone is None and model.embeddings.shape[1] == 4
    again = LaserRecommender.from_pretrained(tmp_path / "kept" / "model")
    ask = {"anna": ["i1", "i2"]}
    assert again.recommend(ask, k=3).equals(model.recommend(ask, k=3))
    again.add_items({"item_id": ["new"], "title": ["New"], "vector": [[1.0] * DIMS]})
    assert again.recommend(ask, k=N + 1)["item_id"].n_unique() == N + 1


@pytest.mark.parametrize("method", ["ease-text", "nearest-text"])
def test_text_rivals_take_them_too(method, no_llm):
    one, other = (fit(config("none", "instead"), own_vectors(seed), method=method) for seed in (0, 1))
    rows = tiny.histories([0, 1], [5])
    assert not torch.allclose(one.score(rows), other.score(rows))
    assert not METHODS[method].reads_text(one.config)


def test_they_decide_where_the_texts_tell_nothing(no_llm):
    """Two kinds of items, told apart by their vectors alone; buyers keep to one kind."""
    kinds = np.arange(N) % 2
    vectors = pl.DataFrame({"item_id": ITEMS["item_id"], "vector": np.where(kinds == 1, 1.0, -1.0)[:, None].tolist()})
    model = fit(config("none", "instead"), vectors, ITEMS.with_columns(title=pl.lit("thing")), method="nearest-text")
    best = model.recommend([["i1", "i3"], ["i2", "i4"]], k=5, exclude_seen=True)
    parity = best.with_columns(kind=pl.col("item_id").str.slice(1).cast(pl.Int64) % 2)
    assert parity.filter(pl.col("user_id") == 0)["kind"].to_list() == [1] * 5
    assert parity.filter(pl.col("user_id") == 1)["kind"].to_list() == [0] * 5


def test_an_item_without_a_vector_is_the_mean_of_that_part(llm_folder):
    vectors = own_vectors().head(N - 1)
    model = fit(config(llm_folder()), vectors)
    white = model.model.head.whiten(model.model.item_side.means)
    last = model.dense_items([ITEMS["item_id"][N - 1]], "x")[0]
    assert white.isfinite().all() and not white[last, 4:].any() and white[last, :4].any()
    assert model.score(tiny.histories([0], [last])).isfinite().all()
    model.add_items({"item_id": ["new"], "title": ["New"]})
    assert model.score(tiny.histories([0], [N])).isfinite().all()


def test_none_leaves_them_out(llm_folder):
    plain, none = fit(config(llm_folder())), fit(config(llm_folder(), "none"), own_vectors())
    assert torch.equal(plain.embeddings, none.embeddings)


def test_instead_without_vectors(llm_folder):
    with pytest.raises(UserError, match="item_vectors is instead, and the data folder has no vectors"):
        fit(config(llm_folder(), "instead"))


def test_further_columns_are_written_into_the_prompt(llm_folder, tmp_path):
    items = ITEMS.with_columns(price=pl.int_range(pl.len()) * 1.5)
    prompt = {"layout": "none", "item_side": "mean", "attributes": ("brand", "price")}
    model = fit(config(llm_folder(), prompt=prompt), items=items, folder=tmp_path / "kept")
    third = model.items.filter(pl.col("item_id") == "i3").to_dicts()[0]
    assert item_line(third, prompt["attributes"]).endswith("price: 3)")
    plain = fit(config(llm_folder()))
    assert not torch.allclose(model.embeddings, plain.embeddings)
    again = LaserRecommender.from_pretrained(tmp_path / "kept" / "model")
    for price in (1.0, 99.0):
        again.add_items({"item_id": [f"at {price}"], "title": ["Saw"], "price": [price]})
    cheap, dear = again.encode_items(["at 1.0", "at 99.0"])
    assert not np.allclose(cheap, dear)


def test_a_prompt_of_columns_that_the_data_lack(llm_folder, tmp_path):
    tree = config(llm_folder())
    fit(tree, folder=tmp_path / "kept")
    other = tree.model_copy(update={"prompt": tree.prompt.model_copy(update={"attributes": ("price",)})})
    with pytest.raises(UserError, match=r"prompt.attributes names 'price'.* there are: brand, category;"):
        LaserRecommender.fit_dataset(Dataset.load(tmp_path / "kept" / "data"), other, tmp_path / "other",
                                     progress=False)


def test_a_refit_keeps_what_added_items_have(llm_folder, tmp_path):
    """Beside the data's own items without interactions, in the new data's columns."""
    prompt = {"layout": "none", "item_side": "mean", "attributes": ("brand", "price")}
    never = {"item_id": "never bought", "title": "Red drill", "price": 4}
    items = pl.concat([ITEMS.with_columns(price=pl.int_range(pl.len())), pl.DataFrame([never])], how="diagonal")
    old = fit(config(llm_folder(), prompt=prompt), own_vectors(), items, tmp_path / "old")
    mine = {"item_id": ["mine", "mine too"], "title": ["Blue saw", "Glue"], "price": [99, 2],
            "vector": [[2.0] * DIMS, None]}
    old.add_items(mine)
    names = ["never bought", "mine", "mine too"]
    new = old.refit(tmp_path / "old" / "data", tmp_path / "new", progress=False)
    assert new.items["item_id"].to_list()[-3:] == names and new.items["price"].to_list()[-3:] == ["4", "99", "2"]
    np.testing.assert_allclose(new.encode_items(names), old.encode_items(names), atol=1e-5)

    tree = config(llm_folder(), "none", prompt={"layout": "none", "item_side": "mean"})
    plain = LaserRecommender.fit(ACTS, ITEMS, tree, tmp_path / "plain", progress=False)  # data without such columns
    bare = fit(tree, own_vectors(), items, tmp_path / "bare")
    bare.add_items(mine)
    again = bare.refit(tmp_path / "plain" / "data", tmp_path / "again", progress=False)
    assert again.items.columns == plain.items.columns and not again.unknown_items(names)


@pytest.mark.parametrize("theirs", [None, [1.0] * DIMS])
def test_items_of_which_more_or_less_is_known_are_refused(llm_folder, theirs):
    """Another catalogue's, for a model of text and vectors, and for one of text alone."""
    model = fit(config(llm_folder()), own_vectors() if theirs is None else None)
    other = pl.DataFrame({"item_id": ["a", "b"], "title": ["Saw", "Glue"], "brand": None, "category": None})
    if theirs:
        other = other.with_columns(vector=pl.Series([theirs, theirs], dtype=pl.Array(pl.Float32, DIMS)))
    before = model.recommend([["i1"]])
    with pytest.raises(UserError, match="fitted on items with other vectors of their own, or with none"):
        zero_shot(model.fitted, other)
    assert model.recommend([["i1"]]).equals(before)
