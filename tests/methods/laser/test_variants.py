"""A Laser with one part changed scores as that change says, and afterwards as before."""

import pytest
import tiny
import torch

from laserrec.data.histories import Histories
from laserrec.methods.laser.ranker import Ranker
from laserrec.methods.laser.sides import SummedUsers
from laserrec.methods.laser.task import LaserTask, scale_histories
from laserrec.methods.laser.variants import NO_RANKER, OtherUsers, variants

N = 20
DATA = tiny.planted(N, users=30)
SECTIONS = {"prompt": {"layout": "text_first", "item_side": "mean", "max_item_tokens": 8},
            "head": {"projection": True, "whiten_dims": 8, "seen_offset": True, "id_share": 0.3},
            "neighbours": {"count": 6, "l2": 1.0}}
ALL = {"without the LLM's reading of the history", "without the prefix", "one expert for all users",
       "prefix of another user's ID states", "without the ID part", "without the text part", "without neighbours",
       "without the seen offset"}


@pytest.fixture
def laser(llm):
    task = LaserTask(tiny.laser(llm(), n=N, **SECTIONS), DATA, tiny.World(), fixed=False)
    task.start(lambda: None)
    model = task.module.eval()
    with torch.no_grad():  # untrained, the reading adds nothing
        model.added.map.weight.normal_(std=1.0)
        model.reader.mformer.projection.weight.normal_(std=1.0)
        model.reader.mformer.router.weight.weight.normal_(std=3.0)
    task.scale_neighbours()
    return model


def asked() -> Histories:
    return DATA.cases("validation").histories


def test_every_part_changes_the_scores_and_comes_back(laser):
    found = variants(laser, scale_histories(DATA))
    assert set(found) == ALL
    before, state = laser.score(asked()), {name: tensor.clone() for name, tensor in laser.state_dict().items()}
    for name, change in found.items():
        with change():
            assert not torch.allclose(laser.score(asked()), before, atol=1e-5), name
        assert torch.equal(laser.score(asked()), before), name
        with pytest.raises(KeyError), change():
            raise KeyError
        assert torch.equal(laser.score(asked()), before), name
    tiny.assert_same(state, dict(laser.state_dict()))


def test_parts_are_taken_out_of_a_model_without_its_ranking_network(laser):
    plain = {}
    for name, change in variants(laser, scale_histories(DATA)).items():
        with change():
            plain[name] = laser.score(asked())
    plain[NO_RANKER] = laser.score(asked())
    laser.ranker = Ranker(N, 4).eval()
    laser.ranker.out.weight.data.normal_()
    ranked = laser.score(asked())
    assert not torch.allclose(ranked, plain[NO_RANKER], atol=1e-4)
    found = variants(laser, scale_histories(DATA))
    assert next(iter(found)) == NO_RANKER and set(found) == {NO_RANKER, *ALL}
    for name, change in found.items():
        with change():
            torch.testing.assert_close(laser.score(asked()), plain[name])
        assert torch.equal(laser.score(asked()), ranked)


def test_what_a_model_lacks_is_no_variant(llm):
    task = LaserTask(tiny.laser(llm(), n=N, prompt=tiny.QUICK), DATA, tiny.World(), fixed=False)
    task.start(lambda: None)
    assert set(variants(task.module.eval(), scale_histories(DATA))) == {
        "without the prefix", "one expert for all users", "prefix of another user's ID states"}


def test_each_change_by_hand(laser):
    found, d = variants(laser, scale_histories(DATA)), laser.d_text
    users, items, offset = laser.users(asked()), laser.items(), float(laser.seen.offset)
    seen = torch.zeros(len(asked()), N)
    seen[asked().users, asked().items] = offset
    unit = torch.nn.functional.normalize
    with found["without neighbours"]():
        assert torch.allclose(laser.score(asked()), users @ items.T + seen, atol=1e-6)
    neighbours, laser.neighbours = laser.neighbours, None
    for name, part in (("without the ID part", slice(0, d)), ("without the text part", slice(d, None))):
        with found[name]():
            want = unit(users[:, part], dim=-1) @ unit(items[:, part], dim=-1).T + seen
            assert torch.allclose(laser.score(asked()), want, atol=1e-5), name
    laser.neighbours = neighbours
    side = laser.user_side
    with found["without the LLM's reading of the history"]():
        plain, _ = SummedUsers(side.items, side.head, side.decay).text(asked())
        assert torch.allclose(laser.users(asked())[:, :d], unit(plain, dim=-1) * 0.7**0.5, atol=1e-5)


def test_without_the_text_part_items_keep_what_was_lent_to_them_by_text(laser):
    laser.ids._known[::3] = False
    laser.set_id_share(laser.id_share)
    laser.neighbours = laser.seen = None
    users, items, unit, d = laser.users(asked()), laser.items(), torch.nn.functional.normalize, laser.d_text
    want = unit(users[:, d:], dim=-1) @ unit(items[:, d:], dim=-1).T
    with variants(laser, scale_histories(DATA))["without the text part"]():
        torch.testing.assert_close(laser.score(asked()), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(laser.items(), items)


def test_the_neighbours_scale_follows_the_cosines(laser):
    found, scale = variants(laser, scale_histories(DATA)), laser.neighbours.log_scale.clone()
    with found["without the ID part"]():
        inside = laser.neighbours.log_scale.clone()
        cosines = laser.users(scale_histories(DATA)) @ laser.vectors.T
        laser.neighbours.scale_to(cosines)
        assert torch.allclose(inside, laser.neighbours.log_scale) and not torch.allclose(inside, scale)
    assert torch.equal(laser.neighbours.log_scale, scale)


def test_all_users_get_the_expert_that_most_have(laser):
    some = scale_histories(DATA)
    most = int(laser.reader.route(some).users_per_expert().argmax())
    experts = laser.reader.mformer.experts.detach().clone()
    with variants(laser, some)["one expert for all users"]():
        assert laser.reader.route(asked()) is None
        assert torch.equal(laser.reader.mformer.experts, experts[[most]])
    assert len(laser.reader.mformer.experts) == 3


def test_states_of_the_user_before(laser):
    ids = laser.ids
    states, mask = ids.states(asked())
    other, other_mask = OtherUsers(ids).states(asked())
    assert torch.equal(other_mask, mask.roll(1, 0)) and torch.allclose(other, states.roll(1, 0))
