"""Views of test-time augmentation: each different image once, and back again."""

import itertools

import pytest
import torch

from visionattn.inference.views import views

NAMES = ("hflip", "vflip", "rot90")
CHOICES = [list(names) for n in range(4) for names in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("square", [True, False], ids=["square", "oblong"])
@pytest.mark.parametrize("names", CHOICES, ids="-".join)
def test_views_are_turned_back(names, square):
    image = torch.rand(2, 3, 8, 8 if square else 12)
    for view in views(names, square):
        assert torch.equal(view.back(view.forth(image)), image)
        assert square or view.forth(image).shape == image.shape


@pytest.mark.parametrize("names", CHOICES, ids="-".join)
@pytest.mark.parametrize("square", [True, False], ids=["square", "oblong"])
def test_each_different_image_that_the_names_allow_is_seen_once(names, square):
    image = torch.rand(1, 1, 8, 8)
    changes = {
        "hflip": lambda x: x.flip(3),
        "vflip": lambda x: x.flip(2),
        "rot90": lambda x: torch.rot90(x, 1 if square else 2, (2, 3)),
    }
    reached = {image.numpy().tobytes(): image}
    while True:  # all that repeated changes make of the image
        new = {(y := changes[name](x)).numpy().tobytes(): y for x in reached.values() for name in names}
        if new.keys() <= reached.keys():
            break
        reached |= new
    seen = [view.forth(image).contiguous().numpy().tobytes() for view in views(names, square)]
    assert len(set(seen)) == len(seen)
    assert set(seen) == reached.keys()
    assert seen[0] == image.numpy().tobytes()


@pytest.mark.parametrize(
    ("names", "count"), [([], 1), (["hflip"], 2), (["hflip", "vflip"], 4), (["rot90"], 4), (list(NAMES), 8)]
)
def test_how_many_views_there_are(names, count):
    assert len(views(names)) == count
    assert len(views(names[::-1])) == count
