"""From one catalogue to another that shares no item: what a start and a zero-shot model keep of the old one."""

from dataclasses import replace

import polars as pl
import pytest
import tiny
import torch

from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures
from laserrec.recommender import fitting
from laserrec.recommender.scorers import SomeItems, zero_shot
from laserrec.util.device import CPU
from laserrec.util.errors import UserError

N = 16
OLD = tiny.planted(N, 24)
STILL = {"id_model": {"lr": 1e-30, "weight_decay": 0.0, "max_epochs": 1}, "zesrec": {"lr": 1e-30},
         "recformer": {"lr": 1e-30}, "train": {"stage_one_epochs": 0, "stage_two_epochs": 0}}
MEAN = {"prompt": {"layout": "text_first", "item_side": "mean"}, "head": {"whiten_dims": 8, "projection": True}}


def elsewhere(data: Dataset, name: str) -> Dataset:
    """The same texts and users under other item ids, backwards, and a few further texts."""
    items = pl.concat([data.items.reverse(), tiny.items(N + 4).tail(4)])
    items = items.with_columns(item=pl.Series(range(N + 4), dtype=pl.Int32), item_id=name + items["item_id"])
    acts = data.interactions.with_columns(item=N - 1 - pl.col("item"))
    return Dataset(items, data.users, acts, {"sha256": f"{data.fingerprint} as {name}"})


OTHER, THIRD = elsewhere(OLD, "other "), elsewhere(OLD, "third ")
MOVED = list(range(N - 1, -1, -1))
"""OLD's items there."""
TABLES = [("sasrec", "text"), ("bert4rec", "text"), ("gru4rec", "text"), ("sasrec", "llm_start")]


@pytest.fixture(scope="module")
def make(llm, settings, tmp_path_factory):
    """(method, data, start=None, **sections) -> Fitted."""

    def fit(method: str, data: Dataset, start=None, **sections) -> fitting.Fitted:
        tree = settings(**sections)
        return fitting.fit(method, data, tree, tmp_path_factory.mktemp("model") / "m", CPU, progress=False,
                           features=tiny.features(llm(), tree), start=start)

    return fit


