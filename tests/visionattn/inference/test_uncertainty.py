"""What is fitted about probabilities: right temperatures, promises that are kept, disagreement as it is defined."""

import numpy as np
import pytest
import torch
from scipy import stats

from visionattn.errors import UserError
from visionattn.inference.uncertainty import (
    cases_needed,
    disagreement,
    distance_to,
    entropy,
    fit_temperature,
    least_of_sets,
    one_of_each_group,
    risk_coverage,
    tempered,
    threshold_of_cases,
)


def drawn(rng: np.random.Generator, count: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (count, 4) whose logits are `sharpness` times the right ones, and classes drawn by these."""
    logits = rng.normal(0, 1.5, (count, 4))
    right = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = (right.cumsum(1) > rng.random((count, 1))).argmax(1)
    believed = np.exp(sharpness * logits)
    return believed / believed.sum(1, keepdims=True), classes


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_how_sharp_the_logits_were(sharpness):
    believed, classes = drawn(np.random.default_rng(0), 20_000, sharpness)
    found = fit_temperature(torch.from_numpy(believed), torch.from_numpy(classes), several=False)
    assert found == pytest.approx(sharpness, rel=0.05)


def test_the_temperature_of_several_labels_undoes_it_too():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, generator=generator)
    labels = (torch.rand(20_000, 3, generator=generator) < logits.sigmoid()).float()
    assert fit_temperature((2.5 * logits).sigmoid(), labels, several=True) == pytest.approx(2.5, rel=0.05)


def test_probabilities_of_a_temperature_are_those_of_divided_logits():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(tempered(logits.softmax(1), 1.7, False), (logits / 1.7).softmax(1))
    torch.testing.assert_close(tempered(logits.sigmoid(), 1.7, True), (logits / 1.7).sigmoid(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("images", "error"), [(50, 0.1), (200, 0.1), (100, 0.3), (19, 0.05)])
def test_sets_have_the_class_as_often_as_promised(images, error):
    rng, kept = np.random.default_rng(0), []
    for _ in range(300):
        believed, classes = drawn(rng, images + 500)
        of_truth = believed[np.arange(len(classes)), classes]
        kept.append((of_truth[images:] >= least_of_sets(of_truth[:images], error)).mean())
    assert 1 - error - 0.01 < np.mean(kept) < 1 - error + 1 / (images + 1) + 0.01


def test_too_few_images_promise_nothing():
    assert cases_needed(0.1) == 9
    assert least_of_sets(np.linspace(0.1, 0.9, 9), 0.1) == 0.1
    with pytest.raises(UserError, match=r"evaluate\.conformal is 0\.1: .*9 images .* there are 8"):
        least_of_sets(np.full(8, 0.5), 0.1)


def test_no_more_of_a_class_is_missed_than_promised():
    """Cases of different difficulty: the promise is about their mean."""
    rng, thresholds = np.random.default_rng(0), np.arange(100) / 100

    def missed(cases: int) -> np.ndarray:
        hardness = rng.beta(2, 4, (cases, 1))
        return np.clip(thresholds - 0.5 + hardness, 0, 1)

    means = []
    for _ in range(200):
        chosen = threshold_of_cases(missed(40), thresholds, 0.2)
        means.append(missed(200)[:, round(100 * chosen)].mean())
    assert 0.15 < np.mean(means) <= 0.2
    assert threshold_of_cases(np.ones((40, 100)), thresholds, 0.2) is None


def test_one_image_counts_of_a_group():
    groups = ["a", "b", "a", "a", "c", "b"]
    kept = [tuple(one_of_each_group(groups, seed)) for seed in range(20)]
    assert all(sorted(groups[i] for i in chosen) == ["a", "b", "c"] for chosen in kept)
    assert len(set(kept)) > 3


def test_disagreement_is_the_entropy_that_no_single_look_has():
    seen = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(2)
    expected = stats.entropy(seen.mean(0).numpy(), axis=1)
    np.testing.assert_allclose(entropy(seen.mean(0), several=False), expected, rtol=1e-5)
    apart = disagreement(seen, several=False)
    np.testing.assert_allclose(apart, expected - stats.entropy(seen.numpy(), axis=2).mean(0), atol=1e-6)
    assert disagreement(seen[:1].expand(4, -1, -1), several=False).abs().max() < 1e-6
    assert disagreement(torch.rand(2, 1, 3, 8, 8).softmax(2), several=False).shape == (1, 8, 8)
    labels = torch.tensor([[[0.3, 0.9]]])
    both = stats.entropy([0.3, 0.7]) + stats.entropy([0.9, 0.1])
    assert entropy(labels[0], several=True).item() == pytest.approx(both, rel=1e-5)


def test_images_far_from_all_others_are_told():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(200, 8, generator=generator).abs()
    alike = torch.randn(50, 8, generator=generator).abs()
    assert (distance_to(bank, -alike) > distance_to(bank, alike).max()).all()


def test_risk_is_what_is_wrong_among_the_surest():
    coverage, risk, area = risk_coverage(np.array([0.9, 0.5, 0.8, 0.6]), np.array([False, True, False, True]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == [0, 0, pytest.approx(1 / 3), 0.5]
    assert area == pytest.approx((1 / 3 + 0.5) / 4)
