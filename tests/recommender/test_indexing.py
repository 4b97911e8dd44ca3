"""An index of a fitted model: built from the command line, and recommendations through it are those without one."""

import json

import numpy as np
import polars as pl
import pytest
import tiny

from laserrec.cli.index import index_app
from laserrec.recommender.indexing import build_index, fill_index, user_queries
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import IndexKind
from laserrec.util.errors import UserError

N = 12
HISTORIES = {"a": ["i3", "i4"], "b": ["i9"], "c": [f"i{i}" for i in range(1, 9)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("indexing") / "model"
    LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.config("none"), out, "sasrec", device="cpu",
                                 progress=False)
    return out


@pytest.fixture
def pair(folder):
    """The same model twice, with an item removed: one for an index, one without."""
    pair = [LaserRecommender.from_pretrained(folder, device="cpu") for _ in range(2)]
    for model in pair:
        model.remove_items(["i7"])
    return pair


def alike(mine, plain):
    for how in ({}, {"exclude_seen": True}, {"candidates": ["i4", "i1", "i9"]}, {"exclude": ["i3"]}):
        got, want = (model.recommend(HISTORIES, unknown="drop", **how) for model in (mine, plain))
        assert got.drop("score").equals(want.drop("score"))
        np.testing.assert_allclose(got["score"], want["score"], atol=1e-6)


def test_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "index"
    index_app(["build", str(folder), str(out), "--kind", "exact", "--queries", "5", "--device", "cpu", "--json",
               str(tmp_path / "x.json")], exit_on_error=False, result_action="return_value")
    assert "12 items, 17 wide" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["recall@10"] == 1
    mine, plain = (LaserRecommender.from_pretrained(folder, device="cpu") for _ in range(2))
    mine.use_index(out)
    alike(mine, plain)
    with pytest.raises(UserError, match="queries is 0"):
        index_app(["build", str(folder), str(out), "--queries", "0"], exit_on_error=False)


def test_what_was_removed_is_not_in_it(pair, tmp_path):
    mine, plain = pair
    assert build_index(mine, IndexKind.EXACT, tmp_path / "index", queries=5)["items"] == N - 1
    mine.use_index(tmp_path / "index")
    for model in pair:
        model.remove_items(["i2"])
    alike(mine, plain)
    mine.use_index(fill_index(mine, IndexKind.EXACT))
    alike(mine, plain)
    assert len(mine.index) == N - 2


def test_vectors_that_are_no_unit_vectors_name_the_exact_kind(pair, tmp_path):
    with pytest.raises(UserError, match=r"kind usearch needs vectors of length 1 .*; scale them, or use kind exact"):
        build_index(pair[0], IndexKind.USEARCH, tmp_path / "index", queries=5)
    assert not (tmp_path / "index").exists()


def test_queries_are_fixed_by_their_seed(pair):
    one = user_queries(pair[0], 6)
    assert one.shape == (6, pair[0].embeddings.shape[1]) and np.allclose(one, user_queries(pair[0], 6), atol=1e-6)
    assert not np.allclose(one, user_queries(pair[0], 6, seed=1), atol=1e-2)


def test_a_method_without_vectors_says_so(tmp_path):
    model = LaserRecommender.fit_dataset(tiny.planted(N, users=16), tiny.config("none"), tmp_path / "model",
                                         "popularity", device="cpu", progress=False)
    with pytest.raises(UserError, match="popularity has no vectors"):
        build_index(model, IndexKind.EXACT, tmp_path / "index")
    assert model.recommend(pl.DataFrame({"user_id": ["a"], "item_id": ["i1"]}), k=1).height == 1
