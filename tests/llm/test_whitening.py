"""Whitening: what comes out is white, ordered, and the same whatever an eigenvector's sign."""

import pytest
import torch
import torch.nn.functional as F

from laserrec.llm.whitening import fit_whitening, whiten


def cone(rows: int = 200, width: int = 12) -> torch.Tensor:
    """Vectors in a narrow cone, of unequal spread by dimension."""
    return 5 + torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 1, width)


@pytest.mark.parametrize(("depths", "dims"), [(1, 12), (1, 5), (2, 4), (3, 4)])
def test_each_depth_is_white(depths, dims):
    outputs = cone()
    mean, matrix = fit_whitening(outputs, dims, depths)
    white = whiten(outputs, mean, matrix, depths)
    assert white.shape == (200, depths * dims) and mean.dtype == matrix.dtype == torch.float32
    for part in white.chunk(depths, dim=1):
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(dims), rtol=0, atol=1e-5)
        torch.testing.assert_close(part.T @ part / 200, torch.eye(dims), rtol=0, atol=1e-4)


def test_the_largest_direction_comes_first():
    outputs = cone()
    first = whiten(outputs, *fit_whitening(outputs, 1))[:, 0]
    correlations = torch.corrcoef(torch.cat([first[None], outputs.T]))[0, 1:].abs()
    assert correlations.argmax() >= 10  # the widest dimensions are the last


def test_the_largest_entry_of_a_direction_is_positive():
    _, matrix = fit_whitening(cone(), 12)
    assert (matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_directions_without_variance_become_zeros():
    outputs = cone()
    outputs[:, 3] = 1.0
    white = whiten(outputs, *fit_whitening(outputs, 12))
    assert (white[:, :11].std(dim=0) > 0.9).all() and (white[:, 11] == 0).all()
    for rows in (5, 1000):  # whose mean in float64 has a rounding error
        same = (outputs[:1] * 1.1).expand(rows, -1)
        assert (whiten(same, *fit_whitening(same, 12)) == 0).all()


def test_with_fewer_rows_than_dimensions_a_new_row_is_no_larger_than_the_others():
    rows, new = cone(9), cone(20)[9:]
    mean, matrix = fit_whitening(rows, 12)
    assert (matrix[:, 8:] == 0).all()
    assert whiten(new, mean, matrix).abs().max() < 10 * whiten(rows, mean, matrix).abs().max()


def test_rounding_errors_of_the_rows_stay_rounding_errors():
    rows = cone(9).double()
    noisy = rows * (1 + 1e-6 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)))
    a, b = (whiten(x.float(), *fit_whitening(x.float(), 12)) for x in (rows, noisy))
    assert (a - b).abs().max() < 1e-3


def test_few_rows_are_not_put_equally_far_apart():
    """Items of four kinds: those of one kind stay nearest, however few they are."""
    torch.manual_seed(0)
    kinds = torch.arange(40) % 4
    rows = 3 * torch.randn(4, 64)[kinds] + torch.randn(40, 64)
    white = F.normalize(whiten(rows, *fit_whitening(rows, 64)), dim=1)
    cosines = (white @ white.T).fill_diagonal_(-1)
    assert (kinds[cosines.argmax(dim=1)] == kinds).float().mean() > 0.9
    assert int(white.any(dim=0).sum()) == 16
