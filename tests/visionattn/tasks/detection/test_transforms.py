"""From images with objects to what the network sees: objects stay on what they are around."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Reading, Sample
from visionattn.inference.fusion import fuse
from visionattn.inference.views import views
from visionattn.models.detectors import Detections, Objects
from visionattn.tasks.detection.pasting import paste
from visionattn.tasks.detection.recipe import DATA, Augment, Optim, Train
from visionattn.tasks.detection.task import DetectorTask
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
    labels: np.ndarray = field(default_factory=lambda: np.arange(99))
    shades: tuple[int, ...] = (255,) * 99  # of the classes
    masked: bool = False  # discs, with masks

    def image(self, window=None) -> np.ndarray:
        image = np.zeros((1, *self.size), np.uint8)
        for (left, top, right, bottom), label in zip(self.xyxy.astype(int), self.labels, strict=False):
            shape = disc(bottom - top) if self.masked else 1
            image[0, top:bottom, left:right] = np.maximum(image[0, top:bottom, left:right], shape * self.shades[label])
        return image if window is None else image[:, window[0], window[1]]

    def target(self, window=None) -> Boxes:
        count = len(self.xyxy)
        masks = [disc(int(box[3] - box[1])).astype(bool) for box in self.xyxy] if self.masked else None
        boxes = Boxes(self.xyxy, self.labels[:count], np.zeros(count, bool), masks=masks)
        return boxes if window is None else boxes.within(window)


def disc(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return (x**2 + y**2 <= (side / 2) ** 2).astype(np.uint8)


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


# Which crops are drawn


def scattered(objects: list[list[int]]) -> list[tuple[Squares, Reading]]:
    """Images of 32 pixels with squares of 8 pixels of these classes."""
    pairs = []
    for i, labels in enumerate(objects):
        corners = np.array([[4 + 10 * n, 4] for n in range(len(labels))]).reshape(-1, 2)
        xyxy = np.concatenate([corners, corners + 8], 1).astype(np.float32)
        boxes = Boxes(xyxy, np.array(labels, np.int64), np.zeros(len(labels), bool))
        one = Squares(f"{i}", f"{i}", f"{i}", 1, (32, 32), xyxy=xyxy, labels=boxes.labels)
        places = {k: np.array([[8, 8 + 10 * labels.index(k)]], np.int32) for k in set(labels)}
        counts = np.bincount([*labels, 3])[:4] - np.array([0, 0, 0, 1])
        pairs.append((one, Reading(size=(32, 32), places=places, boxes=boxes, counts=counts)))
    return pairs


@pytest.mark.parametrize(("ceiling", "expected"), [(0.3, 0.3), (0.0, 0.0), (1.0, 0.8), (0.9, 0.8)])
def test_no_more_crops_than_asked_show_nothing(ceiling, expected):
    """Of 80 % images without an object; where fewer crops are empty than may be, all stay."""
    samples, readings = zip(*scattered([[0], [], [], [], []] * 100), strict=True)
    crops = TrainingCrops(samples, readings, section(image_size=32, empty_crops=ceiling, augment=STILL), seed=0)
    shown = [crops[3, i] for i in range(len(crops))]
    assert np.mean([len(one["objects"].xyxy) == 0 for one in shown]) == pytest.approx(expected, abs=0.05)
    assert all(len(one["objects"].xyxy) == len(readings[one["index"]].boxes) for one in shown)
    assert [one["index"] for one in shown] == [crops[3, i]["index"] for i in range(len(crops))]


def test_images_of_rare_classes_are_drawn_more_often():
    """A class in one of 100 images ten times as often, one in all of them and no object as before."""
    samples, readings = zip(*scattered([[0]] * 99 + [[0, 1]]), strict=True)
    plain, balanced = (
        TrainingCrops(samples, readings, section(crops_per_image=2, balanced_sampling=on), seed=0)
        for on in (False, True)
    )
    assert plain.weights is None
    assert balanced.weights.tolist() == pytest.approx(([1.0] * 99 + [10.0]) * 2)


# Copy-paste

STILL = Augment(scale=[1.0, 1.0], hflip=0.0)


def left_by_hand(box: list[float], mask: np.ndarray, covered: np.ndarray, ignore: bool):
    """Box and ignore of what is visible, pixel by pixel; None where it is gone."""
    seen = [(x, y) for y, x in np.argwhere(mask).tolist() if not covered[y, x]]
    share = len(seen) / mask.sum()
    if (not seen) or (share < 0.25 and not ignore):
        return None
    if len(seen) == mask.sum():
        return box, ignore
    xs, ys = zip(*seen, strict=True)
    ends = [max(box[0], min(xs)), max(box[1], min(ys)), min(box[2], max(xs) + 1), min(box[3], max(ys) + 1)]
    return ends, ignore or share < 0.5


@pytest.mark.parametrize("with_masks", [False, True])
def test_what_is_pasted_covers_objects_by_the_rule_of_crops(with_masks):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        corners = rng.uniform(0, 20, (6, 2))
        xyxy = np.concatenate([corners, corners + rng.uniform(2, 12, (6, 2))], 1).astype(np.float32)
        ignore, masks = rng.random(6) < 0.3, np.zeros((6, 32, 32), np.uint8)
        for mask, box in zip(masks, xyxy, strict=True):
            left, top, right, bottom = *np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int)
            mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < (0.7 if with_masks else 2)
        shape, (top, left) = rng.random((10, 8)) < 0.8, rng.integers(0, 20, 2).tolist()
        new = Boxes(np.array([[1, 2, 8, 9]], np.float32), np.array([7]), np.array([False]))
        drawn = torch.from_numpy(shape[None].astype(np.uint8)) if with_masks else None
        old = Objects(
            *map(torch.from_numpy, (xyxy, np.arange(6), ignore)), torch.from_numpy(masks) if with_masks else None
        )
        image, patch = torch.zeros(2, 32, 32), torch.ones(2, 10, 8)
        pasted = Objects(*map(torch.from_numpy, (new.xyxy, new.labels, new.ignore)), drawn)
        image, found = paste(image, old, patch, pasted, (top, left), torch.from_numpy(shape))
        covered = np.zeros((32, 32), bool)
        covered[top : top + 10, left : left + 8] = shape
        assert np.array_equal(image.numpy(), np.stack([covered, covered]))
        expected = [
            left_by_hand(b, m, covered, i) for b, m, i in zip(xyxy.tolist(), masks, ignore.tolist(), strict=True)
        ]
        stays = [k for k, one in enumerate(expected) if one is not None]
        kinds |= {"gone"} if len(stays) < 6 else set()
        kinds |= {"ignored" for k in stays if expected[k][1] and not ignore[k]}
        assert found.labels.tolist() == [*stays, 7]
        assert found.ignore.tolist() == [*(expected[k][1] for k in stays), False]
        assert np.allclose(found.xyxy[:-1], np.array([expected[k][0] for k in stays]).reshape(-1, 4))
        assert found.xyxy[-1].tolist() == [1 + left, 2 + top, 8 + left, 9 + top]
        if with_masks:
            assert np.array_equal(found.masks[:-1].numpy().astype(bool), masks[stays].astype(bool) & ~covered)
            assert np.array_equal(found.masks[-1].numpy().astype(bool), covered)
    assert kinds == {"gone", "ignored"}


@pytest.mark.parametrize("with_masks", [False, True])
def test_rare_objects_are_pasted_whole_with_their_labels(with_masks):
    """A class of one object in 50 images is in half of the crops, always of its own brightness and size."""
    samples, readings = zip(*scattered([[0]] * 49 + [[0, 1]]), strict=True)
    samples = [replace(one, shades=(100, 200), masked=with_masks) for one in samples]
    instances = "masks" if with_masks else "boxes"
    data = section(image_size=32, augment=STILL.model_copy(update={"copy_paste": 1.0}), instances=instances)
    crops = TrainingCrops(samples, readings, data, seed=0)
    seen = [crops[0, i] for i in range(49)]
    rare = [one for one in seen if 1 in one["objects"].labels.tolist()]
    assert 15 <= len(rare) <= 34
    for one in rare:
        objects = one["objects"]
        (k,) = torch.where(objects.labels == 1)[0].tolist()
        left, top, right, bottom = objects.xyxy[k].int().tolist()
        assert (right - left, bottom - top) == (8, 8)
        disc = one["image"][0, top:bottom, left:right] * 255
        assert (disc == 200).sum() == (4 * 13 if with_masks else 64)
        if with_masks:
            assert torch.equal(objects.masks[k, top:bottom, left:right].bool(), disc == 200)
    plain = TrainingCrops(samples, readings, section(image_size=32, augment=STILL), seed=0)
    assert all(len(plain[0, i]["objects"].labels) == 1 for i in range(49))


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
    assert fuse([both, other], 0.5, agnostic=True)[2].tolist() == pytest.approx([0.8])


class Bright(nn.Module):
    """Finds the bright rectangle of each image, and says in which sizes it has seen images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), list[tuple[int, ...]]()
        self.head = SimpleNamespace(agnostic=False)

    def forward(self, images: list[torch.Tensor]) -> list[Detections]:
        self.seen += [tuple(image.shape[1:]) for image in images]
        boxes = [torch.tensor([bright_box(image)]).float() for image in images]
        return [Detections(box, torch.tensor([1]), torch.tensor([0.8])) for box in boxes]


def test_what_views_in_several_scales_show_is_one_object():
    network = Bright()
    rest = {"optim": Optim(), "train": Train(), "frozen": None, "monitored": "val/map", "names": str}
    scales = [0.5, 1.0, 2.0]
    task = DetectorTask(network, nn.Identity(), ["a", "b"], 0.5, None, 100, ["hflip", "rot90"], scales, **rest)
    item = WholeImages([sample((48, 64), xyxy=np.array([[8, 4, 24, 20]], np.float32))], section(image_size=64))[0]
    (found,) = task.predict_step(collate([item]))
    assert sorted(set(network.seen)) == [(24, 32), (32, 24), (48, 64), (64, 48), (96, 128), (128, 96)]
    assert len(network.seen) == 3 * 8
    assert found.value.labels.tolist() == [1]
    assert found.value.scores.tolist() == pytest.approx([0.8])
    assert np.allclose(found.value.xyxy, [[8, 4, 24, 20]], atol=0.3)
