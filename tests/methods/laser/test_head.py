"""Whitening, the projection, and the ID model's share of the cosine."""

import pytest
import torch

from laserrec.config import HeadConfig
from laserrec.methods.laser.head import Head

cosine = torch.nn.functional.cosine_similarity


def cone(n: int = 200, d: int = 12) -> torch.Tensor:
    """Outputs like a frozen LLM's: a large common part, directions of very different spread."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return torch.randn(n, d, generator=generator) * torch.logspace(1, -2, d) @ turn + 30.0


def test_the_papers_head_is_nothing():
    x = cone()
    head = Head(HeadConfig(), 12)
    assert torch.equal(head(x), x)
    assert not list(head.parameters()) and not head.state_dict() and not head.needs_whitening


@pytest.mark.parametrize("dims", [12, 5])
def test_whitened_items_have_no_mean_and_unit_covariance(dims):
    x, head = cone(), Head(HeadConfig(whiten_dims=dims), 12)
    head.fit_whitening(x)
    y = head(x).double()
    assert y.shape == (200, dims) and head.needs_whitening
    torch.testing.assert_close(y.mean(0), torch.zeros(dims).double(), atol=1e-2, rtol=0)
    centred = y - y.mean(0)
    torch.testing.assert_close(centred.T @ centred / 200, torch.eye(dims).double(), atol=1e-2, rtol=0)


def test_whitening_keeps_the_largest_directions():
    x, head = cone(), Head(HeadConfig(whiten_dims=3), 12)
    head.fit_whitening(x)
    wide = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False).Vh[:3].float()
    outside = head.whitening - wide.T @ (wide @ head.whitening)
    assert float(outside.norm()) < 1e-3 * float(head.whitening.norm())


def test_whitening_is_frozen_and_kept():
    head = Head(HeadConfig(whiten_dims=4), 12)
    head.fit_whitening(cone())
    again = Head(HeadConfig(whiten_dims=4), 12)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(cone()), head(cone()))
    assert not list(head.parameters())


def test_fewer_items_than_dimensions_stay_finite():
    head = Head(HeadConfig(whiten_dims=12), 12)
    head.fit_whitening(cone(5))
    assert torch.isfinite(head(cone(7))).all()


def test_projection_starts_as_the_identity():
    x = cone()
    head = Head(HeadConfig(projection=True), 12)
    torch.testing.assert_close(head(x), x)
    assert [p.shape for p in head.parameters()] == [(12, 12)]


@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_cosines_are_the_shares_sum_of_both_parts(share):
    head = Head(HeadConfig(id_share=share), 12)
    a, b, id_a, id_b = torch.randn(6, 12), torch.randn(6, 12) * 9, torch.randn(6, 4) * 5, torch.randn(6, 4)
    with torch.no_grad():
        got = cosine(head(a, id_a), head(b, id_b))
    torch.testing.assert_close(got, (1 - share) * cosine(a, b) + share * cosine(id_a, id_b))


def test_items_the_id_model_does_not_know_are_compared_by_text():
    head = Head(HeadConfig(id_share=0.4), 12)
    a, b, none = torch.randn(6, 12), torch.randn(6, 12), torch.zeros(6, 4)
    torch.testing.assert_close(cosine(head(a, none), head(b, none)), cosine(a, b))
    # An item it knows beside one it doesn't: the text alone, and never more than the text's share allows.
    known = cosine(head(a, torch.randn(6, 4)), head(b, none))
    torch.testing.assert_close(known, 0.6**0.5 * cosine(a, b))


def test_without_an_id_part_the_text_stands_alone():
    a = torch.randn(6, 12)
    assert torch.equal(Head(HeadConfig(id_share=0.4), 12)(a), a)


def test_dropout_acts_in_training_only_and_before_the_projection():
    head, x = Head(HeadConfig(projection=True, dropout=0.5), 12), torch.ones(50, 12)
    share = float((head(x) == 0).float().mean())
    assert 0.35 < share < 0.65
    torch.testing.assert_close(head.eval()(x), x)
