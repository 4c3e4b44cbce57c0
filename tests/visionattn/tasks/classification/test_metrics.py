"""Metrics against scikit-learn: their values, what they leave out, and their intervals."""

import csv
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.classification import metrics
from visionattn.tasks.classification.evaluation import measure
from visionattn.tasks.classification.labels import MultiLabel, SingleLabel
from visionattn.tasks.classification.recipe import DATA, Recipe
from visionattn.tasks.classification.task import resolve

CLASSES = [f"c{i}" for i in range(7)]
OF_CLASSES = ["balanced_accuracy", "f1", "auroc", "average_precision"]


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


def measured(probabilities: Tensor, labels: Tensor, resamples: int = 0) -> Evaluation:
    """What a run reports of these predictions."""
    classes = CLASSES[: probabilities.shape[1]]
    keys = {"format": "folder", "root": "x", "classes": classes, "multi_label": labels.ndim == 2}
    evaluate = {"bootstrap": resamples}
    spec = Recipe(task="classification", model={"name": "m"}, data=DATA["folder"](**keys), evaluate=evaluate)
    samples = [PlainSample(str(i), str(i), str(i), label=label.numpy()) for i, label in enumerate(labels)]
    return measure([Prediction(i, p) for i, p in enumerate(probabilities.numpy())], samples, spec, "val")


class PlainSample(Sample):
    """A sample whose picture does not matter."""

    def image(self, window=None):
        return np.zeros((1, 2, 2), np.uint8)


def test_single_label_metrics_agree_with_scikit_learn(single):
    probabilities, labels = single
    guess, p, y = probabilities.argmax(1).numpy(), probabilities.numpy(), labels.numpy()
    found = measured(probabilities, labels)
    one_hot = np.eye(7)[y]
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(one_hot, p, average="macro"),
        "top5": sk.top_k_accuracy_score(y, p, k=5),
        "loss": sk.log_loss(y, p),
    }
    assert {name: found.overall[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found.more["confusion"] == sk.confusion_matrix(y, guess).tolist()
    for i, row in enumerate(found.per_class):
        assert row["support"] == (y == i).sum()
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(y == i, p[:, i]), abs=1e-5)
        assert row["precision"] == pytest.approx(sk.precision_score(y == i, guess == i), abs=1e-5)
        assert row["recall"] == pytest.approx(sk.recall_score(y == i, guess == i), abs=1e-5)
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(y == i, p[:, i]), abs=1e-5)


def test_multi_label_metrics_agree_with_scikit_learn(several):
    probabilities, labels = several
    p, y, guess = probabilities.numpy(), labels.numpy(), (probabilities >= 0.5).numpy()
    found = measured(probabilities, labels)
    expected = {
        "accuracy": (guess == y).mean(),
        "balanced_accuracy": sk.recall_score(y, guess, average="macro"),
        "f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "average_precision": sk.average_precision_score(y, p, average="macro"),
        "loss": sk.log_loss(y.ravel(), p.ravel()),
    }
    assert {name: found.overall[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found.more["confusion"] == sk.multilabel_confusion_matrix(y, guess).tolist()


def test_the_interval_covers_the_headline_and_narrows_with_more_images(single):
    probabilities, labels = single
    found = {n: measured(probabilities[:n], labels[:n], 300) for n in (50, 200)}
    intervals = {n: evaluation.intervals["accuracy"] for n, evaluation in found.items()}
    for n, (low, high) in intervals.items():
        assert low <= found[n].overall["accuracy"] <= high
    widths = {n: high - low for n, (low, high) in intervals.items()}
    assert widths[200] < widths[50]
    assert measured(probabilities, labels, 300).intervals == found[200].intervals


def test_the_interval_is_that_of_the_binomial_distribution():
    """Of 100 images with 70 right ones the percentile bootstrap resamples a proportion."""
    labels = torch.zeros(100, dtype=torch.int64)
    probabilities = torch.eye(2)[[0] * 70 + [1] * 30]
    groups = list(map(str, range(100)))
    low, high = metrics.interval(probabilities, labels, groups, 4000)
    spread = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert (low, high) == pytest.approx((0.7 - spread, 0.7 + spread), abs=0.015)


def test_groups_are_drawn_whole_so_equal_copies_narrow_nothing():
    torch.manual_seed(0)
    labels = torch.randint(2, (30,))
    probabilities = torch.eye(2)[torch.where(torch.rand(30) < 0.7, labels, 1 - labels)]
    groups = [f"{i:02}" for i in range(30)]
    alone = metrics.interval(probabilities, labels, groups, 500)
    copied = metrics.interval(probabilities.repeat(4, 1), labels.repeat(4), groups * 4, 500)
    assert copied == pytest.approx(alone, abs=1e-6)
    assert metrics.interval(probabilities, labels, ["same"] * 30, 500) is None


def test_a_class_without_images_has_no_scores(single):
    probabilities, labels = single
    keep = labels != 3
    found = measured(probabilities[keep], labels[keep])
    assert found.per_class[3] == {"class": "c3", "support": 0} | dict.fromkeys(
        ["precision", "recall", "f1", "auroc", "average_precision"]
    )


def test_a_label_that_never_occurs_does_not_count():
    """A perfect model of three labels, of which the split has two."""
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).repeat(10, 1)
    found = measured(labels * 0.8 + 0.1, labels, 200)
    assert [found.overall[name] for name in OF_CLASSES] == [1.0, 1.0, 1.0, 1.0]
    assert found.intervals["auroc"] == [1.0, 1.0]
    assert found.more["measured"] == {name: [2, 3] for name in OF_CLASSES}


def test_a_label_that_is_rare_does_not_poison_the_interval():
    """Many resamples of 40 images leave the one image with the third label out."""
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).repeat(10, 1)
    labels[0, 2] = 1
    found = measured(labels * 0.8 + 0.1, labels, 200)
    assert found.intervals["auroc"] == [1.0, 1.0]


