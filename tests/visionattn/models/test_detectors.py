"""Any encoder under any detector: gradients, sizes, what is learned where, what is ignored, and clear refusals."""

from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou, nms, roi_align

from visionattn.errors import UserError
from visionattn.models.dense_heads import FCOS, RetinaNet
from visionattn.models.detectors import DETECTORS, Detector, Objects, make_detector, measured_levels
from visionattn.models.networks import freeze

SMALL = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
NARROW = {"fpn_channels": 48, "convs": 1, "queries": 40, "layers": 2}
every_detector = pytest.mark.parametrize("detector", DETECTORS)
dense_detector = pytest.mark.parametrize("detector", ["fcos", "retinanet"])
ENCODERS = [
    ("biformer_tiny", SMALL, (8, 32)),
    ("biformer_tiny", SMALL, (4, 32)),
    ("biformer_tiny", SMALL, (8, 128)),
    ("test_resnet", {}, (4, 64)),
    ("vit_tiny_patch16_224", {"depth": 2}, (8, 32)),
]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def small(detector: str, channels: int = 3, **args: Any) -> Detector:
    return make_detector("biformer_tiny", detector, 3, channels, args=SMALL, detector_args=NARROW | args)


def objects(*boxes: tuple[float, float, float, float], labels: tuple[int, ...] = (), ignore: tuple[int, ...] = ()):
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    label = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    return Objects(xyxy, label, torch.tensor([n in ignore for n in range(len(boxes))], dtype=torch.bool))


def painted(image: Tensor, target: Objects) -> Objects:
    """With masks as large as the boxes."""
    masks = torch.zeros(len(target.xyxy), *image.shape[-2:], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, target.xyxy.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return target._replace(masks=masks)


# Training


@every_detector
@pytest.mark.parametrize(("encoder", "args", "strides"), ENCODERS)
def test_every_parameter_gets_a_gradient(detector, encoder, args, strides):
    """With images of different sizes and one empty, and with empty ones alone: so plain DDP works."""
    levels = {"finest": strides[0], "coarsest": min(strides[1], DETECTORS[detector].coarsest)}
    network = make_detector(encoder, detector, 3, 5, args=args, detector_args=NARROW | levels)
    images = [torch.randn(5, 100, 133), torch.randn(5, 96, 64)]
    full = objects((10, 10, 40, 50), (60, 20, 80, 44), (0, 0, 100, 30), labels=(0, 2, 1), ignore=(2,))
    for targets in ([full, objects()], [objects(), objects()]):
        losses = network(images, list(map(painted, images, targets)))
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert all(p.requires_grad for p in network.parameters())
        network.zero_grad()


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "rt_detr", "d_fine"])  # two-stage ones: with shapes, below
def test_labels_begin_at_0_and_each_has_a_channel(detector):
    """Learned by heart, two images of the first and the last class are told apart."""
    network = small(detector, finest=8, coarsest=8, sizes=[24.0])
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, 10:34, 10:34], images[1, :, 20:44, 30:54] = 1.0, -1.0
    targets = [objects((10, 10, 34, 34), labels=(0,)), objects((30, 20, 54, 44), labels=(2,))]
    targets = list(map(painted, images, targets))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        sum(network(images, targets).values()).backward()
        optimizer.step()
    found = network.eval()(images)
    for one, target in zip(found, targets, strict=True):
        assert one.labels[0] == target.labels[0]
        assert box_iou(one.xyxy[:1], target.xyxy).item() > 0.7


@dense_detector
def test_what_is_ignored_gives_no_gradient(detector):
    """Neither the class loss of places inside an ignored region nor the box of an ignored object."""
    network = small(detector)
    raw = network.predicted(torch.randn(1, 3, 64, 64))
    raw |= {name: raw[name].detach().requires_grad_() for name in raw.keys() - {"shapes"}}
    region = objects((8, 8, 56, 56), ignore=(0,))
    losses = network.head.losses(raw, [(64, 64)], [region])
    (gradient,) = torch.autograd.grad(losses["class"], raw["logits"])
    anchors = network.head.anchors(raw["shapes"], torch.device("cpu"))
    low, high = torch.maximum(anchors[:, :2], region.xyxy[:, :2]), torch.minimum(anchors[:, 2:], region.xyxy[:, 2:])
    inside = (high - low).clamp(min=0).prod(1) >= 0.5 * (anchors[:, 2:] - anchors[:, :2]).prod(1)
    assert inside.any()
    assert not gradient[0, inside].any()
    assert gradient[0, ~inside].all()
    assert losses["box"] == 0


