"""Whether a map of what a prediction depends on deserves trust: against maps that never saw the network, and weights.

- Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421): the mean score while the pixels that a map says count
  most are blurred (low is good), or shown on the blurred image (high is good), a tenth of the pixels at a time. Alone
  they prove nothing, since edges that a filter finds do as well on some images; so what counts is how much better a
  map is than edges and than chance.
- Weights (Adebayo et al. 2018, arXiv 1810.03292): the rank correlation of the map with that of the same network with
  the weights of its classifier, or all weights, shuffled; the mean of three shuffles. Near 1 the map does not show what
  the network has learned.
- Stability: the same with noise of a hundredth of the image's standard deviation added to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.tasks.targets import Seen

__all__ = ["checks_of"]

STEPS = 10
BATCH = 4
SHUFFLES = 3  # of the weights: a map of a few values is alike by chance once
BLIND = 0.9  # rank correlation from which a map is the same with a shuffled classifier
UNLEARNED = 0.5  # and with all weights shuffled
NOISE = 0.01
WORTH = 0.02  # of deletion and insertion together: less is no difference


def checks_of(
    network: nn.Module, seen: Seen, values: Tensor, again: Callable[[Tensor], Tensor], cache: dict[str, float]
) -> dict[str, Any]:
    """What is measured of a map, by name; `verdict` says it in words.

    Args:
        seen: what the network is shown.
        values: the map (h, w) of it, of any size.
        again: makes the map of another image (C, h, w) in the same way.
        cache: what shuffled weights have shown, which is measured once.

    Returns:
        `deletion` and `insertion`; `_than_edges` and `_than_random`, by how much they are better (more is better);
        `stability`; `shuffled_head` and `shuffled_all`, rank correlations (less is better).
    """
    image, maps = seen.image, {"map": _fitted(values, seen.image)}
    generator = torch.Generator().manual_seed(0)
    maps |= {"edges": _edges(image), "random": torch.rand(image.shape[1:], generator=generator).to(image.device)}
    blurred = _blurred(image)
    deletion = {name: _curve(seen, order, image, blurred) for name, order in maps.items()}
    insertion = {name: _curve(seen, order, blurred, image) for name, order in maps.items()}
    found: dict[str, Any] = {"deletion": deletion["map"], "insertion": insertion["map"]}
    for name in ("edges", "random"):
        found[f"deletion_than_{name}"] = deletion[name] - deletion["map"]
        found[f"insertion_than_{name}"] = insertion["map"] - insertion[name]
    noise = torch.randn(image.shape, generator=generator).to(image) * NOISE * image.std()
    found["stability"] = _rank_correlation(values, again(image + noise))
    if not cache:
        head = getattr(network, "get_classifier", nn.Identity)()
        for name, part in (("shuffled_head", head), ("shuffled_all", network)):
            alike = []
            for seed in range(SHUFFLES):
                with _shuffled(part, seed):
                    alike.append(_rank_correlation(values, again(image)))
            cache[name] = sum(alike) / SHUFFLES
    return found | cache | {"verdict": _verdict(found | cache)}


def _verdict(found: dict[str, float]) -> str:
    if found["shuffled_head"] > BLIND:
        return "does not depend on the class"
    if found["shuffled_all"] > UNLEARNED:
        return "does not depend on what was learned"
    for name, words in (("edges", "no better than edges"), ("random", "no better than chance")):
        if found[f"deletion_than_{name}"] + found[f"insertion_than_{name}"] <= WORTH:
            return words
    return "passes"


def _curve(seen: Seen, order: Tensor, before: Tensor, after: Tensor) -> float:
    """The mean score while pixels go over from one image to the other, the largest of a map first."""
    places = order.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
    rank = rank.view(order.shape)
    scores = []
    with torch.no_grad():
        for shares in torch.linspace(0, 1, STEPS + 1).split(BATCH):
            images = torch.stack([torch.where(rank < share * rank.numel(), after, before) for share in shares.tolist()])
            scores += seen.score(images).tolist()
    return sum(scores) / len(scores)


def _fitted(values: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(values.detach().float()[None, None], image.shape[1:], mode="bilinear")[0, 0]


def _blurred(image: Tensor) -> Tensor:
    """By a Gaussian whose standard deviation is a sixteenth of the shorter side."""
    sigma = max(1.0, min(image.shape[1:]) / 16)
    reach = min(round(3 * sigma), min(image.shape[1:]) - 1)
    steps = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    x = F.pad(image[:, None], [reach] * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel[:, :, None]), kernel[..., None])
    return x[:, 0]


def _edges(image: Tensor) -> Tensor:
    """(h, w), the slope of the mean of the channels."""
    x = F.pad(image.mean(0)[None, None], [1] * 4, mode="replicate")
    down, right = x[..., 2:, 1:-1] - x[..., :-2, 1:-1], x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
    return torch.hypot(down, right)[0, 0]


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of maps of one size; 0 for one that is the same everywhere."""
    ranks = torch.stack([_ranks(x.detach().flatten()) for x in (one, other)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num(0).item()


def _ranks(values: Tensor) -> Tensor:
    """(n,) float64: the mean of their ranks for values that are equal."""
    _, kind, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts.double() / 2)[kind]


@contextmanager
def _shuffled(module: nn.Module, seed: int) -> Iterator[None]:
    """The numbers of each weight and bias in another order."""
    generator = torch.Generator().manual_seed(seed)
    kept = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    try:
        with torch.no_grad():
            for parameter, values in kept:
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                parameter.copy_(values.flatten()[order].view_as(values))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
