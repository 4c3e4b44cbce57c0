"""What exported detectors compute is what the detectors find, of padded images too."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from visionattn.models.detectors import make_detector
from visionattn.tasks.detection.graphs import GRAPHS

SMALL = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def graph_of(detector: str):
    torch.manual_seed(0)
    queries = {"layers": 2, "queries": 30} if detector in ("rt_detr", "d_fine") else {}
    args = {"fpn_channels": 32, **queries}
    network = make_detector("biformer_tiny", detector, 3, args=SMALL, detector_args=args).eval()
    if not queries:  # an untrained one is unsure of all
        network.head.regions.box_predictor.cls_score.weight.data.mul_(30)
    kind = next(kind for head, kind in GRAPHS.items() if isinstance(network.head, head))
    return kind(network, MEAN, STD).eval()


@torch.no_grad()
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_regions_of_padded_images_are_those_of_the_images(detector):
    graph, images = graph_of(detector), torch.rand(2, 3, 64, 96)
    images[1, :, 50:] = images[1, :, :, 80:] = torch.tensor(MEAN)[:, None, None]
    normalised = graph.normalised(images)
    found = graph.network([normalised[0], normalised[1, :, :50, :80]])
    outputs = dict(zip(graph.OUTPUTS, graph(images), strict=True))
    for i, expected in enumerate(found):
        scores, labels = outputs["probabilities"][i].max(-1)
        count = int((scores > 0).sum())
        assert count == len(expected.scores) > 0
        assert_close(scores[:count], expected.scores)
        assert_close(labels[:count], expected.labels)
        assert_close(outputs["boxes"][i, :count], expected.xyxy)
        assert not outputs["boxes"][i, count:].any()
        if expected.masks is not None:
            assert_close(outputs["masks"][i, :count], expected.masks)


@torch.no_grad()
@pytest.mark.parametrize("detector", ["rt_detr", "d_fine"])
def test_queries_are_those_of_the_detector_in_any_order(detector):
    graph, images = graph_of(detector), torch.rand(2, 3, 64, 96)
    outputs = [output.numpy() for output in graph(images)]
    found = graph.network(graph.normalised(images))
    for probabilities, boxes, expected in zip(*outputs[:2], found, strict=True):
        there = graph.network.head._found(torch.from_numpy(probabilities), torch.from_numpy(boxes), (64, 96))
        assert_close(there.xyxy, expected.xyxy)
        assert_close(there.scores, expected.scores)
    order = np.random.default_rng(0).permutation(30)
    shuffled = [output[:, order] for output in outputs]
    for one, other in zip(graph.matched(shuffled, outputs), outputs, strict=True):
        np.testing.assert_array_equal(one, other)
