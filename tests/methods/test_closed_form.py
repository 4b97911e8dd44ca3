"""The methods without training by gradient: what they score, and that a history's items come last."""

import tiny
import torch
import torch.nn.functional as F

from laserrec.config import NeighboursConfig
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.closed_form import ItemRegression, NearestText, Popularity
from laserrec.methods.neighbours import regress

DATA = tiny.planted(20, 60)
TEXT = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
CONFIG = NeighboursConfig(l2=1.0, text_weight=0.0)
OTHERS = torch.tensor([i for i in range(20) if i not in (1, 7)])


def test_regression_finds_the_planted_order_of_things():
    model = ItemRegression(CONFIG, 20).fit(DATA)
    assert evaluate("ease", model, DATA, "test", k=2).plain.recall > 0.5
    weights = regress(DATA.train_sequences, 20, CONFIG)
    scores, wanted = model.score(tiny.histories([2, 7], [1, 7])), weights[7] + 0.8 * weights[1]
    torch.testing.assert_close(scores[1, OTHERS], wanted[OTHERS])
    assert scores[1, [1, 7]].max() < scores[1, OTHERS].min()


def test_nothing_of_validation_or_test_is_read():
    rows = DATA.interactions
    mixed = rows.with_columns(item=rows["item"].reverse().zip_with(rows["split"] != "train", rows["item"]))
    other = type(DATA)(DATA.items, DATA.users, mixed, DATA.meta)
    assert not mixed.equals(rows)
    config = NeighboursConfig(l2=1.0)
    first, second = (ItemRegression(config, 20).fit(data, TEXT) for data in (other, DATA))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(Popularity(20).fit(other).counts, Popularity(20).fit(DATA).counts)


def test_popularity_counts_training_interactions():
    counts = [0] * 20
    for item, split in DATA.interactions.select("item", "split").iter_rows():
        counts[item] += split == "train"
    assert Popularity(20).fit(DATA).score(tiny.histories([1], [2])).tolist() == [counts, counts]


def test_nearest_text_is_a_cosine_with_the_weighted_sum():
    scores = NearestText(20).fit(TEXT).score(tiny.histories([1, 7]))
    unit = F.normalize(TEXT, dim=-1)
    cosines = F.normalize(unit[7] + 0.8 * unit[1], dim=-1) @ unit.T
    torch.testing.assert_close(scores[0, OTHERS], cosines[OTHERS])
    assert scores[0, [1, 7]].max() < scores[0, OTHERS].min()
