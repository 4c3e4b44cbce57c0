"""Deterministic training on CUDA: no loss and no decoder uses an operator that has no such form; encoders are told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import UserError
from visionattn.models.determinism import Used, refuse_nondeterministic
from visionattn.models.segmenters import DECODERS, AveragePool, make_segmenter
from visionattn.tasks.segmentation.losses import LOSSES, make_loss
from visionattn.tasks.segmentation.metrics import calibration, count_pixels


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_has_a_deterministic_gradient(decoder):
    network = make_segmenter("test_resnet", decoder, 3)
    refuse_nondeterministic(network, "test_resnet", (3, 64, 96), 2)
    assert all(parameter.grad is not None for parameter in network.encoder.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_deterministic_gradient(loss):
    logits = [torch.randn(2, 3, 8, 8, requires_grad=True) for _ in range(2)]
    with Used() as operators:
        make_loss(loss, 3)(logits, torch.randint(0, 3, (2, 8, 8))).backward()
    assert not operators.found


def test_what_is_counted_for_metrics_is_deterministic():
    truth = torch.randint(0, 3, (8, 8))
    probabilities = torch.rand(3, 8, 8).softmax(0)
    with Used() as operators:
        count_pixels(probabilities.argmax(0), truth, 3)
        calibration(probabilities, truth)
    assert not operators.found


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 3, 4, 4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + F.interpolate(self.table, image.shape[2:], mode="bicubic")


def test_a_network_that_cannot_be_trained_so_is_refused_by_name():
    with pytest.raises(UserError, match=r"the gradient of bicubic resizing in model mine on images of 3 x 8 x 9 .*GPU"):
        refuse_nondeterministic(Resized(), "mine", (3, 8, 9), 2)
    with Used() as operators:
        torch.bincount(torch.tensor([1, 2]), torch.tensor([0.5, 0.5]))
        F.cross_entropy(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4).long())
    assert operators.found == {"weighted counts", "the loss of maps"}


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (4, 3), (13, 1)])
def test_the_pooling_of_upernet_is_pytorchs(size):
    for side in (1, 2, 3, 6):
        x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(AveragePool(side)(x), F.adaptive_avg_pool2d(x, side))
        torch.testing.assert_close(
            *(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (AveragePool(side), nn.AdaptiveAvgPool2d(side)))
        )
