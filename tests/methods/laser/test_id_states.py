"""What Laser asks of the ID model, and items that the ID model has learnt nothing of."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from laserrec.data.dataset import Dataset
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.task import LaserTask
from laserrec.methods.sasrec import SASRec
from laserrec.methods.sequence_task import SequenceTask
from laserrec.util.device import CPU
from laserrec.util.distributed import World

N = 12
NEVER = [9, 11]
"""Rows that stand in no training sequence."""


def temporal() -> Dataset:
    """Rows 9 and 11 appear in validation and test alone, as after a temporal split."""
    data = tiny.planted(9, users=20)
    sequences = [[*row, 9, 11] for row in data.cases("test").histories.lists()]
    return tiny.dataset([[10, *row] for row in sequences], N)


def trained(model: SASRec, data: Dataset) -> SASRec:
    SequenceTask(model, data).start(lambda: None)
    return model


def test_a_sequence_model_knows_the_items_of_its_sequences():
    data = temporal()
    model = trained(tiny.id_model(N), data)
    assert (~model.known).nonzero()[:, 0].tolist() == NEVER
    assert model.known.nonzero()[:, 0].tolist() == data.train_sequences.items.unique().tolist()
    again = tiny.id_model(N)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.known, model.known)


def test_an_item_table_made_of_text_knows_every_item():
    torch.manual_seed(0)
    settings = tiny.ID_MODEL.model_copy(update={"items": "text"})
    assert trained(SASRec(settings, N, torch.randn(N, 8)), temporal()).known.all()


def test_what_it_does_not_know_is_left_out():
    ids = IdStates(trained(tiny.id_model(N), temporal()), CPU)
    assert ids.knows(torch.tensor([0, 9, 10, 11, 12, 99])).tolist() == [True, False, True, False, False, False]
    one, two = tiny.histories([9, 0, 3, 14], [11]), tiny.histories([0, 3], [])
    assert torch.equal(ids.user(one), ids.user(two)) and ids.user(one)[0].any() and not ids.user(one)[1].any()
    (states, mask), (wanted, real) = ids.states(one), ids.states(two)
    assert torch.equal(mask, real) and torch.equal(states[mask], wanted[real]) and mask.sum(dim=1).tolist() == [2, 0]
    assert not ids.item(torch.tensor([9, 12])).any() and ids.item(torch.tensor([3])).any()


@torch.no_grad()
def test_the_product_orders_items_as_the_id_model_does():
    torch.manual_seed(1)
    model = trained(tiny.id_model(N), temporal())
    model.item.weight.mul_(1 + 3 * torch.rand(len(model.item.weight), 1))
    model.bias.normal_()
    ids, asked = IdStates(model, CPU, product=True), tiny.histories([0, 3], [10], [3])
    known = ids.knows(torch.arange(N))
    items, users = ids.item_part(torch.arange(N)), ids.user_part(asked)
    assert items.shape[1] == users.shape[1] == ids.d_part == model.d_id + 2
    torch.testing.assert_close(items[known].norm(dim=1), torch.ones(int(known.sum())))
    logits = model.users(asked) @ model.items()[known].T
    ratio = users @ items[known].T / logits
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-6)
    assert (ratio > 0).all() and not torch.equal(logits.argsort(), (ids.user(asked) @ F.normalize(
        ids.item(torch.arange(N))[known], dim=1).T).argsort())  # where cosines would order them otherwise
    unknown = ids.user_part(tiny.histories([9]))
    assert not unknown.any() and not items[~known].any() and (~known).any()


def test_without_an_id_model_parts_are_empty():
    ids = IdStates(None, CPU, product=True)
    assert ids.item_part(torch.arange(3)).shape == ids.user_part(tiny.histories([1], [2], [0])).shape == (3, ids.d_part)
    assert not ids.item_part(torch.arange(3)).any()


@pytest.mark.parametrize("sections", [{"head": {"id_share": 0.3}}, {"prompt": {"item_side": "plain"}}])
@torch.no_grad()
def test_what_was_never_trained_changes_no_score(llm, sections):
    """Whatever stands in the ID model's rows of such items: nothing but chance put it there."""
    data, scores = temporal(), []
    for noise in (0.0, 5.0):
        laser = tiny.laser(llm(), n=N, **sections)
        model = trained(laser.ids.model, data)
        laser.ids = IdStates(model, CPU)
        if laser.reader is not None:
            laser.reader.ids = laser.ids
        model.item.weight[NEVER] += noise
        LaserTask(laser, data, World(), fixed=False).start(lambda: None)
        scores.append(laser.eval().score(tiny.histories([9], [0, 1, 11], [2, 9, 3], [4, 5])))
    torch.testing.assert_close(*scores)


@torch.no_grad()
def test_it_inherits_as_a_new_item_does(llm):
    """An item without a training interaction and the same item added later are one and the same to Laser."""
    data = temporal()
    laser = tiny.laser(llm(), n=N, head={"id_share": 0.3}, prompt={"item_side": "plain"})
    laser.ids = laser.reader.ids = IdStates(trained(laser.ids.model, data), CPU)
    LaserTask(laser, data, World(), fixed=False).start(lambda: None)
    laser.eval()
    added = laser.add_items(data.items[NEVER])
    torch.testing.assert_close(added, laser.vectors[NEVER], atol=1e-5, rtol=1e-4)
    known = laser.vectors[:N][laser.ids.knows(torch.arange(N))]
    assert F.cosine_similarity(added[:1, -16:], known[:, -16:]).max() > 0.5  # of items with like texts
