"""What happens to an image between the file and the network: sizes, geometry, policies, mixing, refusals."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from visionattn.data.loaders import seeded
from visionattn.errors import UserError
from visionattn.tasks.classification.recipe import DATA, Augment, Data
from visionattn.tasks.classification.transforms import Normalize, eval_transform, mix_transform, train_transform


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1]), torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]])])
def test_mix_shares_images_and_labels_alike(labels):
    torch.manual_seed(0)
    pictures = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    image, label = mix_transform(Augment(mixup=1.0), 3)(pictures, labels)
    hot = torch.nn.functional.one_hot(labels, 3).float() if labels.ndim == 1 else labels
    share = image[1, 0, 0, 0]  # of picture 1 over picture 0
    torch.testing.assert_close(label[1], share * hot[1] + (1 - share) * hot[0])
    assert mix_transform(Augment(), 3) is None


def dtypes(channels: int) -> list[torch.Tensor]:
    image = torch.rand(channels, 50, 40)
    return [image, (image * 255).to(torch.uint8)]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("resize", ["crop", "squash", "none"])
@pytest.mark.parametrize("size", [32, [32, 36]])
def test_transforms_give_the_size_asked_for(channels, resize, size):
    augment = Augment(rotate=10.0, vflip=0.5, erasing=0.5, jitter=0.2 if channels < 5 else 0.0)
    statistics = {"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}
    keys = {"image_size": size, "resize": resize, "augment": augment} | statistics
    data = DATA["folder"](format="folder", root=Path(), **keys)
    for image in dtypes(channels):
        for transform, dtype in ((train_transform(data), image.dtype), (eval_transform(data), torch.float32)):
            result = transform(image)
            assert result.shape == (channels, 32, 32 if size == 32 else 36)
            assert result.dtype == dtype


def settings(**keys) -> Data:
    statistics = {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    return DATA["folder"](format="folder", root=Path(), **{"image_size": 32, **statistics, **keys})


def test_evaluation_geometry():
    half = torch.zeros(3, 40, 80)
    half[:, :, 40:] = 1
    assert torch.equal(eval_transform(settings(resize="none", image_size=40))(half), half[:, :, 20:60] * 2 - 1)
    squashed = eval_transform(settings(resize="squash", interpolation="nearest"))(half)
    assert (squashed[:, :, :16] == -1).all()
    assert (squashed[:, :, 16:] == 1).all()
    covered = eval_transform(settings(crop_pct=0.8, interpolation="nearest"))(half)  # 40 x 80, its centre
    assert torch.equal(covered, half[:, 4:36, 24:56] * 2 - 1)
    assert eval_transform(settings())(torch.zeros(3, 5, 3)).shape == (3, 32, 32)


def test_training_images_are_bytes_that_become_the_numbers_of_evaluation():
    data = settings(resize="none", image_size=[40, 50], mean=[0.2, 0.5, 0.7], augment=Augment(hflip=0.0))
    normalize = Normalize(data.mean, data.std)
    for image in dtypes(3):
        image = torch.cat([image, image], 2)[:, :40, :50]
        batch = torch.stack([train_transform(data)(image)] * 2)
        assert batch.dtype == image.dtype
        assert torch.equal(normalize(batch)[1], eval_transform(data)(image))


def test_erased_pixels_are_the_mean():
    data = settings(resize="none", image_size=[50, 40], mean=[0.2, 0.5, 0.7], augment=Augment(hflip=0.0, erasing=1.0))
    for image in dtypes(3):
        found = Normalize(data.mean, data.std)(train_transform(data)(image))
        changed = (found != eval_transform(data)(image)).all(0)
        assert 0.01 < changed.float().mean() < 0.5
        assert found[:, changed].abs().max() <= (0.5 / 255 / 0.5 + 1e-6 if image.dtype == torch.uint8 else 1e-6)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original-mstd0.5", "3a"])
def test_timms_policies_change_images_by_the_seed_alone(policy):
    statistics = {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    transform = train_transform(settings(augment=Augment(policy=policy), **statistics))
    images = [torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8))] * 8

    def seen(seed: int) -> list[torch.Tensor]:
        made = []
        for i, image in enumerate(images):
            random.seed(time.time_ns())
            np.random.seed(None)
            with seeded(seed, i):
                made.append(transform(image))
        return made

    first, again, other = seen(0), seen(0), seen(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    random.seed(5)
    with seeded(0):
        transform(images[0])
    drawn = random.random()
    random.seed(5)
    assert random.random() == drawn  # what others draw is left alone


def test_timms_policies_say_what_they_cannot_take():
    with pytest.raises(ValidationError, match="policy is 'rand-m9-foo3'"):
        Augment(policy="rand-m9-foo3")
    with pytest.raises(ValidationError, match="randaugment"):
        Augment(policy="randaugmnt")
    statistics = {"channels": 1, "mean": [0.5], "std": [0.25]}
    with pytest.raises(UserError, match="for 3 channels; the images have 1"):
        train_transform(settings(augment=Augment(policy="rand-m9"), **statistics))


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "trivialaugment", "augmix"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies(policy, channels):
    statistics = {"channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    transform = train_transform(settings(augment=Augment(policy=policy), **statistics))
    torch.manual_seed(0)
    for image in dtypes(channels) * 10:
        assert transform(image).isfinite().all()


@pytest.mark.parametrize(
    ("augment", "channels", "message"),
    [
        (Augment(policy="augmix"), 5, "policy is augmix, .* defined for 1 or 3 channels; the images have 5"),
        (Augment(jitter=0.1), 2, "jitter is 0.1"),
        (Augment(crop_scale=[1.0, 0.5]), 3, r"crop_scale is \[1.0, 0.5\], expected \[smallest, largest\]"),
        (Augment(crop_ratio=[2.0, 0.5]), 3, "crop_ratio"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(augment, channels, message):
    with pytest.raises(UserError, match=message):
        train_transform(settings(augment=augment, channels=channels, mean=[0.5] * channels, std=[0.5] * channels))
