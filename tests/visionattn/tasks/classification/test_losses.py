"""Losses of classification against their definitions."""

import pytest
import torch
from torch.testing import assert_close

from visionattn.tasks.classification.losses import ClassificationLoss, distillation


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


@pytest.mark.parametrize("several", [False, True])
def test_distillation_is_the_divergence_of_softened_answers(several):
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    softened = [torch.sigmoid(x / 3) if several else torch.softmax(x / 3, 1) for x in (student, teacher)]
    own, theirs = ([p, 1 - p] if several else [p] for p in softened)
    divergence = sum((q * (q.log() - p.log())) for p, q in zip(own, theirs, strict=True))
    expected = 9 * (divergence.mean() if several else divergence.sum(1).mean())
    assert_close(distillation(student, teacher, 3.0, several).double(), expected, rtol=1e-5, atol=1e-7)
    assert distillation(teacher, teacher, 3.0, several).abs() < 1e-6
