"""What is hidden and what is changed at random."""

import numpy as np
import pytest
import torch

from visionattn.data.images import ImageArray
from visionattn.tasks.pretraining.recipe import DATA
from visionattn.tasks.pretraining.transforms import Views, hidden_cells


@pytest.mark.parametrize(("size", "cell", "step"), [((64, 64), 8, 1), ((75, 107), 16, 16), ((96, 64), 32, 16)])
def test_a_share_of_square_cells_is_hidden(size, cell, step):
    hidden = hidden_cells(size, cell, 0.6, step, range(200))
    assert hidden.shape == (200, 1, *size)
    assert hidden.float().mean().item() == pytest.approx(0.6, abs=0.03)
    shifts = set()
    for mask in hidden[:, 0].numpy():
        changes = [np.flatnonzero((np.diff(mask.astype(int), axis=axis) != 0).any(1 - axis)) + 1 for axis in (0, 1)]
        remainders = [{int(place) % cell for place in places} for places in changes]
        assert all(len(of_axis) <= 1 for of_axis in remainders)  # one grid
        shifts |= {value for of_axis in remainders for value in of_axis}
    assert all(shift % step == 0 for shift in shifts)
    assert len(shifts) == cell // step
    assert torch.equal(hidden[3:5], hidden_cells(size, cell, 0.6, step, [3, 4]))


def test_two_views_know_where_they_are_from_and_keep_their_range():
    rows, columns = np.mgrid[:60, :80]
    pixels = np.stack([rows, columns, np.full((60, 80), 250)], 2).astype(np.uint8)
    sample = ImageArray("a", "a", "a", 3, (60, 80), pixels=pixels)
    augment = {"crop_scale": [0.3, 1.0], "vflip": 0.5, "rot90": 0.5, "jitter": 0.0}
    data = DATA["npz"](format="npz", root="x", image_size=64, augment=augment)
    data = data.model_copy(update={"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3})
    for epoch in range(8):
        item = Views([sample], data, 0)[epoch, 0]
        for image, places in (("image", "places"), ("other", "other_places")):
            seen = torch.nn.functional.adaptive_avg_pool2d(item[image][:2], item[places].shape[1:])
            inner = slice(2, -2)  # resizing mixes with what is beyond the border
            apart = (seen + 0.5 - item[places])[:, inner, inner]
            assert apart.abs().max() < 1.5
    bright = data.model_copy(
        update={"augment": data.augment.model_copy(update={"jitter": 0.3, "noise": 0.1, "blur": 0.5})}
    )
    item = Views([sample], bright, 0)[0, 0]
    assert item["image"].max() > 255  # normalised values are never clipped
    assert not torch.equal(item["image"], item["other"])
