"""Signs of collapse and probes against scikit-learn and brute force."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from visionattn.tasks.pretraining.metrics import collapsed, colour_numbers, knn, linear, nearest, score, signs

RNG = np.random.default_rng(0)


def features(count: int, classes: int = 3, width: int = 6) -> tuple[torch.Tensor, np.ndarray]:
    labels = RNG.integers(0, classes, count)
    values = RNG.normal(size=(count, width)) + 2 * np.eye(classes, width)[labels]
    return torch.from_numpy(values).float(), np.eye(classes)[labels]


def test_signs_are_those_of_their_definitions():
    x, _ = features(40)
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    pairs = [float(unit[i] @ unit[j]) for i in range(40) for j in range(40) if i != j]
    found = signs(x)
    assert found["cosine"] == pytest.approx(np.mean(pairs))
    assert found["spread"] == pytest.approx(np.sqrt(6) * unit.std(0, unbiased=False).mean().item())
    singular = np.linalg.svd(x.numpy().astype(float), compute_uv=False)
    shares = singular / singular.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_collapse_is_told_and_sound_features_are_not():
    assert collapsed(signs(torch.randn(100, 16)), 1.0) == []
    spread, cosine = collapsed(signs(torch.ones(100, 16) + 1e-3 * torch.randn(100, 16)), 1.0)
    assert "spread" in spread
    assert "mean cosine" in cosine
    assert collapsed({"ratio": 0.99}, 0.05) == []
    assert "0.99 of the error of the mean" in collapsed({"ratio": 0.99}, 0.2)[0]


def test_probes_are_those_of_scikit_learn():
    (bank, labels), (told, truth) = features(90), features(60)
    scale = StandardScaler().fit(bank.double().numpy())
    model = LogisticRegression(max_iter=500).fit(scale.transform(bank.double().numpy()), labels.argmax(1))
    expected = model.predict_proba(scale.transform(told.double().numpy()))
    np.testing.assert_allclose(linear(bank, labels, told), expected, atol=1e-4)
    assert np.array_equal(linear(bank, labels, told), linear(bank, labels, told))
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(bank.numpy(), labels.argmax(1))
    np.testing.assert_allclose(knn(bank, labels, told), neighbours.predict_proba(told.numpy()), atol=1e-4)
    assert score(expected, truth) == (expected.argmax(1) == truth.argmax(1)).mean()


def test_several_labels_are_scored_by_their_area():
    bank, labels = features(90)
    several = np.stack([labels[:, 0], labels[:, 1] + labels[:, 2], np.zeros(90)], 1)
    several[:5] = 1
    probabilities = linear(bank, several, bank)
    assert probabilities.shape == (90, 3)
    assert score(probabilities, several) > 0.8


def test_neighbours_leave_the_query_out():
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert nearest(x, [0, 2], 1) == [[1], [3]]


def test_colours_are_seven_numbers_a_channel():
    images = torch.randn(2, 3, 8, 8)
    numbers = colour_numbers(images)
    assert numbers.shape == (2, 21)
    torch.testing.assert_close(numbers[:, :3], images.mean((2, 3)))
    torch.testing.assert_close(numbers[:, 12:15], images.flatten(2).quantile(0.5, 2))
