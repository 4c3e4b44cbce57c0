"""Losses of classification against their definitions."""

import torch

from visionattn.tasks.classification.losses import ClassificationLoss


def test_losses_follow_their_definitions():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    nll = -(logits.log_softmax(1) * one_hot).sum(1)
    w = weights[labels]
    assert torch.allclose(
        ClassificationLoss("cross_entropy", 3, weights=weights)(logits, labels), (nll * w).sum() / w.sum()
    )
    p = logits.sigmoid()
    p_true = torch.where(one_hot == 1, p, 1 - p)
    focal = ((1 - p_true) ** 2 * -p_true.log()).sum(1).mean()
    assert torch.allclose(ClassificationLoss("focal", 3)(logits, labels), focal)
    assert torch.allclose(ClassificationLoss("focal", 3, gamma=0.0)(logits, one_hot), -p_true.log().sum(1).mean())
    smooth = one_hot * 0.8 + 0.1
    bce = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean()
    assert torch.allclose(ClassificationLoss("bce", 3, label_smoothing=0.2)(logits, labels), bce)
