"""The loss of two views against its definition in the paper, and which places of them are compared."""

import pytest
import torch

from visionattn.tasks.pretraining.losses import VICReg, matched, of_cells

pytest.importorskip("lightly")


def vicreg(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bardes et al. 2022, equations 1 to 6, with 25, 25 and 1; its code halves the sum of the two variance terms."""
    loss = 25 * (a - b).square().mean()
    for z in (a, b):
        loss = loss + 12.5 * torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
    return loss


def test_the_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 8)
    maps, places = torch.randn(2, 16, 4, 8), torch.rand(2, 16, 4, 2)
    torch.testing.assert_close(VICReg(0.0)((a, b), tuple(maps), tuple(places)), vicreg(a, b))
    pairs = matched(*places)
    chosen = [torch.stack([x[i][k] for i, k in enumerate(pair)]) for x, pair in zip(maps, pairs, strict=True)]
    expected = 0.75 * vicreg(a, b) + 0.25 * vicreg(*(x.flatten(0, 1) for x in chosen))
    torch.testing.assert_close(VICReg(0.25)((a, b), tuple(maps), tuple(places)), expected)


def test_places_are_matched_where_they_are_nearest_in_the_image():
    one = torch.tensor([[[0.0, 0.0], [10.0, 10.0], [50.0, 50.0]]])
    other = torch.tensor([[[49.0, 50.0], [1.0, 0.0], [90.0, 90.0]]])
    first, second = matched(one, other)
    assert sorted(zip(first[0].tolist(), second[0].tolist(), strict=True)) == [(0, 1), (1, 1), (2, 0)]


def test_statistics_are_of_the_cell_that_a_pixel_is_in():
    image = torch.randn(2, 3, 10, 12) * 5 + 2
    result = of_cells(image, 4)
    for rows, columns in ((slice(0, 4), slice(4, 8)), (slice(8, 10), slice(8, 12))):
        cell = image[:, :, rows, columns]
        expected = cell.mean((2, 3), keepdim=True), cell.std((2, 3), keepdim=True, unbiased=False)
        for found, right in zip(result, expected, strict=True):
            torch.testing.assert_close(found[:, :, rows, columns], right.expand_as(cell), rtol=1e-3, atol=1e-3)
