"""The losses of segmentation: their values, and that unlabelled pixels count for nothing."""

from itertools import combinations

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.tasks.segmentation.losses import LOSSES, balanced_weights, make_loss

CLASSES = 4
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def logits(height: int = 6, width: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, CLASSES, height, width, dtype=dtype, requires_grad=True)


def labels(height: int = 6, width: int = 7, ignored: float = 0.0, ignore_index: int = IGNORE) -> Tensor:
    """Random classes, a share of them ignored."""
    numbers = torch.randint(CLASSES, (2, height, width))
    return torch.where(torch.rand(numbers.shape) < ignored, ignore_index, numbers)


def certain(classes: Tensor, strength: float = 1e3) -> Tensor:
    """Logits of sure predictions of these classes (B, H, W)."""
    return strength * F.one_hot(classes, CLASSES).movedim(-1, 1).float()


# Unlabelled pixels


@every_loss
@pytest.mark.parametrize("ignore_index", [IGNORE, 0, -1])
def test_ignored_pixels_count_for_nothing(name, ignore_index):
    loss, x = make_loss(name, CLASSES, ignore_index=ignore_index), logits()
    truth = labels(ignored=0.4, ignore_index=ignore_index)
    ignored = truth == ignore_index
    value = loss(x, truth)
    (gradient,) = torch.autograd.grad(value, x)
    assert value > 0
    assert not gradient.movedim(1, -1)[ignored].any()
    for other in (torch.randn_like(x) * 100, torch.full_like(x, torch.nan), torch.full_like(x, torch.inf)):
        changed = torch.where(ignored[:, None], other, x).detach().requires_grad_()
        again = loss(changed, truth)
        assert_close(again, value, rtol=0, atol=0)
        assert_close(torch.autograd.grad(again, changed)[0], gradient, rtol=0, atol=0)


@every_loss
def test_a_margin_of_ignored_pixels_changes_nothing(name):
    loss, x, truth = make_loss(name, CLASSES), logits(), labels()
    wider = F.pad(truth, (3, 2, 0, 4), value=IGNORE)
    assert_close(loss(F.pad(x, (3, 2, 0, 4), value=7.0), wider), loss(x, truth))


@every_loss
@pytest.mark.parametrize("heads", [1, 4])
def test_nothing_labelled(name, heads):
    """No loss and no gradient, but a finite one: the step is harmless."""
    outputs = [logits() for _ in range(heads)]
    value = make_loss(name, CLASSES)(outputs, torch.full((2, 6, 7), IGNORE))
    assert value == 0
    value.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in outputs)


@every_loss
def test_one_labelled_pixel(name):
    truth = torch.full((2, 6, 7), IGNORE)
    truth[1, 2, 3] = 1
    x = logits()
    make_loss(name, CLASSES)(x, truth).backward()
    assert x.grad.isfinite().all()
    assert x.grad.flatten(2).any(1).sum() == 1


# Values


@every_loss
def test_gradients(name):
    loss, truth = make_loss(name, CLASSES, None if name == "lovasz" else [1.0, 2.0, 0.5, 1.5]), labels(2, 3, 0.2)
    assert torch.autograd.gradcheck(lambda x: loss(x, truth), logits(2, 3, torch.float64))


@every_loss
def test_nothing_depends_on_a_value_that_a_device_would_have_to_be_asked_for(name):
    """Tensors without values are enough."""
    x, truth = torch.randn(2, CLASSES, 6, 7, device="meta", requires_grad=True), labels(ignored=0.2).to("meta")
    make_loss(name, CLASSES)([x, x], truth).backward()


def test_lovasz_is_that_of_another_library():
    x, truth = logits(40, 50), labels(40, 50, ignored=0.3)
    theirs = smp.LovaszLoss("multiclass", ignore_index=IGNORE)(x, truth)
    ours = make_loss("lovasz", CLASSES)(x, truth)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)))


@every_loss
def test_right_predictions_cost_nothing_and_wrong_ones_much(name):
    loss, truth = make_loss(name, CLASSES), labels()
    assert loss(certain(truth), truth) == pytest.approx(0, abs=1e-4)
    assert loss(certain((truth + 1) % CLASSES), truth) > 0.5


@every_loss
def test_descent_finds_the_labels(name):
    loss, x, truth = make_loss(name, CLASSES), logits(), labels(ignored=0.2)
    optimizer = torch.optim.Adam([x], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(x, truth).backward()
        optimizer.step()
    assert torch.equal(x.argmax(1)[truth != IGNORE], truth[truth != IGNORE])


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 4.0]])
def test_cross_entropy(weights):
    x, truth = logits(), labels(ignored=0.3)
    tensor = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(x, truth, tensor, ignore_index=IGNORE)
    assert_close(make_loss("ce", CLASSES, weights)(x, truth), expected)
    assert_close(make_loss("focal", CLASSES, weights, gamma=0)(x, truth), expected)


