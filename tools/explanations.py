"""`visionattn explain` and `visionattn.explain`: maps of what a prediction depends on, in the pixels of its file."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visionattn.data.colors import displayed
from visionattn.data.images import SUFFIXES
from visionattn.data.sample import Sample, Window, cases, unit_range
from visionattn.errors import UserError, listed, nearest
from visionattn.recipe import part_of
from visionattn.runs.checkpoints import Trained
from visionattn.tasks.targets import Asked, Seen, class_of, mask_of
from visionattn.tools.attribution import METHODS, Answer, Question
from visionattn.tools.explained_files import coloured, save
from visionattn.tools.trust import checks_of

__all__ = ["DEFAULT", "Explanation", "Wanted", "explain", "explained"]

DEFAULT = ("layercam", "ig")
TAKERS = {"layer": ("layercam", "gradcam", "attention"), "query": ("attention",), "head": ("attention",)}


@dataclass(frozen=True)
class Wanted:
    """What is explained, and how.

    Attributes:
        methods: names of `visionattn.tools.attribution.METHODS`.
        target: "predicted", "label", or the name or number of a class.
        region: see `visionattn.tasks.targets.Asked`.
        layer: of CAM and attention; None: chosen by the method.
        query: X,Y of the file, the pixel whose attention is asked for; None: the middle of the region.
        head: of attention; None: their mean.
    """

    methods: Sequence[str] = DEFAULT
    target: str | int = "predicted"
    region: Any = None
    layer: str | None = None
    query: tuple[float, float] | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"method {method}: expected {listed(list(METHODS))}{nearest(method, METHODS)}")
        if not self.methods:
            raise UserError(f"no method, expected some of {listed(list(METHODS))}")
        for option, takers in TAKERS.items():
            if getattr(self, option) is not None and not set(takers) & set(self.methods):
                raise UserError(f"{option} is of {listed(list(takers))}, which is not among the methods asked for")


@dataclass(frozen=True, repr=False)
class Explanation:
    """What one prediction depends on.

    Attributes:
        name: of the image, of a volume with the number of the slice.
        map: (H, W) float32 in pixels of the file, 0 where the network was shown nothing. Of `ig`, `gradient` and
            `occlusion` signed: negative is evidence against. Of `attention` shares that add up to 1 - outside.
        method: how it was made.
        layer: that it is of; "" of the image itself.
        target: what is explained, in words.
        score: of the target, in 0..1.
        outside: share of attention that left the picture; None where none is followed.
        note: what else there is to know of it, such as the steps of `ig`.
        checks: what `--check` has measured, by name, and its `verdict`; empty without.
        image: (C, H, W) as the sample gives it.
        window: rows and columns of the file that `map` and `image` are of, where a scene was explained in part; None:
            all of it.
        sample: where it is from; None of a tensor.
    """

    name: str
    map: np.ndarray
    method: str
    layer: str
    target: str
    score: float
    outside: float | None
    note: str
    image: np.ndarray
    window: Window | None = None
    sample: Sample | None = None
    checks: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Explanation({self.name!r}, {self.method}, {self.target}, {self.score:.3f})"

    def overlay(self) -> Image.Image:
        """The image in grey under the map: red for, blue against, the largest value of either as full colour."""
        return coloured(displayed(unit_range(self.image)), self.map)

    def save(self, path: str | Path) -> None:
        """Write it: .png with a colour bar and words, .tif on the grid of its scene, .nii.gz, or .npy.

        Raises:
            UserError: the file exists, or its image is no scene or volume.
        """
        save([self], Path(path))

    def _repr_png_(self) -> bytes | None:
        return self.overlay()._repr_png_()


def explain(
    model: Any,
    images: Any,
    *,
    method: str | Sequence[str] = DEFAULT,
    target: str | int = "predicted",
    region: Any = None,
    layer: str | None = None,
    query: tuple[float, float] | None = None,
    head: int | None = None,
    check: bool = False,
) -> list[Explanation]:
    """What predictions depend on, image by image, and for each image method by method.

    Args:
        model: a run, its path, or a network in evaluation mode, which takes normalised images.
        images: for a run what `Run.predict` takes; for a network images (B, C, H, W) or (C, H, W) as it takes them.
        method: layercam, ig (integrated gradients), gradcam, gradient, occlusion, rollout, relevance, attention or
            class-attention; or several.
        target: "predicted", "label", or the name or number of a class.
        region: of masks where: "predicted", X,Y or X,Y,X2,Y2 in pixels of the file, a mask as file or array; of objects
            which one, a box.
        layer: of CAM and attention; unset: the finest stage that the output depends on, the last attention.
        query: X, Y in pixels of the file, whose attention is shown.
        head: of attention; unset: the mean of the heads.
        check: measure whether the maps are better than an edge filter and chance, and depend on the weights.

    Raises:
        UserError: what cannot be explained so, with what can.
    """
    from visionattn.api import Run, load, samples_of

    methods = [method] if isinstance(method, str) else list(method)
    wanted = Wanted(methods, target, region, layer, query, head)
    if isinstance(model, nn.Module):
        return list(_of_network(model, images, wanted, check))
    run = model if isinstance(model, Run) else load(model)
    by_case, problems = samples_of(images, run.recipe)
    if problems:
        raise UserError("\n".join(problems))
    return list(explained(run.trained, [sample for case in by_case for sample in case], wanted, check))


def explained(
    trained: Trained, samples: Sequence[Sample], wanted: Wanted, check: bool = False
) -> Iterator[Explanation]:
    """The explanations of a run's samples, in order."""
    seen = part_of(trained.recipe.task, "explain").seen
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = trained.task.to(device).network
    asked = Asked(wanted.target, wanted.region)
    cache: dict[str, dict[str, float]] | None = {} if check else None
    for name, sample in zip(names_of(samples), samples, strict=True):
        shown = seen(trained.task.eval(), sample, trained.recipe, asked)
        shown = [part._replace(image=part.image.to(device)) for part in shown]
        window = _extent(shown) if sample.windowed else None
        image = sample.image(window)
        for method in wanted.methods:
            made = _explained(network, shown, image, window, method, wanted, cache)
            yield replace(made, name=name, sample=sample)


