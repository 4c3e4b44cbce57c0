"""What `visionattn check` says of images without labels, beside what it says of all data."""

from visionattn.data.sample import Dataset, cases
from visionattn.errors import listed
from visionattn.tasks.pretraining.probe import trained_on
from visionattn.tasks.pretraining.recipe import Recipe

__all__ = ["findings"]

MOSTLY_MISSING = 0.5


def findings(dataset: Dataset, spec: Recipe) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows of the table (a title and a text for each split; the first is the heading), problems and notes."""
    rows = [["images without labels", *dataset.splits]]
    rows.append(["cases", *(str(len(cases(samples))) for samples in dataset.splits.values())])
    height, width = spec.data.side
    notes = []
    for name, samples in dataset.splits.items():
        pairs = list(zip(samples, dataset.readings[name], strict=True))
        small = [s.name for s, r in pairs if r.sound and (r.size[0] < height or r.size[1] < width)]
        missing = [s.name for s, r in pairs if r.missing > MOSTLY_MISSING]
        texts = {
            f"{name} images are smaller than data.image_size": small,
            f"{name} images have values in less than half of their pixels": missing,
        }
        notes += [f"{len(names)} {text}: {listed(names, most=8)}" for text, names in texts.items() if names]
    return rows, [], notes + trained_on(spec, dataset)
