"""New items inherit the ID part of the items nearest by text; everything else of them stays."""

import torch
import torch.nn.functional as F

from laserrec.methods.laser import new_items
from laserrec.methods.laser.new_items import inherit_id_part


def test_against_a_loop(monkeypatch):
    torch.manual_seed(0)
    known, new = torch.randn(40, 12), torch.randn(7, 12)
    known[:, 8:] = F.normalize(known[:, 8:], dim=-1) * 0.7
    out = inherit_id_part(new, known, 4)
    assert torch.equal(out[:, :8], new[:, :8])
    for row, item in zip(out, new, strict=True):
        cosines = torch.stack([F.cosine_similarity(item[:8], k[:8], dim=0) for k in known])
        best = sorted(range(40), key=lambda j: -cosines[j])[:10]
        weights = torch.tensor([torch.exp(20 * cosines[j]) for j in best])
        mean = sum(w * known[j, 8:] for w, j in zip(weights, best, strict=True))
        assert torch.allclose(row[8:], mean / mean.norm() * 0.7, atol=1e-5)
    monkeypatch.setattr(new_items, "rows_at_once", lambda *_: 3)
    assert torch.allclose(inherit_id_part(new, known, 4), out, atol=1e-6)


def test_a_twin_by_text_is_a_twin_by_id():
    known = F.normalize(torch.randn(3, 6), dim=-1)
    known[0, :4], known[1, :4], known[2, :4] = torch.eye(4)[0], torch.eye(4)[1], -torch.eye(4)[0]
    out = inherit_id_part(torch.tensor([[1.0, 0, 0, 0, 0, 0]]), known, 2)
    assert F.cosine_similarity(out[0, 4:], known[0, 4:], dim=0) > 0.999


def test_without_a_text_nothing_is_inherited():
    """Neither by an item without one, nor from one."""
    torch.manual_seed(0)
    known, new = torch.randn(30, 6), torch.randn(3, 6)
    known[::3, :4], new[1, :4] = 0.0, 0.0
    rows, weights = new_items.nearest_known(new[:, :4], known[:, :4])
    assert torch.allclose(weights.sum(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert not weights[rows % 3 == 0].any()
    few, none = new_items.nearest_known(new[:, :4], known[::3, :4])
    assert few.shape == none.shape == (3, 10) and not none.any()
    assert not inherit_id_part(new, known, 2)[1, 4:].any() and not inherit_id_part(new, known[::3], 2)[:, 4:].any()
