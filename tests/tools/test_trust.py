"""What is measured of a map before it is trusted, against scipy."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from visionattn.tasks.targets import Seen
from visionattn.tools.trust import checks_of


def checked(values: Tensor, other: Tensor) -> dict:
    """A map whose method says `other` of any changed image and of any network."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2))

    def logit(images: Tensor) -> Tensor:
        return network(images)[:, 0]

    image = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    seen = Seen(image, (0, 0, 12, 12), logit, lambda images: logit(images).sigmoid(), "a class")
    return checks_of(network, seen, values, lambda image: other, {})


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_correlations_are_spearmans_also_of_equal_values(levels):
    """As where a map is 0 in most places."""
    draw = torch.Generator().manual_seed(levels)
    values, other = torch.randint(levels, (2, 6, 6), generator=draw).float()
    found = checked(values, other)
    expected = pytest.approx(spearmanr(values.flatten(), other.flatten()).statistic, abs=1e-12)
    assert [found[name] for name in ("stability", "shuffled_head", "shuffled_all")] == [expected] * 3


def test_a_map_that_is_the_same_everywhere_is_not_said_to_be_that_of_other_weights():
    found = checked(torch.zeros(6, 6), torch.zeros(6, 6))
    assert found["stability"] == found["shuffled_head"] == found["shuffled_all"] == 0
    assert "depend" not in found["verdict"]
