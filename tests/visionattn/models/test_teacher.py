"""What a teacher sees of a student's images, and which teachers are refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from visionattn.errors import UserError
from visionattn.models.teacher import Teacher, make_teacher
from visionattn.recipe import sections

RGB = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def published(monkeypatch, name: str) -> nn.Module:
    """The model with the weights that a recipe then gets as published (their download is replaced here)."""
    model = timm.create_model(name).eval()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(model.state_dict()))
    return model


def test_an_rgb_teacher_sees_its_bands_of_13_as_it_was_trained(monkeypatch):
    model = published(monkeypatch, "test_vit")
    mean, std = torch.rand(2, 13).clamp_min(0.1)
    pixels = torch.rand(2, 13, 40, 48)
    taught = make_teacher(
        sections.Teacher(name="test_vit", bands=[4, 3, 2]), [str(k) for k in range(1000)], (mean.tolist(), std.tolist())
    )
    own = ((torch.tensor(model.pretrained_cfg[key])[:, None, None]) for key in ("mean", "std"))
    side = model.pretrained_cfg["input_size"][1]
    expected = F.interpolate(pixels[:, [3, 2, 1]], (side, side), mode="bilinear", antialias=True)
    expected = (expected - next(own)) / next(own)
    given = (pixels - mean[:, None, None]) / std[:, None, None]
    assert_close(taught.view(given), expected)
    assert_close(taught.logits(given), model(expected).detach())
    assert not taught.logits(given).requires_grad


def test_without_statistics_of_its_own_it_takes_normalised_values():
    teacher = Teacher(nn.Identity(), None, None, (8, 8), [2, 1], (RGB[0], RGB[1]), {"name": "x"})
    images = torch.randn(1, 3, 8, 8)
    assert_close(teacher.view(images), images[:, [1, 0]])


@pytest.mark.parametrize(
    ("spec", "channels", "classes", "words"),
    [
        ({"name": "test_vit"}, 3, 10, "was published for 1000 classes, but the images have 10"),
        ({"name": "test_vit"}, 13, 1000, "the teacher takes 3 channels and the images have 13"),
        ({"name": "test_vit", "bands": [4, 3, 14]}, 13, 1000, "expected for each of its channels the number"),
        ({"name": "tset_vit"}, 3, 1000, "model.teacher.name is 'tset_vit': unknown .*did you mean test_vit"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(spec, channels, classes, words, monkeypatch):
    published(monkeypatch, "test_vit")
    with pytest.raises(UserError, match=words):
        make_teacher(sections.Teacher(**spec), [str(k) for k in range(classes)], ([0.5] * channels, [0.5] * channels))
