"""A server with an index answers as one without, while items come and go and after a restart."""

import contextlib

import numpy as np
import pytest

from laserrec import LaserRecommender
from laserrec.recommender.indexing import build_index
from laserrec.retrieval.index import IndexKind
from laserrec.server.served import Similar
from laserrec.server.service import Service
from laserrec.server.settings import Limits
from laserrec.util.errors import UserError

NEW = {"item_id": "new", "title": "steel drill 99", "brand": "redco", "category": None}


@pytest.fixture(params=[IndexKind.EXACT, IndexKind.USEARCH])
def index(request, model_folder, tmp_path):
    build_index(LaserRecommender.from_pretrained(model_folder), request.param, tmp_path / "index", queries=5)
    return tmp_path / "index"


@contextlib.contextmanager
def both(model_folder, tmp_path, index):
    with (Service.opened(model_folder, tmp_path / "with", Limits(), index) as mine,
          Service.opened(model_folder, tmp_path / "without", Limits()) as plain):
        yield mine, plain


def alike(services, history, **how):
    answers = []
    for service in services:
        ask, _ = service.served.ask(history, 9, how.get("exclude_seen", False), how.get("candidates"))
        near = Similar(service.listing.row(history[0]), 4)
        found = [service.submit(service.served, each).result(60) for each in (ask, near)]
        answers += [found[0].ranked, found[1]]
    for mine, plain in zip(answers[:2], answers[2:], strict=True):
        assert mine.items.tolist() == plain.items.tolist() and mine.expert == plain.expert
        np.testing.assert_allclose(mine.scores, plain.scores, atol=1e-6)
    return services[0].model.item_ids(answers[0].items)


def test_as_without_through_changes_and_a_restart(model_folder, tmp_path, index):
    with both(model_folder, tmp_path, index) as services:
        assert services[0].model.index is not None and services[1].model.index is None
        alike(services, ["i1", "i5"])
        for service in services:
            service.add([NEW]).future.result(60)
            service.remove("i7").future.result(60)
        assert "i7" not in alike(services, ["new", "i5"]) and "new" in alike(services, ["i2"], candidates=["new", "i4"])
        want = alike(services, ["i3", "i5", "new"], exclude_seen=True)
    with both(model_folder, tmp_path, index) as services:
        assert alike(services, ["i3", "i5", "new"], exclude_seen=True) == want
        for service in services:
            service.remove("new").future.result(60)
        assert "new" not in alike(services, ["i3", "i5"])


def test_an_index_of_another_model_is_refused(model_folder, tmp_path):
    other = LaserRecommender.from_pretrained(model_folder)
    other.remove_items(["i2"])
    build_index(other, IndexKind.EXACT, tmp_path / "index", queries=5)
    with (pytest.raises(UserError, match="another model or catalogue"),
          Service.opened(model_folder, tmp_path / "state", Limits(), tmp_path / "index")):
        pass
