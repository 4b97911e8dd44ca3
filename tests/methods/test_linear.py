"""The rivals without training: what they score, and that a history's items come last."""

import tiny
import torch
import torch.nn.functional as F

from laserrec.config import NeighboursConfig
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.linear import ItemRegression, NearestText
from laserrec.methods.neighbours import regress

DATA = tiny.planted(20, 60)
TEXT = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


def test_regression_finds_the_planted_order_of_things():
    model = ItemRegression(DATA, NeighboursConfig(l2=1.0, text_weight=0.0))
    assert evaluate("ease", model.score, DATA, "test", k=2).plain.recall > 0.5
    weights = regress(list(DATA.train_sequences.values()), 20, NeighboursConfig(l2=1.0, text_weight=0.0))
    scores, history = model.score(tiny.histories([3, 9])), weights[8] + 0.8 * weights[2]
    new = torch.tensor([i for i in range(20) if i not in (2, 8)])
    torch.testing.assert_close(scores[0, new], history[new])
    assert scores[0, [2, 8]].max() < scores[0, new].min()


def test_nothing_of_validation_or_test_is_read():
    changed = tiny.planted(20, 60)
    rows = changed.interactions.with_columns(item=changed.interactions["item"].reverse())
    held = changed.interactions["split"] != "train"
    mixed = changed.interactions.with_columns(
        item=rows["item"].zip_with(held, changed.interactions["item"]))
    other = type(changed)(changed.items, changed.users, mixed, changed.meta)
    config = NeighboursConfig(l2=1.0)
    assert not other.interactions.equals(changed.interactions)
    assert torch.equal(ItemRegression(other, config, TEXT).weights, ItemRegression(changed, config, TEXT).weights)


def test_nearest_text_is_a_cosine_with_the_weighed_sum():
    scores = NearestText(TEXT).score(tiny.histories([3, 9]))
    unit = F.normalize(TEXT, dim=-1)
    cosines = F.normalize(unit[8] + 0.8 * unit[2], dim=-1) @ unit.T
    new = torch.tensor([i for i in range(20) if i not in (2, 8)])
    torch.testing.assert_close(scores[0, new], cosines[new])
    assert scores[0, [2, 8]].max() < scores[0, new].min()