def names_of(samples: Sequence[Sample]) -> list[str]:
    """Names for files, relative and each once: of paths what tells them apart, of slices with their number."""
    places = [Path(sample.case) for sample in samples]
    absolute = [place for place in places if place.is_absolute()]
    root = Path(os.path.commonpath([place.parent for place in absolute])) if absolute else Path()
    whole = [(place.relative_to(root) if place.is_absolute() else place).as_posix() for place in places]
    short = [re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})$", "", name, flags=re.I) for name in whole]
    owners: dict[str, set[str]] = {}
    for name, sample in zip(short, samples, strict=True):
        owners.setdefault(name, set()).add(sample.case)
    numbers = {i: n for members in cases(samples).values() if len(members) > 1 for n, i in enumerate(members)}
    return [
        (name if len(owners[name]) == 1 else full) + (f"-{numbers[i]:03d}" if i in numbers else "")
        for i, (name, full) in enumerate(zip(short, whole, strict=True))
    ]


def _extent(shown: Sequence[Seen]) -> Window:
    """The least window that has all that is shown."""
    edges = np.array([part.place for part in shown])
    (top, left), (bottom, right) = edges[:, :2].min(0).astype(int), edges[:, 2:].max(0).astype(int)
    return slice(int(top), int(bottom)), slice(int(left), int(right))


def _explained(
    network: nn.Module,
    shown: Sequence[Seen],
    image: np.ndarray,
    window: Window | None,
    method: str,
    wanted: Wanted,
    cache: dict[str, dict[str, float]] | None,
) -> Explanation:
    """cache: what checks have shown of a method with shuffled weights; None: nothing is checked."""
    total = np.zeros(image.shape[1:], np.float32)
    corner = (window[0].start, window[1].start) if window else (0, 0)
    parts, asked, answers = list[Seen](), list[Question](), list[Answer]()
    for part in shown:
        question = _question(network, part, wanted)
        if question is None:
            continue
        answer = _answered(method, question)
        parts.append(part)
        asked.append(question)
        answers.append(answer)
        _paste(answer.map, part, total, corner)
    if not answers:
        raise UserError(f"query {wanted.query} is in no part of the image that the network is shown")
    with torch.no_grad():
        score = float(np.mean([part.score(part.image[None]).item() for part in shown]))
    leaving = [answer.outside for answer in answers if answer.outside is not None]
    first = answers[0]
    checks = {}
    if cache is not None:
        question = asked[0]

        def again(image: Tensor) -> Tensor:
            return METHODS[method](replace(question, image=image, layer=first.layer or None)).map

        checks = checks_of(network, parts[0], first.map, again, cache.setdefault(method, {}))
    return Explanation(
        name="image",
        map=total,
        method=method,
        layer=first.layer,
        target=shown[0].target,
        score=score,
        outside=float(np.mean(leaving)) if leaving else None,
        note=first.note,
        image=image,
        window=window,
        checks=checks,
    )


