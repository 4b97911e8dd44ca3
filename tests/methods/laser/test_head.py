"""Whitening and the projection."""

import pytest
import torch

from laserrec.config import HeadConfig
from laserrec.methods.laser.head import AddedOutput, Head


def cone(n: int = 200, d: int = 12) -> torch.Tensor:
    """Outputs like a frozen LLM's: a large common part, directions of very different spread."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return torch.randn(n, d, generator=generator) * torch.logspace(1, -2, d) @ turn + 30.0


def whitened(dims: int, rows: int = 200) -> Head:
    head = Head(HeadConfig(whiten_dims=dims), 12)
    head.white.fit(cone(rows))
    return head


def test_the_papers_head_is_nothing():
    x, head = cone(), Head(HeadConfig(), 12)
    assert torch.equal(head(x), x)
    assert not list(head.parameters()) and not head.state_dict() and head.white is None


@pytest.mark.parametrize("dims", [12, 5])
def test_whitened_items_have_no_mean_and_unit_covariance(dims):
    y = whitened(dims)(cone()).double()
    assert y.shape == (200, dims)
    torch.testing.assert_close(y.mean(0), torch.zeros(dims).double(), atol=1e-2, rtol=0)
    centred = y - y.mean(0)
    torch.testing.assert_close(centred.T @ centred / 200, torch.eye(dims).double(), atol=1e-2, rtol=0)


def test_whitening_keeps_the_largest_directions():
    x, matrix = cone(), whitened(3).white.matrix
    wide = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False).Vh[:3].float()
    assert float((matrix - wide.T @ (wide @ matrix)).norm()) < 1e-3 * float(matrix.norm())


def test_whitening_is_frozen_and_kept():
    head, again = whitened(4), Head(HeadConfig(whiten_dims=4), 12)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(cone()), head(cone()))
    assert not list(head.parameters())


def test_fewer_items_than_dimensions_stay_finite():
    assert torch.isfinite(whitened(12, rows=5)(cone(7))).all()


def test_depths_are_whitened_apart():
    both = Head(HeadConfig(whiten_dims=4), 24, depths=2)
    both.white.fit(torch.cat([cone(), cone().flip(1)], dim=1))
    alone = whitened(4)
    torch.testing.assert_close(both(torch.cat([cone(), cone().flip(1)], dim=1))[:, :4], alone(cone()))
    assert both.d_out == 8


def test_projection_starts_as_the_identity():
    head = Head(HeadConfig(projection=True), 12)
    torch.testing.assert_close(head(cone()), cone())
    assert [p.shape for p in head.parameters()] == [(12, 12)]


def test_the_added_output_starts_at_zero_and_can_leave_it():
    added = AddedOutput(HeadConfig(whiten_dims=5), 12, 7)
    added.white.fit(cone())
    out = added(cone(3))
    assert out.shape == (3, 7) and not out.any()
    out.sum().backward()
    assert added.map.weight.grad.abs().sum() > 0


def test_dropout_acts_in_training_only_and_before_the_projection():
    head, x = Head(HeadConfig(projection=True, dropout=0.5), 12), torch.ones(50, 12)
    share = float((head(x) == 0).float().mean())
    assert 0.35 < share < 0.65
    torch.testing.assert_close(head.eval()(x), x)
