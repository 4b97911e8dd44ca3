"""The router against loops written from Eq. 5-7; what the prefix depends on, and what trains it."""

import pytest
import torch

from laserrec.config import MFormerConfig, Prefix, Routing
from laserrec.methods.laser.mformer import MFormer, Router

D_ID, D_LLM = 6, 10
SMALL = MFormerConfig(experts=4, queries=3, blocks=4, d_model=8, heads=2, dropout=0.0)


def users(*lengths: int, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """States and mask; what stands at padding is large on purpose."""
    width = width or max(*lengths, 1)
    generator = torch.Generator().manual_seed(11)
    states = torch.randn(len(lengths), width, D_ID, generator=generator) * 2
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return states.masked_fill(~mask[..., None], 50.0), mask


def mformer(base=None, **changes) -> MFormer:
    torch.manual_seed(3)
    model = MFormer(SMALL.model_copy(update=changes), D_ID, D_LLM, 0.1, base)
    if model.router is not None:
        torch.nn.init.normal_(model.router.weight.weight, std=1.0)
    torch.nn.init.normal_(model.experts, std=1.0)
    return model


def test_router_is_equations_5_to_7():
    states, mask = users(5, 2, 1)
    router = Router(D_ID, 4)
    with torch.no_grad():
        route, weight = router(states, mask), router.weight.weight
    for b, length in enumerate((5, 2, 1)):
        r = [0.0] * 4
        for i in range(length):
            m = [sum(float(states[b, i, d]) * float(weight[j, d]) for d in range(D_ID)) for j in range(4)]  # Eq. 5
            total = sum(2.718281828459045**x for x in m)
            for j in range(4):
                p = 2.718281828459045 ** m[j] / total  # Eq. 6
                assert float(route.probabilities[b, i, j]) == pytest.approx(p, rel=1e-4)
                r[j] += p / length  # Eq. 7
        assert route.scores[b].tolist() == pytest.approx(r, rel=1e-4)
        assert int(route.expert[b]) == r.index(max(r))
    assert float(route.probabilities[1, 2:].abs().sum()) == 0.0


def test_router_has_one_matrix_and_no_bias():
    assert {name: tuple(p.shape) for name, p in Router(D_ID, 4).named_parameters()} == {"weight.weight": (4, D_ID)}


def test_every_other_block_reads_the_states():
    model = mformer()
    assert [block.cross_attention is not None for block in model.blocks] == [True, False, True, False]
    assert {block.cross_attention.key_value.in_features for block in model.blocks[::2]} == {D_ID}


def test_the_chosen_experts_tokens_make_the_prefix():
    model = mformer().eval()
    states, mask = users(5, 2, 3, 4, 1, 6)
    prefix, route = model(states, mask)
    assert len(set(route.expert.tolist())) > 1
    assert prefix.shape == (6, 3, D_LLM)
    for expert in range(4):
        changed = mformer().eval()
        with torch.no_grad():
            changed.experts[expert] *= torch.tensor([[1.5], [0.5], [-1.0]])
        moved = (changed(states, mask)[0] - prefix).abs().amax(dim=(1, 2)) > 1e-6
        assert moved.tolist() == (route.expert == expert).tolist()


def test_only_chosen_experts_get_a_gradient():
    model = mformer()
    states, mask = users(5, 2)
    prefix, route = model(states, mask)
    prefix.square().sum().backward()
    reached = model.experts.grad.abs().sum(dim=(1, 2)) > 0
    assert set(reached.nonzero().flatten().tolist()) == set(route.expert.tolist())


@pytest.mark.parametrize("prefix", [Prefix.MFORMER, Prefix.ONE_EXPERT])
def test_padding_changes_nothing(prefix):
    model = mformer(prefix=prefix).eval()
    states, mask = users(2, 5)
    batch, route = model(states, mask)
    for row, length in enumerate((2, 5)):
        alone, own = model(states[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(batch[row], alone[0], rtol=1e-5, atol=1e-6)
        if route is not None:
            torch.testing.assert_close(route.scores[row], own.scores[0])
    other = states.masked_fill(~mask[..., None], -9.0)
    torch.testing.assert_close(model(other, mask)[0], batch, rtol=1e-5, atol=1e-6)


def test_a_user_without_known_items_stands_alone():
    model = mformer()
    states, mask = users(0, 4)
    prefix, route = model(states, mask)
    assert torch.isfinite(prefix).all()
    assert route.scores[0].tolist() == pytest.approx([0.25] * 4)
    alone, _ = model(states[:1, :1] * 0, mask[:1, :1])
    torch.testing.assert_close(prefix[0], alone[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(prefix[0], prefix[1])
    prefix[0].square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("routing", list(Routing))
def test_routing_and_the_tasks_gradient(routing):
    model = mformer(routing=routing)
    states, mask = users(5, 2)
    prefix, _ = model(states, mask)
    torch.testing.assert_close(prefix, mformer(routing=Routing.HARD)(states, mask)[0])
    prefix.square().sum().backward()
    gradient = model.router.weight.weight.grad
    if routing == Routing.HARD:
        assert gradient is None or not gradient.any()
    else:
        assert gradient.abs().sum() > 1e-3


def test_zero_init_starts_as_the_given_constant():
    base = torch.arange(3 * D_LLM, dtype=torch.float32).view(3, D_LLM)
    model = mformer(base, zero_init=True)
    states, mask = users(5, 2, 0)
    prefix, _ = model(states, mask)
    assert torch.equal(prefix, base.expand(3, -1, -1))
    prefix.square().sum().backward()
    assert model.projection.weight.grad.abs().sum() > 0  # it can leave the constant
    assert model.base.grad.abs().sum() > 0


def test_the_prefix_starts_with_the_spread_of_tokens():
    config = SMALL.model_copy(update={"queries": 64, "d_model": 64, "blocks": 1})
    states, mask = users(4, 3, 2)
    for std in (0.05, 2.0):
        torch.manual_seed(0)
        prefix, _ = MFormer(config, D_ID, 256, std)(states, mask)
        assert float(prefix.std()) == pytest.approx(std, rel=0.2)


def test_one_expert_has_no_router():
    for changes in ({"prefix": Prefix.ONE_EXPERT}, {"experts": 1}):
        model = mformer(**changes)
        assert model.router is None and model.experts.shape[0] == 1
        assert model(*users(2, 3))[1] is None


def test_dropout_acts_in_training_only():
    model = mformer(dropout=0.5)
    states, mask = users(5, 2)
    assert not torch.equal(model(states, mask)[0], model(states, mask)[0])
    model.eval()
    assert torch.equal(model(states, mask)[0], model(states, mask)[0])