def test_a_label_that_all_images_have_has_no_auroc_but_a_recall():
    labels = torch.tensor([[1.0, 0], [1, 1]]).repeat(5, 1)
    found = measured(labels * 0.8 + 0.1, labels)
    assert [row["auroc"] for row in found.per_class] == [None, 1.0]
    assert [row["recall"] for row in found.per_class] == [1.0, 1.0]
    assert found.overall["auroc"] == 1.0
    assert found.more["measured"] == {
        "balanced_accuracy": [2, 2],
        "f1": [2, 2],
        "average_precision": [2, 2],
        "auroc": [1, 2],
    }


def test_an_error_towards_an_absent_class_is_that_error_only():
    """Two classes of a hundred images, one of which is taken for a third class."""
    labels = torch.tensor([0, 1]).repeat_interleave(100)
    guess = labels.clone()
    guess[0] = 2
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = sk.balanced_accuracy_score(labels, guess)
    assert expected == pytest.approx(0.995)
    found = measured(torch.eye(3)[guess], labels)
    assert found.overall["balanced_accuracy"] == pytest.approx(expected)
    assert found.overall["f1"] == pytest.approx(sk.f1_score(labels, guess, labels=[0, 1], average="macro"))


def test_means_leave_an_absent_class_out_as_scikit_learn_does_of_the_others(single):
    probabilities, labels = single
    keep, others = labels != 3, [0, 1, 2, 4, 5, 6]
    p, y = probabilities[keep].numpy(), labels[keep].numpy()
    found = measured(torch.from_numpy(p), torch.from_numpy(y), 200)
    expected = {
        "balanced_accuracy": sk.recall_score(y, p.argmax(1), labels=others, average="macro"),
        "f1": sk.f1_score(y, p.argmax(1), labels=others, average="macro"),
        "auroc": np.mean([sk.roc_auc_score(y == k, p[:, k]) for k in others]),
        "average_precision": np.mean([sk.average_precision_score(y == k, p[:, k]) for k in others]),
    }
    assert {name: found.overall[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found.more["measured"] == {name: [6, 7] for name in OF_CLASSES}


@pytest.mark.parametrize("kind", ["one class", "no label", "every label"])
def test_a_metric_that_no_class_allows_is_none(kind):
    labels = {
        "one class": torch.zeros(10, dtype=torch.int64),
        "no label": torch.zeros(10, 3),
        "every label": torch.ones(10, 3),
    }[kind]
    torch.manual_seed(0)
    found = measured(torch.rand(10, 3).softmax(1), labels, 50)
    assert found.overall["auroc"] is None
    assert ("auroc" in found.intervals) is False
    assert [found.overall[name] is None for name in OF_CLASSES] == [kind == "no label"] * 2 + [True, kind == "no label"]
    assert all(row["auroc"] is None for row in found.per_class)
    assert found.overall["accuracy"] is not None


def test_the_interval_of_auroc_is_that_of_resampled_images(several, monkeypatch):
    """With ties, and labels that some resamples lack: against scikit-learn, resample by resample."""
    probabilities, labels = (values[:20].clone() for values in several)
    probabilities = (probabilities * 8).round() / 8
    labels[:, 5:] = 0
    labels[0, 5] = 1
    p, y = probabilities.numpy(), labels.numpy()
    rng, values = np.random.default_rng(0), []
    for _ in range(100):
        rows = rng.integers(20, size=20)
        there = [k for k in range(7) if 0 < y[rows, k].sum() < 20]
        values.append(np.mean([sk.roc_auc_score(y[rows, k], p[rows, k]) for k in there]))
    expected = np.quantile(values, [0.025, 0.975])
    for at_once in (2**22, 60):  # weights at once
        monkeypatch.setattr(metrics, "AT_ONCE", at_once)
        groups = [f"{i:02}" for i in range(20)]
        assert metrics.interval(probabilities, labels, groups, 100) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("levels", [3, 1000])
def test_areas_are_scikit_learn_s_with_ties_too(levels):
    rng = np.random.default_rng(levels)
    scores = (rng.integers(levels, size=(500, 4)) / levels).astype(np.float32)
    labels = (rng.random((500, 4)) < [0.01, 0.3, 0.5, 0.97]).astype(np.float32)
    found = metrics.of_classes(torch.from_numpy(scores), torch.from_numpy(labels))
    for name, function in (("auroc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
        expected = [function(labels[:, k], scores[:, k]) for k in range(4)]
        assert found[name].tolist() == pytest.approx(expected, abs=1e-6)


def test_of_many_classes_the_likeliest_are_a_table_and_all_an_array(tmp_path):
    probabilities = torch.rand(6, 120, generator=torch.Generator().manual_seed(0)).softmax(1)
    classes = [f"c{i}" for i in range(120)]
    keys = {"format": "folder", "root": "x", "classes": classes, "multi_label": False}
    spec = Recipe(task="classification", model={"name": "m"}, data=DATA["folder"](**keys))
    samples = [PlainSample(str(i), str(i), str(i), label=i) for i in range(6)]
    found = measure([Prediction(i, p) for i, p in enumerate(probabilities.numpy())], samples, spec, "val")
    found.write(tmp_path / "val")
    assert np.array_equal(np.load(tmp_path / "val/probabilities.npy"), probabilities.numpy())
    with (tmp_path / "val/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, (values, places) in zip(rows, zip(*probabilities.topk(5), strict=True), strict=True):
        assert [row[f"top{n}"] for n in range(1, 6)] == [f"c{k}" for k in places.tolist()]
        assert [float(row[f"p{n}"]) for n in range(1, 6)] == pytest.approx(values.tolist(), abs=1e-6)
        assert row["predicted"] == row["top1"]


def test_metrics_of_an_epoch_are_those_of_its_images_without_what_cannot_be_measured(several):
    probabilities, labels = several
    labels = labels.clone()
    labels[:, 2] = 0
    scores = metrics.Scores()
    for part in range(0, 200, 70):
        scores.update(probabilities[part : part + 70], labels[part : part + 70])
    assert scores.compute() == metrics.overall(probabilities, labels, metrics.of_classes(probabilities, labels))
    scores.reset()
    scores.update(probabilities, torch.zeros(200, 7))
    assert set(scores.compute()) == {"accuracy", "calibration_error"}


@pytest.mark.parametrize("ranked", [False, True])
def test_of_very_many_probabilities_an_epoch_sorts_only_what_is_monitored(single, ranked, monkeypatch):
    monkeypatch.setattr(metrics, "SORTED", 100)
    scores = metrics.Scores(ranked)
    scores.update(*single)
    assert {"auroc", "average_precision"} <= set(scores.compute()) or not ranked
    assert {"accuracy", "f1", "balanced_accuracy"} <= set(scores.compute())
    assert ("auroc" in scores.compute()) == ranked


@pytest.mark.parametrize(
    ("validation", "monitor", "refusal"),
    [
        ([[0.0, 0], [0, 0]], None, "train.monitor: auroc cannot be measured"),
        ([[0.0, 0], [0, 0]], "f1", "train.monitor: f1 cannot be measured"),
        ([[1.0, 1], [1, 1]], None, "train.monitor: auroc cannot be measured"),
        ([[1.0, 1], [1, 1]], "f1", None),
        ([[0.0, 0], [0, 0]], "accuracy", None),
        ([[0.0, 1], [0, 0]], None, None),
    ],
)
def test_a_monitor_that_no_class_allows_is_refused_before_training(tmp_path, validation, monitor, refusal):
    from visionattn.data import formats
    from visionattn.data.splits import split

    images = np.zeros((2, 8, 8), np.uint8)
    arrays = {"train_images": images, "val_images": images, "train_labels": np.eye(2, dtype=int)}
    np.savez(tmp_path / "a.npz", **arrays, val_labels=np.array(validation, int))
    data = DATA["npz"](format="npz", root=tmp_path / "a.npz", batch_size=2)
    spec = Recipe(task="classification", model={"name": "m"}, data=data, train={"monitor": monitor})
    samples, classes, _ = formats.find(data)
    dataset, _ = split(samples, classes, data)
    if refusal is None:
        assert resolve(spec, dataset)[0].data.multi_label
    else:
        with pytest.raises(UserError, match=refusal):
            resolve(spec, dataset)


def test_probabilities_and_decisions_of_the_two_kinds():
    logits = torch.tensor([[1.0, -2.0, 3.0]])
    one, many = SingleLabel(CLASSES[:3]), MultiLabel(CLASSES[:3])
    assert one.probabilities(logits).sum().item() == pytest.approx(1)
    assert one.name(one.decided(one.probabilities(logits)[0].numpy())) == "c2"
    assert many.probabilities(logits)[0].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (1, -2, 3)])
    assert many.name(many.decided(many.probabilities(logits)[0].numpy())) == "c0;c2"