def _question(network: nn.Module, part: Seen, wanted: Wanted) -> Question | None:
    """None of a part without the pixel that is asked for."""
    query = None
    if wanted.query is not None:
        top, left, bottom, right = part.place
        x, y = wanted.query
        if not (left <= x < right and top <= y < bottom):
            return None
        height, width = part.image.shape[1:]
        query = int((y - top) / (bottom - top) * height), int((x - left) / (right - left) * width)
    return Question(network, part.image, part.logit, part.region, wanted.layer, query, wanted.head)


def _answered(method: str, question: Question) -> Answer:
    try:
        return METHODS[method](question)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            height, width = question.image.shape[1:]
            raise UserError(
                f"{method} of {height} x {width} pixels needs more memory than there is; it grows with the square of"
                " the side or faster: take a smaller image or region, or gradcam"
            ) from None
        raise


def _paste(values: Tensor, part: Seen, total: np.ndarray, corner: tuple[int, int]) -> None:
    """Put a map of what a part shows into that of the file, of which `total` begins at a corner."""
    top, left, bottom, right = part.place
    size = max(1, round(bottom - top)), max(1, round(right - left))
    whole = values.detach().float().cpu()[None, None]
    resized = F.interpolate(whole, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    first = round(top) - corner[0], round(left) - corner[1]
    inside = [
        (max(0, start), min(limit, start + length))
        for start, length, limit in zip(first, size, total.shape, strict=True)
    ]
    (y0, y1), (x0, x1) = inside
    total[y0:y1, x0:x1] += resized[y0 - first[0] : y1 - first[0], x0 - first[1] : x1 - first[1]]


def _of_network(network: nn.Module, images: Any, wanted: Wanted, check: bool) -> Iterator[Explanation]:
    images = torch.as_tensor(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            f"images of {tuple(images.shape)}: expected normalised floats (B, C, H, W), as the network takes"
        )
    if network.training:
        raise UserError("the network is in training mode: call network.eval() first")
    cache: dict[str, dict[str, float]] | None = {} if check else None
    for n, image in enumerate(images):
        shown = [_seen(network, image, wanted)]
        native = image.detach().cpu().numpy()
        for method in wanted.methods:
            made = _explained(network, shown, native, None, method, wanted, cache)
            yield replace(made, name=f"image[{n}]")


def _seen(network: nn.Module, image: Tensor, wanted: Wanted) -> Seen:
    """What is explained of a network that gives logits (B, K), or (B, K, H, W)."""
    with torch.no_grad():
        output = network(image[None])
    if not isinstance(output, Tensor) or output.ndim not in (2, 4):
        raise UserError("the network gives neither logits (B, classes) nor (B, classes, H, W): explain its run instead")
    height, width = image.shape[1:]
    place = 0.0, 0.0, float(height), float(width)
    names = [str(k) for k in range(output.shape[1])]
    dense = output.ndim == 4
    predicted = int((output[0].flatten(1).sum(1) if dense else output[0]).argmax())
    k = class_of(Asked(wanted.target), names, predicted, None)
    if wanted.region is not None and not dense:
        raise UserError("region is for masks: the network gives one answer for the whole image")
    inside = None
    if dense:
        given = mask_of(wanted.region, (height, width))
        inside = output[0].argmax(0) == k if given is None else torch.from_numpy(given).to(output.device)
        inside = inside if inside.any() else torch.ones_like(inside)

    def logit(images: Tensor) -> Tensor:
        logits = network(images)[:, k]
        return logits if inside is None else (logits * inside).sum((1, 2))

    def score(images: Tensor) -> Tensor:
        share = network(images).float().softmax(1)[:, k]
        return share if inside is None else (share * inside).sum((1, 2)) / inside.sum()

    return Seen(image, place, logit, score, f"class {k}", inside)
