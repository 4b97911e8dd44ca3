"""An index holds what can be recommended, measures itself, and leaves others' collections alone."""

import numpy as np
import pytest
import torch

from laserrec.retrieval import build, graph
from laserrec.retrieval.build import build_index, fill_index
from laserrec.retrieval.folder import catalogue_sha256, load_index, make_index
from laserrec.retrieval.index import IndexKind, recall
from laserrec.util.errors import UserError


def place(kind, server):
    return {"url": server, "collection": "shop"} if kind == IndexKind.QDRANT else {}


@pytest.mark.parametrize("kind", list(IndexKind))
def test_it_finds_the_best_rows(vectors, live, queries, kind, server, tmp_path):
    facts = build_index(vectors, live, kind, tmp_path / "index", queries, 4, **place(kind, server))
    assert facts["items"] == 28 and facts["width"] == 8 and facts["recall@4"] == 1 and facts["bytes"] > 0
    assert facts["queries"] == 5 and facts["kind"] == kind
    rows, products = load_index(tmp_path / "index").search(queries, 4)
    want = queries @ vectors.numpy().T
    want[:, [6, 19]] = -np.inf
    assert rows.tolist() == np.argsort(-want, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(products, np.sort(want, axis=1)[:, :-5:-1], atol=1e-6)


def test_vectors_of_any_length(vectors, live, queries, tmp_path):
    long = vectors * 3
    assert build_index(long, live, IndexKind.EXACT, tmp_path / "index", queries, 4)["recall@4"] == 1
    with pytest.raises(UserError, match="length 3; scale them, or use kind exact"):
        build_index(long, live, IndexKind.USEARCH, tmp_path / "other", queries, 4)
    assert not (tmp_path / "other").exists()


def test_a_collection_of_something_else_is_refused_and_a_begun_one_completed(vectors, live, server):
    begun = make_index(IndexKind.QDRANT, 8, url=server, mark=catalogue_sha256(vectors, live))
    begun.add(live[:5].numpy(), vectors[live[:5]].numpy())
    assert len(begun) == 5 and len(fill_index(vectors, live, IndexKind.QDRANT, url=server)) == 28
    with pytest.raises(UserError, match="collection 'items' at http://qdrant holds 28 items of something else"):
        fill_index(vectors, live[1:], IndexKind.QDRANT, url=server)
    with pytest.raises(UserError, match="has vectors of width 8, not 7"):
        make_index(IndexKind.QDRANT, 7, url=server)


def test_a_collection_that_was_deleted_is_told_and_not_made_anew(vectors, live, queries, server, tmp_path):
    build_index(vectors, live, IndexKind.QDRANT, tmp_path / "index", queries, **place(IndexKind.QDRANT, server))
    client = load_index(tmp_path / "index")._client
    client.delete_collection("shop")
    with pytest.raises(UserError, match="no collection 'shop' at http://qdrant; was it deleted"):
        load_index(tmp_path / "index", shared=True)
    assert not client.collection_exists("shop")


def test_a_server_is_for_qdrant_and_qdrant_needs_one(vectors, live, queries, server, tmp_path):
    with pytest.raises(UserError, match="for kind qdrant"):
        build_index(vectors, live, IndexKind.EXACT, tmp_path / "x", queries, url="http://localhost:6333")
    with pytest.raises(UserError, match="kept on a server; give its url"):
        build_index(vectors, live, IndexKind.QDRANT, tmp_path / "x", queries)
    with pytest.raises(UserError, match=r"the Qdrant server at http://nobody doesn't answer as it should: .*refused"):
        build_index(vectors, live, IndexKind.QDRANT, tmp_path / "x", queries, url="http://nobody")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_else_is_told_before_the_work(vectors, live, queries, tmp_path, monkeypatch):
    (tmp_path / "letter").touch()
    monkeypatch.setattr(build, "fill_index", lambda *args, **more: pytest.fail("began"))
    with pytest.raises(UserError, match="is not empty and is not replaced"):
        build_index(vectors, live, IndexKind.EXACT, tmp_path, queries)


def test_a_graph_looks_at_as_many_candidates_as_its_queries_need(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "_EXPANSION", 4)
    many = torch.nn.functional.normalize(torch.randn(2000, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    asked = np.ascontiguousarray(many[:50].numpy()[:, ::-1])
    facts = build_index(many, torch.arange(2000), IndexKind.USEARCH, tmp_path / "index", asked, 10)
    assert facts["recall@10"] >= 0.99 and facts["expansion"] > 16
    found = load_index(tmp_path / "index", shared=True)
    truth = np.argsort(-(asked @ many.numpy().T), axis=1)[:, :10]
    assert found.expansion == facts["expansion"] and recall(found.search(asked, 10)[0], truth) >= 0.99
    found.expansion = 16
    assert recall(found.search(asked, 10)[0], truth) < 0.99


def test_an_impossible_goal_ends(vectors, live, queries):
    index = fill_index(vectors, live, IndexKind.USEARCH)
    index.expansion = 1
    index.tune(queries, np.full((5, 3), 29), 1.0)
    assert index.expansion == 32