@every_detector
def test_losses_do_not_depend_on_padding_or_company(detector):
    """An image costs the same alone and beside a larger one, but for the common count of places."""
    network = small(detector)
    image = torch.randn(3, 64, 64)
    target = painted(image, objects((10, 10, 40, 50)))
    alone = network([image], [target])
    beside = network([image, torch.zeros(3, 64, 64)], [target, target])
    assert alone.keys() == beside.keys()
    found = network.eval()([image])[0]
    for company in (torch.randn(3, 64, 64), torch.randn(3, 50, 120)):
        again, _ = network([image, company])
        assert_close(found.xyxy, again.xyxy)
        assert_close(found.scores, again.scores)


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_regions_inside_what_is_ignored_are_not_learned(detector):
    image = torch.randn(1, 3, 64, 64)
    everything, nothing = objects((-200, -200, 300, 300), ignore=(0,)), objects()
    ignored, empty = (small(detector)(image, [painted(image, target)]) for target in (everything, nothing))
    assert not any(ignored.values())
    assert empty["class"] > 0
    assert empty["objectness"] > 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 33), (70, 100)])
def test_regions_are_looked_at_where_they_are_however_much_is_padded(size):
    """Torchvision would guess strides from the sizes of the first images."""
    network = small("mask_rcnn", finest=8, coarsest=64, sizes=[32.0, 64.0, 128.0, 256.0]).eval()
    torch.nn.init.zeros_(network.get_classifier().weight)
    torch.nn.init.zeros_(network.get_classifier().bias)
    assert len(network(torch.randn(1, 3, *size))[0].scores) > 0
    for pool in (network.head.regions.box_roi_pool, network.head.regions.mask_roi_pool):
        assert pool.scales == [1 / 8, 1 / 16, 1 / 32, 1 / 64]


@torch.no_grad()
def test_mask_rcnn_learns_the_shape_of_an_object():
    """By heart: a disc, and two bars."""
    network, image = small("mask_rcnn", finest=8, coarsest=8, sizes=[32.0]), torch.zeros(1, 3, 64, 64)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (rows - 18) ** 2 + (columns - 18) ** 2 < 14**2
    bar = (rows >= 36) & (rows < 60) & ((columns - 40).abs() < 4) | (rows >= 54) & (rows < 60) & (columns >= 30) & (
        columns < 60
    )
    image[0, :, disc], image[0, :, bar] = 1.0, -1.0
    target = objects((4, 4, 32, 32), (30, 36, 60, 60), labels=(0, 1))._replace(
        masks=torch.stack([disc, bar]).to(torch.uint8)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            sum(network(image, [target]).values()).backward()
            optimizer.step()
    (found,) = network.eval()(image)
    for label, mask in enumerate(target.masks):
        best = int((found.labels == label).nonzero()[0])
        assert box_iou(found.xyxy[[best]], target.xyxy[[label]]).item() > 0.6
        inside = roi_align(mask[None, None].float(), [target.xyxy[[label]]], 28)[0, 0] > 0.5
        shape = found.masks[best] > 0.5
        assert (inside & shape).sum() / (inside | shape).sum() > 0.6


# What is learned where


def brute_fcos(head: FCOS, xyxy: Tensor, shapes: list[tuple[int, int]]) -> list[int]:
    """Place by place, by the words of the paper."""
    edges = [0.0, *((a * b) ** 0.5 for a, b in zip(head.sizes, head.sizes[1:], strict=False)), float("inf")]
    owners = []
    for level, ((height, width), stride) in enumerate(zip(shapes, head.strides, strict=True)):
        for i in range(height):
            for j in range(width):
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                fits = []
                for n, (left, top, right, bottom) in enumerate(xyxy.tolist()):
                    sides = (x - left, y - top, right - x, bottom - y)
                    centred = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) < 1.5 * stride
                    if min(sides) > 0 and centred and edges[level] <= 2 * max(sides) < edges[level + 1]:
                        fits.append(((right - left) * (bottom - top), n))
                owners.append(min(fits)[1] if fits else -1)
    return owners


def test_fcos_gives_each_place_the_smallest_object_of_its_size():
    head = FCOS(32, 2, (8, 16), (24, 48), convs=1)
    corners = torch.rand(30, 2) * 50
    xyxy = torch.cat([corners, corners + 3 + torch.rand(30, 2) * 50], 1)
    shapes = [(10, 12), (5, 6)]
    anchors = head.anchors(shapes, torch.device("cpu"))
    assert head.assign(xyxy, anchors, shapes).tolist() == brute_fcos(head, xyxy, shapes)


