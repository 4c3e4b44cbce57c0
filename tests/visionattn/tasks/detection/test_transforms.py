"""From images with objects to what the network sees: objects stay on what they are around."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Reading, Sample
from visionattn.inference.fusion import fuse
from visionattn.inference.views import views
from visionattn.tasks.detection.recipe import DATA, Augment
from visionattn.tasks.detection.transforms import (
    TrainingCrops,
    WholeImages,
    augmentation,
    collate,
    factor_of,
    frame,
    merged,
)


@dataclass(frozen=True)
class Squares(Sample):
    """Bright squares on black ground, each of another class."""

    xyxy: np.ndarray = field(default_factory=lambda: np.array([[8, 4, 24, 20], [40, 10, 60, 30]], np.float32))

    def image(self, window=None) -> np.ndarray:
        image = np.zeros((1, *self.size), np.uint8)
        for left, top, right, bottom in self.xyxy.astype(int):
            image[0, top:bottom, left:right] = 255
        return image if window is None else image[:, window[0], window[1]]

    def target(self, window=None) -> Boxes:
        boxes = Boxes(self.xyxy, np.arange(len(self.xyxy)), np.zeros(len(self.xyxy), bool))
        return boxes if window is None else boxes.within(window)


def section(**keys: Any):
    given = {"format": "builtin", "mean": [0.0], "std": [1.0]} | keys
    return DATA["builtin"](**given)


def sample(size: tuple[int, int] = (48, 64), **more: Any) -> Squares:
    return Squares("a", "a", "a", 1, size, **more)


def reading(one: Squares) -> Reading:
    centres = ((one.xyxy[:, :2] + one.xyxy[:, 2:]) / 2)[:, ::-1].astype(np.int32)
    return Reading(size=one.size, places={k: centres[[k]] for k in range(len(centres))})


def bright_box(image: torch.Tensor) -> list[int]:
    ys, xs = torch.nonzero(image[0] > 0.5, as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize(
    ("size", "image_size", "factor", "framed"),
    [
        ((480, 640), 256, 0.4, (192, 256)),
        ((640, 480), 256, 0.4, (256, 192)),
        ((480, 640), [800, 1333], 800 / 480, (800, 1067)),
        ((1000, 500), [800, 1333], 1.333, (1333, 666)),
        ((64, 64), 64, 1.0, (64, 64)),
    ],
)
def test_images_fit_into_the_frame_whichever_way_round(size, image_size, factor, framed):
    data = section(image_size=image_size)
    assert factor_of(size, data) == pytest.approx(factor)
    assert frame(size, data) == framed
    assert factor_of(size, section(image_size=image_size, resize="none")) == 1


def test_native_pixels_are_cut_into_crops_of_the_frame():
    assert frame((100, 40), section(image_size=64, resize="none")) == (64, 40)


def test_whole_images_have_their_objects_in_both_scales():
    one = WholeImages([sample()], section(image_size=128))[0]
    assert one["image"].shape == (1, 96, 128)
    assert one["objects"].xyxy.tolist() == [[16, 8, 48, 40], [80, 20, 120, 60]]
    assert one["truth"].xyxy.tolist() == sample().xyxy.tolist()
    batch = collate([one, one])
    assert batch["index"].tolist() == [0, 0]
    assert batch["size"] == [(48, 64)] * 2


def test_what_tiles_show_is_merged_to_what_the_image_has():
    """Every tile finds all that it shows; squares lie across its borders and in corners of four tiles."""
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(4, 300, 37), np.arange(5, 200, 29)), -1).reshape(-1, 2)
    sides = rng.integers(9, 15, corners.shape)
    xyxy = np.concatenate([corners, corners + sides], 1).clip(max=[300, 200] * 2)
    scene = sample((200, 300), xyxy=xyxy.astype(np.float32))
    dataset = WholeImages([scene, sample()], section(image_size=64, resize="none", overlap=0.25))
    assert {dataset.sample_of(n) for n in range(len(dataset))} == {0, 1}
    found, truths = {0: [], 1: []}, {0: [], 1: []}
    for n in np.random.default_rng(1).permutation(len(dataset)).tolist():  # as processes give them
        tile = dataset[n]
        top, bottom, left, right = tile["window"]
        if tile["index"] == 0:
            assert np.array_equal(tile["image"] > 0.5, scene.image()[:, top:bottom, left:right] > 0)
        shown = tile["objects"]
        boxes = Boxes(*(part.numpy() for part in shown[:3]), scores=np.full(len(shown.labels), 0.9, np.float32))
        found[tile["index"]].append(((slice(top, bottom), slice(left, right)), boxes))
        truths[tile["index"]] += [tile["truth"]] if tile["truth"] is not None else []
    for index, one in enumerate((scene, sample())):
        (truth,) = truths[index]
        together = merged(found[index], one.size)
        assert sorted(together.xyxy.tolist()) == sorted(truth.xyxy.tolist()) == sorted(one.xyxy.tolist())
    assert len(merged([(window, boxes[np.zeros(0, int)]) for window, boxes in found[0]], scene.size)) == 0


def test_boxes_over_the_border_are_clipped_and_what_is_outside_is_ignored():
    beyond = np.array([[-8, -4, 24, 20], [64, 10, 80, 30]], np.float32)
    truth = WholeImages([sample(xyxy=beyond)], section(image_size=64))[0]["truth"]
    assert truth.xyxy[0].tolist() == [0, 0, 24, 20]
    assert truth.ignore.tolist() == [False, True]


@pytest.mark.parametrize("resize", ["fit", "none"])
def test_a_crop_shows_its_objects_where_they_are(resize):
    one = sample(xyxy=np.array([[20, 12, 44, 36]], np.float32))
    data = section(image_size=32, resize=resize, augment={"scale": [0.7, 1.5], "vflip": 0.5, "rot90": 0.5})
    crops = TrainingCrops([one], [reading(one)], data, seed=0)
    seen = 0
    for epoch in range(40):
        item = crops[(epoch, 0)]
        assert item["index"] == 0
        if len(item["objects"].xyxy):
            seen += 1
            assert item["objects"].xyxy[0].tolist() == pytest.approx(bright_box(item["image"]), abs=1.01)
        again = crops[(epoch, 0)]
        assert torch.equal(item["image"], again["image"])
    assert seen > 20


def test_crops_around_objects_show_them():
    one = sample((400, 400), xyxy=np.array([[300, 40, 320, 60], [20, 360, 30, 372]], np.float32))
    data = section(image_size=64, resize="none", object_crops=1.0, augment={"scale": [1.0, 1.0], "hflip": 0.0})
    crops = TrainingCrops([one], [reading(one)], data, seed=0)
    labels = [crops[(epoch, 0)]["objects"].labels.tolist() for epoch in range(40)]
    assert all(len(shown) == 1 for shown in labels)
    assert {shown[0] for shown in labels} == {0, 1}
    blind = TrainingCrops([one], [reading(one)], data.model_copy(update={"object_crops": 0.0}), seed=0)
    assert sum(len(blind[(epoch, 0)]["objects"].labels) for epoch in range(40)) < 20


@pytest.mark.parametrize(
    "change",
    [{"hflip": 1.0}, {"vflip": 1.0, "hflip": 0.0}, {"rot90": 1.0, "hflip": 0.0}, {"rotate": 15, "hflip": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("size", [(40, 40), (30, 50)])
def test_changes_move_images_and_boxes_together(change, size):
    torch.manual_seed(0)
    transform = augmentation(Augment(**change))
    for _ in range(8):
        image = torch.zeros(1, *size)
        image[0, 4:12, 20:26] = 1.0
        boxes = tv_tensors.BoundingBoxes(torch.tensor([[20.0, 4, 26, 12]]), format="XYXY", canvas_size=size)
        seen = transform({"image": tv_tensors.Image(image), "boxes": boxes})
        slack = 3.0 if "rotate" in change else 0.0
        assert seen["boxes"][0].tolist() == pytest.approx(bright_box(seen["image"]), abs=slack)


# Views of an image


@pytest.mark.parametrize("size", [(20, 20), (14, 30)])
def test_boxes_of_views_are_turned_back(size):
    image = torch.zeros(1, *size)
    image[0, 2:6, 8:13] = 1.0
    for view in views(["hflip", "vflip", "rot90"]):
        box = torch.tensor([bright_box(view.forth(image))], dtype=torch.float32)
        assert view.boxes_back(box, size)[0].tolist() == [8, 2, 13, 6]


def test_what_all_views_see_is_surer_than_what_one_sees():
    both = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1]), torch.tensor([0.8])
    alone = torch.tensor([[2.0, 0, 12, 10], [50, 50, 60, 60]]), torch.tensor([1, 1]), torch.tensor([0.4, 0.6])
    boxes, labels, scores = fuse([both, alone], overlap=0.5)
    assert labels.tolist() == [1, 1]
    assert scores.tolist() == pytest.approx([0.6, 0.3])
    assert boxes[0].tolist() == pytest.approx([2 / 3, 0, 10 + 2 / 3, 10])
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert len(fuse([nothing, nothing], 0.5)[0]) == 0
    other = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]), torch.tensor([0.8])
    assert fuse([both, other], 0.5)[2].tolist() == pytest.approx([0.4, 0.4])
