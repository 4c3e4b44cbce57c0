"""Detectors of transformers over our encoders: the library's losses, padding, ignored regions, precision, refusals."""

import importlib.metadata
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_convert

from visionattn.errors import UserError
from visionattn.models.detectors import Detector, Objects, make_detector

SMALL = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
every_family = pytest.mark.parametrize("detector", ["rt_detr", "d_fine"])


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def small(detector: str, **args: Any) -> Detector:
    settings = {"fpn_channels": 32, "layers": 2, "queries": 30}
    return make_detector("biformer_tiny", detector, 3, args=SMALL, detector_args=settings | args)


def objects(*boxes: tuple[float, float, float, float], ignore: tuple[int, ...] = ()) -> Objects:
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Objects(xyxy, torch.arange(len(boxes)) % 3, torch.tensor([n in ignore for n in range(len(boxes))]).bool())


def maps(*sides: int) -> list[Tensor]:
    """Of an image of these sides, at strides 8, 16 and 32."""
    return [torch.randn(1, 32, *(side // stride for side in sides)) for stride in (8, 16, 32)]


@pytest.mark.parametrize("training", [False, True])
def test_losses_are_those_of_the_library(training):
    """Of RT-DETR; those of D-FINE are of one layer more, and each with the sides that belong to its boxes."""
    head = small("rt_detr").head.train(training)
    from transformers import RTDetrV2ForObjectDetection

    network = RTDetrV2ForObjectDetection(head.network.config).train(training)
    network.model = head.network
    of_image = [torch.cat([x, x + 1]) for x in maps(64, 96)]
    targets = [objects((10, 10, 40, 50), (60, 20, 80, 44)), objects((5, 5, 50, 60))]
    sides = torch.tensor([96, 64, 96, 64])
    labels = [{"class_labels": t.labels, "boxes": box_convert(t.xyxy / sides, "xyxy", "cxcywh")} for t in targets]
    torch.manual_seed(1)
    ours = head.losses(of_image, [(64, 96)] * 2, targets)
    torch.manual_seed(1)
    encoded = network.model.encoder(inputs_embeds=list(of_image))
    theirs = network(None, inputs_embeds=of_image[0], encoder_outputs=encoded, labels=labels)
    assert_close(ours["class"] + ours["box"], theirs.loss)
    assert_close(ours["class"], sum(loss for name, loss in theirs.loss_dict.items() if "vfl" in name))


@every_family
def test_what_pads_the_maps_of_an_image_is_not_seen(detector):
    """Neither by the losses, a sum over images per object, nor by what is found."""
    head = small(detector).head.eval()
    large, image = maps(96, 128), maps(64, 96)
    beside = [x.clone() for x in large]
    for x, y in zip(beside, image, strict=True):
        x[..., : y.shape[2], : y.shape[3]] = y
    sizes, targets = [(60, 90), (96, 128)], [objects((10, 10, 40, 50), (60, 20, 80, 44)), objects((5, 5, 90, 60))]
    together = [torch.cat(pair) for pair in zip(beside, large, strict=True)]
    alone = [head.losses(x, sizes[i : i + 1], targets[i : i + 1]) for i, x in enumerate((image, large))]
    for name, loss in head.losses(together, sizes, targets).items():
        assert_close(loss, (2 * alone[0][name] + alone[1][name]) / 3)
    for found, x, size in zip(head.found(together, sizes), (image, large), sizes, strict=True):
        (own,) = head.found(x, [size])
        assert len(own.scores) > 10
        assert_close(found.xyxy, own.xyxy)
        assert_close(found.scores, own.scores)


@every_family
def test_queries_in_ignored_regions_learn_no_class(detector):
    network, image = small(detector).eval(), torch.randn(1, 3, 64, 64)
    everything, nothing = objects((-200, -200, 300, 300), ignore=(0,)), objects()
    ignored, empty = (network(image, [target]) for target in (everything, nothing))
    assert empty["class"] > 0.01
    assert ignored["class"] < 1e-6
    one = objects((10, 10, 40, 50))
    both = Objects(*(torch.cat(pair) for pair in zip(one[:3], everything[:3], strict=True)))
    learned, only = network(image, [both]), network(image, [one])
    assert 0 < learned["class"] < only["class"]  # the object is learned though all is ignored around it
    assert_close(learned["box"], only["box"])


@every_family
def test_boxes_and_losses_are_float32_in_every_precision(detector):
    network, image, target = small(detector), torch.randn(2, 3, 64, 64), [objects((10, 10, 40, 50))] * 2
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(image, target)
        found = network.eval()(image)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0].xyxy.dtype == found[0].scores.dtype == torch.float32
    places = network.head._starts([(80, 80), (40, 40), (20, 20)], torch.device("cpu"), torch.float32)[0]
    assert len(places[0].unique(dim=0)) == 80**2 + 40**2 + 20**2


@every_family
def test_queries_start_from_boxes_of_the_sizes(detector):
    head = small(detector, sizes=[8.0, 20.0, 50.0]).head
    starts = head._starts([(8, 12), (4, 6), (2, 3)], torch.device("cpu"), torch.float32)[0][0].sigmoid()
    pixels = box_convert(starts, "cxcywh", "xyxy") * torch.tensor([96, 64, 96, 64])
    assert_close(pixels[0], torch.tensor([0.0, 0, 8, 8]), atol=1e-3, rtol=0)
    assert_close(pixels[96 + 7], torch.tensor([14.0, 14, 34, 34]), atol=1e-3, rtol=0)
    assert_close(pixels[-1], torch.tensor([55.0, 23, 105, 73]), atol=1e-3, rtol=0)


@every_family
@torch.no_grad()
def test_images_of_fewer_places_than_queries(detector):
    network = small(detector, queries=200, fpn_channels=64).eval()
    assert len(network(torch.randn(1, 3, 32, 32))[0].xyxy) <= 3 * 21
    assert network.train()(torch.randn(2, 3, 32, 32), [objects((3, 3, 20, 20))] * 2)["box"] > 0


@every_family
def test_weights_that_are_no_numbers_give_losses_that_are_none(detector):
    """So that training says which images, instead of ending in the library."""
    network = small(detector)
    with torch.no_grad():
        network.decoder[0][0].weight.fill_(math.nan)
    losses = network(torch.randn(1, 3, 64, 64), [objects((3, 3, 40, 40))])
    assert not sum(losses.values()).isfinite()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"coarsest": 64}, "coarsest is 64, but rt_detr has maps to 32"),
        ({"fpn_channels": 30}, "fpn_channels is 30: rt_detr needs a multiple of 4"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(UserError, match=message):
        small("rt_detr", **args)


@pytest.mark.parametrize(
    ("version", "message"), [(None, "or newer: pip install"), ("4.57.6", "or newer, but 4.57.6 is installed: pip")]
)
def test_a_missing_or_old_library_is_told_with_the_command(monkeypatch, version, message):
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(UserError, match=message) as error:
        small("d_fine")
    assert "d_fine needs transformers 5" in str(error.value)
    assert "pip install 'visionattn[detr]'" in str(error.value)