@pytest.mark.parametrize("name", ["zesrec", "recformer"])
def test_a_model_of_texts_alone_is_what_it_was(make, name):
    asked, moved = tiny.histories([0, 3], [5]), tiny.histories([15, 12], [10])
    old = make(name, OLD)
    new = make(name, OTHER, old, **STILL)
    # RECFORMER's own vectors may be those of an earlier epoch; elsewhere all items are read with the last weights
    want, zero = old.model.transferred(OLD.items).score(asked), zero_shot(old, OTHER.items).score(moved)
    got = new.model.score(moved)
    torch.testing.assert_close(got[:, MOVED], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(zero, got, atol=1e-4, rtol=1e-4)
    assert new.facts["warm_start"] == {"fingerprint": old.facts["fingerprint"], "carried_items": 0,
                                       "new_items": N + 4, "dropped_items": N}


def test_a_start_makes_a_difference(make):
    old = make("zesrec", OLD, zesrec={"max_epochs": 20})
    scores = [make("zesrec", OTHER, start, **STILL).model.score(tiny.histories([15, 12])) for start in (old, None)]
    assert not torch.allclose(*scores, atol=0.1)


@pytest.mark.parametrize(("kind", "table"), TABLES)
def test_a_sequence_model_reads_other_texts_as_its_own(make, kind, table):
    settings = {"id_model": {"items": table}}
    old = make(kind, OLD, **settings)
    still = {**STILL, "id_model": STILL["id_model"] | settings["id_model"]}
    new = make(kind, OTHER, old, **still)
    assert torch.equal(new.model.item.weight[-1], old.model.item.weight[-1])  # the mask token
    zero = zero_shot(old, OTHER.items)
    torch.testing.assert_close(zero.items(), new.model.items())
    theirs = new.model.item_embeddings()[MOVED]
    if table == "llm_start":  # each is among its own nearest, the more so the nearer
        assert torch.cosine_similarity(theirs, old.model.item_embeddings()).median() > 0.5
        return
    torch.testing.assert_close(theirs, old.model.item_embeddings(), atol=1e-4, rtol=1e-3)
    third = make(kind, THIRD, new, **still)  # by the first one's whitening, not by the second's
    torch.testing.assert_close(third.model.text, new.model.text, atol=1e-4, rtol=1e-3)


def test_laser_keeps_its_text_part_and_grows_for_a_zero_shot_ranking(make):
    old = make("laser", OLD, **MEAN, id_model={"items": "llm_start"}, neighbours={"count": 4, "l2": 1.0})
    new = make("laser", OTHER, old, **{**STILL, **MEAN, "id_model": STILL["id_model"] | {"items": "llm_start"}})
    text = old.model.head(old.model.item_outputs(torch.arange(N)))
    unit = torch.nn.functional.normalize(text, dim=-1)
    torch.testing.assert_close(new.model.vectors[MOVED, : new.model.d_text], unit, atol=1e-4, rtol=1e-3)
    scorer = zero_shot(old, OTHER.items)
    assert isinstance(scorer, SomeItems) and len(old.model.vectors) == N + N + 4
    scores = scorer.score(tiny.histories([15], [3, 2]))
    grown = old.model.score(tiny.histories([N + 15], [N + 3, N + 2]))
    assert torch.equal(scores, grown[:, N:]) and scores.shape == (2, N + 4)


def test_items_that_both_catalogues_have_keep_what_is_known_of_them(make):
    old = make("laser", OLD, **MEAN)
    mixed = pl.concat([OTHER.items.head(2), OLD.items.slice(4, 3)])
    scorer = zero_shot(old, mixed)
    assert scorer.rows.tolist() == [N, N + 1, 4, 5, 6]
    torch.testing.assert_close(scorer.score(tiny.histories([2, 4]))[:, 2:],
                               old.model.score(tiny.histories([4, 6]))[:, 4:7])


def test_an_id_model_without_texts_is_fitted_anew_below_a_laser_that_starts(make):
    old = make("laser", OLD)
    new = make("laser", OTHER, old, **STILL)
    assert new.model.ids.model.n_items == N + 4
    torch.testing.assert_close(new.model.reader.suffix, old.model.reader.suffix)


def test_what_can_t_start_is_told(make, llm):
    ids, text = make("sasrec", OLD), make("zesrec", OLD)
    with pytest.raises(UserError, match="knows none of the items of this data, and it tells items by their ids alone"):
        make("sasrec", OTHER, ids)
    with pytest.raises(UserError, match="its method, sasrec, tells items by their ids"):
        zero_shot(ids, OTHER.items)
    with pytest.raises(UserError, match=r"fitted with another LLM \(.*llama.*\) than"):
        make("zesrec", OTHER, replace(text, backbone={**text.backbone, "sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"other weights than the one to go on from \(.*\); keep its settings"):
        make("zesrec", OTHER, text, zesrec={"d_model": 8})


def test_the_whitening_is_in_the_model_folder(make, tmp_path, llm):
    old = make("sasrec", OLD, id_model={"items": "text"})
    fitting.folders.save(tmp_path / "m", old.saved())
    again = fitting.open_folder(tmp_path / "m", CPU, llm())
    for mine, theirs in zip(again.model.whitening, old.model.whitening, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(zero_shot(again, OTHER.items).items(), zero_shot(old, OTHER.items).items())


def test_old_texts_are_not_read_again_where_the_model_keeps_its_map(make, monkeypatch):
    old, read, means = make("sasrec", OLD, id_model={"items": "text"}), [], TextFeatures.means
    monkeypatch.setattr(TextFeatures, "means", lambda self, items: read.append(items.height) or means(self, items))
    zero_shot(old, OTHER.items)
    assert set(read) == {N + 4}
