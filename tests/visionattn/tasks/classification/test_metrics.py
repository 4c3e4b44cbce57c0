"""Metrics against scikit-learn, losses against their definitions."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from visionattn.tasks.classification.metrics import evaluate_predictions
from visionattn.tasks.classification.task import ClassificationLoss

CLASSES = [f"c{i}" for i in range(7)]


@pytest.fixture
def single():
    torch.manual_seed(0)
    labels = torch.randint(7, (200,))
    logits = torch.randn(200, 7) + 2 * torch.nn.functional.one_hot(labels, 7)
    return logits.softmax(-1), labels


@pytest.fixture
def several():
    torch.manual_seed(0)
    labels = (torch.rand(200, 7) < 0.3).float()
    return (torch.randn(200, 7) + labels).sigmoid(), labels


def test_single_label_metrics_agree_with_scikit_learn(single):
    probabilities, labels = single
    guess, p, y = probabilities.argmax(1).numpy(), probabilities.numpy(), labels.numpy()
    found = evaluate_predictions(probabilities, labels, CLASSES, resamples=0)
    one_hot = np.eye(7)[y]
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(one_hot, p, average="macro"),
        "top5": sk.top_k_accuracy_score(y, p, k=5),
    }
    assert {name: found["overall"][name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["confusion"] == sk.confusion_matrix(y, guess).tolist()
    for i, row in enumerate(found["per_class"]):
        assert row["support"] == (y == i).sum()
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(y == i, p[:, i]), abs=1e-5)
        assert row["precision"] == pytest.approx(sk.precision_score(y == i, guess == i), abs=1e-5)


def test_multi_label_metrics_agree_with_scikit_learn(several):
    probabilities, labels = several
    p, y, guess = probabilities.numpy(), labels.numpy(), (probabilities >= 0.5).numpy()
    found = evaluate_predictions(probabilities, labels, CLASSES, resamples=0)
    expected = {
        "accuracy": (guess == y).mean(),
        "f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "average_precision": sk.average_precision_score(y, p, average="macro"),
    }
    assert {name: found["overall"][name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["confusion"] == sk.multilabel_confusion_matrix(y, guess).tolist()


def test_the_interval_covers_the_headline_and_narrows_with_more_images(single):
    probabilities, labels = single
    wide = evaluate_predictions(probabilities[:50], labels[:50], CLASSES, 300)
    narrow = evaluate_predictions(probabilities, labels, CLASSES, 300)
    for found in (wide, narrow):
        assert found["interval"]["low"] <= found["overall"]["accuracy"] <= found["interval"]["high"]
    widths = [found["interval"]["high"] - found["interval"]["low"] for found in (wide, narrow)]
    assert widths[1] < widths[0]
    assert evaluate_predictions(probabilities, labels, CLASSES, 300)["interval"] == narrow["interval"]


def test_a_class_without_images_has_no_scores(single):
    probabilities, labels = single
    keep = labels != 3
    with pytest.warns(UserWarning, match="No positive samples|nan"):
        found = evaluate_predictions(probabilities[keep], labels[keep], CLASSES, 0)
    assert found["per_class"][3] == {"class": "c3", "support": 0} | dict.fromkeys(
        ["precision", "recall", "f1", "auroc", "average_precision"]
    )


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
