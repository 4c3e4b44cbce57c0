"""How much a few labels are worth on frozen features, beside what they are worth without any pretraining."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionattn.data import formats
from visionattn.data.loaders import make_loader
from visionattn.data.sample import Dataset, Sample
from visionattn.data.splits import split
from visionattn.data.survey import mean_std, read_through, usable
from visionattn.errors import UserError, listed
from visionattn.models.pretrainers import Pretrainer
from visionattn.tasks.pretraining import metrics
from visionattn.tasks.pretraining.recipe import Recipe
from visionattn.tasks.pretraining.transforms import Whole

__all__ = ["Probe", "trained_on"]

MOST = 10_000  # images of the bank


def trained_on(spec: Recipe, dataset: Dataset) -> list[str]:
    """A line where the probe tells images that the network learns from, without their labels."""
    if (section := spec.probe) is None or not dataset.readings:
        return []
    samples, classes, _ = formats.find(section)
    told = split(samples, classes, section)[0].splits["val"]
    read = read_through(Dataset(classes, {"val": told}), section.survey, section.split_seed).readings["val"]
    seen = {reading.image for reading in dataset.readings["train"] if reading.sound}
    count = len({reading.image for reading in read if reading.sound} & seen)
    text = "of the images that the probe tells are trained on without labels: it says too much of others"
    return [f"{count} {text}"] if count else []


class Probe:
    """Labelled images: those of train are the bank, those of val are told by it.

    Args:
        spec: the resolved recipe, with a probe.
        looked_at: its images are read through, so that what cannot be used is told.

    Raises:
        UserError: images of another kind than those that are trained on, or that cannot be used.
    """

    def __init__(self, spec: Recipe, looked_at: bool) -> None:
        section, data = spec.probe, spec.data
        assert section is not None
        self.every, self.batch_size = section.every, section.batch_size
        samples, classes, problems = formats.find(section)
        dataset, more = split(samples, classes, section)
        if problems := [*problems, *more]:
            raise UserError(f"probe: the data have problems:\n{listed(problems, chr(10))}")
        channels = len(data.mean)
        dataset = dataset.with_channels(channels)
        alike = formats.module_of(section).KIND.unit_range == formats.module_of(data).KIND.unit_range
        mean, std = section.mean or data.mean, section.std or data.std
        if looked_at:
            dataset = usable(read_through(dataset, section.survey, section.split_seed), section.skip_bad)
            if not alike and section.mean is None:
                mean, std = (values.tolist() for values in mean_std(dataset.readings["train"]))
        if len(mean) != channels:
            raise UserError(f"probe: images of {len(mean)} channels, but {channels} are trained on")
        self.classes = classes
        self.bank, self.told = dataset.splits["train"][:MOST], dataset.splits["val"][:MOST]
        side = data.side if section.image_size is None else section.side
        self.sets = [Whole(part, side, mean, std) for part in (self.bank, self.told)]
        self.labels = [_one_hot(part, len(classes)) for part in (self.bank, self.told)]

    def of(self, network: Pretrainer, device: torch.device) -> dict[str, float]:
        """Metrics `linear` and `knn` of the last features, with `_all` of all stages together."""
        network.eval()
        with network.cleaned():
            of_sets = [self._features(part, lambda x: network.encoder.pooled(x)[:2], device) for part in self.sets]
        last, every = zip(*of_sets, strict=True)
        return self._scores(last, "") | self._scores(every, "_all")

    def baselines(self, network: Pretrainer, device: torch.device) -> dict[str, dict[str, float]]:
        """The same of other features, by what they are called.

        Args:
            network: one that has learned nothing.
        """
        network.clean_up(batch["image"].to(device) for batch in self._batches(self.sets[0]))
        (bank,), (told,) = (
            self._features(x, lambda image: (metrics.colour_numbers(image),), device) for x in self.sets
        )
        usual = np.tile(self.labels[0].mean(0), (len(self.told), 1))
        return {
            "random weights of the same network": self.of(network, device),
            "colour statistics": self._scores((bank, told), ""),
            "majority": {"linear": metrics.score(usual, self.labels[1])},
        }

    def _scores(self, features: Sequence[Tensor], suffix: str) -> dict[str, float]:
        (bank, told), (labels, truth) = features, self.labels
        methods = {"linear": metrics.linear, "knn": metrics.knn}
        return {f"{name}{suffix}": metrics.score(f(bank, labels, told), truth) for name, f in methods.items()}

    def _batches(self, part: Whole) -> Any:
        return make_loader(part, self.batch_size, 0)

    @torch.no_grad()
    def _features(self, part: Whole, of: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device) -> list[Tensor]:
        """What `of` gives of batches of images, in float32, joined."""
        with torch.autocast(device.type, enabled=False):
            made = [of(batch["image"].to(device)) for batch in self._batches(part)]
        return [torch.cat(parts).float().cpu() for parts in zip(*made, strict=True)]


def _one_hot(samples: Sequence[Sample], classes: int) -> np.ndarray:
    """(N, K) of 0 and 1."""
    labels = np.array([sample.label for sample in samples])
    return labels if labels.ndim == 2 else np.eye(classes, dtype=np.float32)[labels]