def test_focal():
    x, truth = logits(), labels()
    p = x.softmax(1).gather(1, truth[:, None])
    assert_close(make_loss("focal", CLASSES, gamma=1.5)(x, truth), (-((1 - p) ** 1.5) * p.log()).mean())


def test_focal_of_sure_pixels_has_a_gradient():
    truth = labels()
    x = certain(truth).requires_grad_()
    make_loss("focal", CLASSES, gamma=0.5)(x, truth).backward()
    assert x.grad.isfinite().all()


def scores(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each class that are right, predicted too much, and missed."""
    p, t = F.one_hot(predicted, CLASSES).flatten(0, 2).float(), F.one_hot(truth, CLASSES).flatten(0, 2).float()
    return (p * t).sum(0), (p * (1 - t)).sum(0), ((1 - p) * t).sum(0)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("dice", lambda right, over, missed: 2 * right / (2 * right + over + missed)),
        ("tversky", lambda right, over, missed: right / (right + 0.3 * over + 0.7 * missed)),
        ("lovasz", lambda right, over, missed: right / (right + over + missed)),
    ],
)
def test_regions_of_sure_predictions(name, score):
    """Where predictions are sure, these losses are one minus the mean score over the classes."""
    predicted, truth = labels(), labels()
    expected = 1 - score(*scores(predicted, truth)).mean()
    assert_close(make_loss(name, CLASSES)(certain(predicted), truth), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz", "boundary"])
def test_classes_without_pixels_do_not_count(name):
    truth = labels().clamp(max=1)
    assert make_loss(name, CLASSES)(certain(truth), truth) == pytest.approx(0, abs=1e-4)


REGIONS = ["dice", "tversky", "lovasz", "dice_ce", "mutation", "boundary"]


def region_loss(name: str, classes: int, **settings) -> nn.Module:
    """A loss, or the part of it that counts regions."""
    alone = {"ce_weight": 0.0, "dice_weight": 1.0} if name in ("dice_ce", "mutation") else {}
    return make_loss(name, classes, **alone | settings)


@pytest.mark.parametrize("name", [name for name in REGIONS if name != "boundary"])  # which has cross-entropy in it
def test_a_wholly_wrong_prediction_costs_1_however_many_classes_are_absent(name):
    truth = labels().clamp(max=1)  # 2 of 10 classes
    wrong = 1e3 * F.one_hot(1 - truth, 10).movedim(-1, 1).float()
    assert region_loss(name, 10)(wrong, truth) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", REGIONS)
def test_absent_classes_with_no_probability_change_nothing(name):
    x, truth = torch.randn(2, 2, 6, 7), labels(ignored=0.2)
    truth = torch.where(truth == IGNORE, truth, truth.clamp(max=1))
    wider = F.pad(x, (0, 0, 0, 0, 0, 8), value=-1e4)
    assert_close(region_loss(name, 10)(wider, truth), region_loss(name, 2)(x, truth))


@pytest.mark.parametrize("name", ["dice", "dice_ce", "mutation"])
def test_dice_of_two_of_four_classes_by_hand(name):
    """Three pixels of the classes 0, 0, 2 with probabilities (1/2, 0, 1/2, 0), (1, 0, 0, 0), (1/4, 1/4, 1/4, 1/4).

    Class 0: 2 x 1.5 / (1.75 + 2) = 0.8; class 2: 2 x 0.25 / (0.75 + 1) = 2/7; the others have no pixels.
    """
    p = torch.tensor([[0.5, 0, 0.5, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    x, truth = p.clamp_min(1e-12).log().T[None, :, None], torch.tensor([[[0, 0, 2]]])
    assert region_loss(name, 4)(x, truth) == pytest.approx(1 - (0.8 + 2 / 7) / 2, abs=1e-6)


@pytest.mark.parametrize(("name", "alpha"), [("dice", 0.5), ("tversky", 0.3)])
def test_weights_of_absent_classes_do_not_count(name, alpha):
    """Scores by hand as above, with weights 1 and 3 of the classes that have pixels."""
    p = torch.tensor([[0.5, 0, 0.5, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    x, truth = p.clamp_min(1e-12).log().T[None, :, None], torch.tensor([[[0, 0, 2]]])
    first = 1.5 / (1.5 + alpha * 0.25 + (1 - alpha) * 0.5)
    third = 0.25 / (0.25 + alpha * 0.5 + (1 - alpha) * 0.75)
    loss = make_loss(name, 4, [1.0, 50.0, 3.0, 70.0], alpha=0.3)
    assert loss(x, truth) == pytest.approx(1 - (first + 3 * third) / 4, abs=1e-6)


def test_dice_and_cross_entropy():
    x, truth, weights = logits(), labels(ignored=0.3), [0.5, 1.0, 2.0, 4.0]
    parts = 0.3 * make_loss("ce", CLASSES, weights)(x, truth) + 0.7 * make_loss("dice", CLASSES)(x, truth)
    assert_close(make_loss("dice_ce", CLASSES, weights, ce_weight=0.3, dice_weight=0.7)(x, truth), parts)


def test_weighted_dice():
    x, truth, weights = logits(), labels(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    p, t = x.softmax(1).movedim(1, -1).flatten(0, 2), F.one_hot(truth, CLASSES).flatten(0, 2)
    dice = 1 - 2 * (p * t).sum(0) / (p + t).sum(0)
    assert_close(make_loss("dice", CLASSES, weights.tolist())(x, truth), (dice * weights).sum() / weights.sum())


def test_boundary_weighs_borders():
    """A pixel's weight is 1 + 5 x the share of another class among the labelled pixels of the 31 x 31 around it."""
    truth = torch.zeros(1, 40, 50, dtype=torch.long)
    truth[:, :, 20:] = 1
    truth[:, 30:, :] = IGNORE
    weights = torch.zeros(truth.shape)
    for i in range(40):
        for j in range(50):
            around = truth[0, max(i - 15, 0) : i + 16, max(j - 15, 0) : j + 16]
            around = around[around != IGNORE]
            weights[0, i, j] = 1 + 5 * (around != truth[0, i, j]).float().mean()
    labelled = truth != IGNORE
    assert weights[labelled].min() == 1
    assert weights[labelled].max() > 3
    x = torch.randn(1, 2, 40, 50)
    entropy = F.cross_entropy(x, truth, reduction="none", ignore_index=IGNORE)[labelled]
    p, t = x.softmax(1).movedim(1, -1)[labelled], F.one_hot(truth[labelled], 2)
    w = weights[labelled]
    iou = (w @ (p * t)) / (w @ (p + t - p * t))
    assert_close(make_loss("boundary", 2)(x, truth), (w * entropy).sum() / w.sum() + 1 - iou.mean())


# Several outputs


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mutation"])
def test_outputs_are_supervised_one_by_one(name):
    outputs, truth, loss = [logits() for _ in range(3)], labels(ignored=0.2), make_loss(name, CLASSES)
    assert_close(loss(outputs, truth), sum(loss(x, truth) for x in outputs))


def test_mutation_supervises_every_sum_of_outputs():
    outputs, truth = [logits() for _ in range(4)], labels(ignored=0.2)
    weights = {"ce_weight": 0.3, "dice_weight": 0.7}
    single = make_loss("dice_ce", CLASSES, **weights)
    sums = [torch.stack(subset).sum(0) for size in (1, 2, 3, 4) for subset in combinations(outputs, size)]
    assert len(sums) == 15
    mutation = make_loss("mutation", CLASSES, **weights)
    assert_close(mutation(outputs, truth), sum(single(x, truth) for x in sums))
    assert_close(mutation(outputs[0], truth), single(outputs[0], truth))


# Precision, types, mistakes


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_summed_in_float32(name, dtype):
    loss, x, truth = make_loss(name, CLASSES), logits().to(dtype), labels(ignored=0.2)
    with torch.autocast("cpu", dtype):
        value = loss(x, truth)
    assert value.dtype == torch.float32
    assert_close(value, loss(x.float(), truth))


def test_class_weights_in_a_model_of_half_precision():
    loss, x, truth = make_loss("dice_ce", CLASSES, [1.0, 2.0, 0.5, 4.0]), logits(), labels()
    assert_close(loss.to(torch.bfloat16)(x, truth), make_loss("dice_ce", CLASSES, [1.0, 2.0, 0.5, 4.0])(x, truth))


def test_masks_as_bytes():
    x, truth = logits(), labels(ignored=0.3)
    assert_close(make_loss("dice_ce", CLASSES)(x, truth.to(torch.uint8)), make_loss("dice_ce", CLASSES)(x, truth))


def test_balanced_weights():
    pixels = [700, 200, 0, 100]
    weights = balanced_weights(pixels)
    assert weights[2] == 1
    assert sum(w * n for w, n in zip(weights, pixels, strict=True)) == pytest.approx(sum(pixels))
    assert weights[0] * 700 == pytest.approx(weights[1] * 200) == pytest.approx(weights[3] * 100)
    with pytest.raises(UserError, match="have none"):
        balanced_weights([0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dise"}, "'dise' is unknown; did you mean dice"),
        ({"name": "ce", "class_weights": [1.0, 2.0]}, "2 numbers, expected one for each of 4"),
        ({"name": "ce", "class_weights": [1.0, 2.0, 3.0, -1.0]}, "expected positive numbers"),
        ({"name": "lovasz", "class_weights": [1.0] * 4}, "lovasz takes no class_weights"),
        ({"name": "tversky", "alpha": 1.5}, "alpha is 1.5: expected 0 to 1"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_loss(num_classes=CLASSES, **arguments)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 7\) and labels of shape \(2, 7, 6\)"):
        make_loss("ce", CLASSES)(logits(), labels(7, 6))