def test_retinanet_gives_every_object_an_anchor():
    head = RetinaNet(32, 2, (8, 16), (32, 64), convs=1)
    xyxy = torch.tensor([[3.0, 3, 6, 60], [10, 10, 44, 41], [60, 60, 64, 64]])
    shapes = [(10, 12), (5, 6)]
    anchors = head.anchors(shapes, torch.device("cpu"))
    assert len(anchors) == 9 * (120 + 30)
    owner, iou = head.assign(xyxy, anchors, shapes), box_iou(anchors, xyxy)
    assert set(range(3)) <= set(owner.tolist())
    clear = (iou < 0.4).all(1) & ~(iou == iou.amax(0)).any(1)
    assert (owner[clear] == -1).all()
    sure = iou.amax(1) >= 0.5
    assert (owner[sure] == iou.argmax(1)[sure]).float().mean() > 0.9


@every_detector
def test_codes_lead_back_to_the_boxes(detector):
    head = small(detector, finest=4).head
    corners = torch.rand(50, 2) * 80
    truth = objects(*torch.cat([corners, corners + 8 + 40 * torch.rand(50, 2)], 1).tolist())
    assert head.round_trip(truth, (128, 128)) < 1e-3


@every_detector
def test_maps_are_measured_from_the_objects(detector):
    large = objects(*[(x, x, x + 90.0, x + 70.0) for x in range(50)])
    levels, missed = measured_levels(detector, large)
    assert levels.finest == 8
    assert missed == {0: pytest.approx(0, abs=0.02)}
    side = 6.0 if DETECTORS[detector].queries else 9.0  # queries need one place of the finest map, others two
    tiny = objects(*[(x, x, x + side, x + side) for x in range(50)])
    levels, missed = measured_levels(detector, tiny)
    assert levels.finest == 4
    given, _ = measured_levels(detector, tiny, finest=8, coarsest=16, sizes=[10.0, 20.0])
    assert given == (8, 16, [10.0, 20.0])
    assert measured_levels(detector, objects())[1] == {}


# Prediction


@every_detector
@pytest.mark.parametrize("size", [(32, 32), (50, 130), (33, 47)])
@torch.no_grad()
def test_images_keep_their_size(detector, size):
    """Nothing is resized behind the back: what is found lies in the image, whatever it is padded to."""
    network = small(detector, channels=1).eval()
    torch.nn.init.constant_(network.get_classifier().bias, 0.0)
    (found,) = network(torch.randn(1, 1, *size))
    assert len(found.scores) > 10
    assert (found.xyxy >= 0).all()
    assert (found.xyxy[:, 2::2] <= size[1]).all()
    assert (found.xyxy[:, 3::2] <= size[0]).all()
    assert (found.scores.diff() <= 0).all()
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    network(torch.randn(1, 1, *size))
    assert [tuple(shape) for shape in seen] == [tuple(-(-side // 32) * 32 for side in size)]


@every_detector
@torch.no_grad()
def test_duplicates_are_of_a_class_or_of_any(detector):
    image = torch.randn(1, 3, 64, 64)
    for agnostic in (False, True):
        torch.manual_seed(0)
        network = small(detector, agnostic=agnostic, overlap=0.4, limit=1000).eval()
        torch.nn.init.constant_(network.get_classifier().bias, 0.0)
        (found,) = network(image)
        kept = [nms(found.xyxy[own], found.scores[own], 0.4) for own in (found.labels == k for k in range(3))]
        assert sum(map(len, kept)) == len(found.scores)
        assert (len(nms(found.xyxy, found.scores, 0.4)) == len(found.scores)) is agnostic


def test_a_limit_of_objects_holds():
    network = small("fcos", limit=7).eval()
    torch.nn.init.constant_(network.get_classifier().bias, 0.0)
    with torch.no_grad():
        assert [len(found.scores) for found in network(torch.randn(2, 3, 64, 64))] == [7, 7]


# How it is trained


def test_layers_are_grouped_by_depth_and_the_encoder_is_frozen():
    network = small("fcos")
    groups = group_parameters(network, network.group_matcher())
    assert len(groups) > 4
    assert sorted(name for names in groups.values() for name in names) == sorted(dict(network.named_parameters()))
    assert max(groups, key=lambda number: number) == next(
        number for number, names in groups.items() if "head.classification.cls_logits.weight" in names
    )
    freeze(network, "backbone")
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "head"}
    network.set_grad_checkpointing()
    sum(network(torch.randn(2, 3, 64, 64), [objects((3, 3, 40, 40))] * 2).values()).backward()


@pytest.mark.parametrize(
    ("name", "detector", "args", "message"),
    [
        ("biformer_tiny", "fcoss", {}, "fcos"),
        ("biformer_tinyy", "fcos", {}, "biformer_tiny"),
        ("emcad_pvt_v2_b2", "fcos", {}, "whole segmenter"),
        ("biformer_tiny", "fcos", {"sizes": [8.0]}, "expected one for each stride"),
    ],
)
def test_refusals(name, detector, args, message):
    with pytest.raises(UserError, match=message):
        make_detector(name, detector, 3, detector_args=args)
