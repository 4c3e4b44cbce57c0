"""What a teacher sees of a student's images, and which teachers are refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.testing import assert_close

from visionattn.errors import UserError
from visionattn.models.segmenters import make_segmenter
from visionattn.models.teacher import Imitation, Teacher, feature_channels, make_teacher
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
        sections.Teacher(name="test_vit", bands=[4, 3, 2]), (mean.tolist(), std.tolist()), [str(k) for k in range(1000)]
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
    teacher = Teacher(nn.Identity(), None, (8, 8), [2, 1], (RGB[0], RGB[1]), {"name": "x"})
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
        make_teacher(sections.Teacher(**spec), ([0.5] * channels, [0.5] * channels), [str(k) for k in range(classes)])


def test_features_are_standardised_and_compared_place_by_place():
    taught = torch.randn(8, 6, 4, 5) * torch.tensor([1, 2, 3, 4, 5, 100.0])[:, None, None] + 7
    head = Imitation(3, 3, 6)
    overall, places = torch.randn(8, 6), torch.randn(8, 8, 10, 6)
    loss = head.loss(overall, places, taught)
    mean, std = (getattr(taught.movedim(1, -1).flatten(0, 2), kind)(0) for kind in ("mean", "std"))
    standard = (taught - mean[:, None, None]) / std[:, None, None]
    resized = F.interpolate(places.movedim(-1, 1), (4, 5), mode="bilinear")
    cosine = [
        (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        for a, b in ((resized, standard), (overall, standard.mean((2, 3))))
    ]
    assert_close(loss, sum(1 - c.mean() for c in cosine), rtol=1e-4, atol=1e-5)
    kept = {key: value.clone() for key, value in head.state_dict().items()}
    assert_close(head.eval().loss(overall, places, taught), loss)
    assert all(torch.equal(value, kept[key]) for key, value in head.state_dict().items())


def test_a_teacher_s_channels_are_known_without_its_weights(monkeypatch):
    published(monkeypatch, "test_vit")
    spec = sections.Teacher(name="test_vit")
    taught = make_teacher(spec, ([0.5] * 3, [0.5] * 3))
    assert taught.features(torch.randn(1, 3, 64, 64)).shape[1] == feature_channels(spec)


def test_the_backbone_of_a_segmenter_teaches(tmp_path):
    args = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
    segmenter = make_segmenter("biformer_tiny", "segformer", 2, in_chans=1, encoder_args=args).eval()
    recipe = {
        "task": "segmentation",
        "model": {"name": "biformer_tiny", "decoder": "segformer", "args": args},
        "data": {"mean": [0.2], "std": [0.4], "image_size": [32, 64], "classes": ["a", "b"]},
    }
    kept = {f"network.{key}": value for key, value in segmenter.state_dict().items()}
    said = {"format": 2, "recipe": yaml.safe_dump(recipe), "unit_range": True}
    torch.save({"state_dict": kept, "visionattn": said}, tmp_path / "run.ckpt")
    spec = sections.Teacher(checkpoint=tmp_path / "run.ckpt")
    assert feature_channels(spec) == 32
    taught = make_teacher(spec, ([0.5], [0.3]))
    pixels = torch.rand(2, 1, 32, 64)
    given = taught.network.forward_intermediates(taught.view((pixels - 0.5) / 0.3), indices=1, intermediates_only=True)
    assert_close(given[-1], segmenter.encoder((pixels - 0.2) / 0.4)[-1])
    with pytest.raises(UserError, match="is a run of segmentation, not of a classifier"):
        make_teacher(spec, ([0.5], [0.3]), ["a", "b"])
