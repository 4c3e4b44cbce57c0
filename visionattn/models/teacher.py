"""A teacher: a trained network that is asked what it makes of a student's images, and never changed.

It sees what the student sees, in its own bands, normalisation and size. It is no part of the student: not of its state
dict, its optimizer or its parameters, and copies of the student share it.
"""

import hashlib
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from visionattn.errors import UserError, listed
from visionattn.models.handover import about, start_from
from visionattn.models.networks import arguments_of, create, refuse_unknown_model
from visionattn.recipe import sections
from visionattn.recipe.sections import Model

__all__ = ["Imitation", "Teacher", "feature_channels", "make_teacher"]


class Teacher:
    """A network beside a student.

    Args:
        network: of timm, or of ours.
        own: mean and std of each of its channels; None: it takes the student's normalised values.
        size: (height, width) of the images that it takes.
        bands: the student's channel, from 1, that each of its channels is; None: they are the same.
        seen: mean and std of each channel of the student's images.
        about: what it is, in plain data.
    """

    def __init__(
        self,
        network: Any,
        own: tuple[list[float], list[float]] | None,
        size: tuple[int, int],
        bands: list[int] | None,
        seen: tuple[list[float], list[float]],
        about: dict[str, str],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size, self.about = size, about | {"weights": _fingerprint(network)}
        self.bands = [band - 1 for band in bands or range(1, len(seen[0]) + 1)]
        mean, std = (torch.tensor(values)[self.bands] for values in seen)
        own_mean, own_std = map(torch.tensor, own) if own else (mean, std)
        self.factor, self.offset = std / own_std, (mean - own_mean) / own_std

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self

    def __str__(self) -> str:
        words = ", ".join(f"{key} {value}" for key, value in self.about.items() if key != "name")
        bands = listed([str(band + 1) for band in self.bands])
        return f"teacher {self.about['name']} ({words}) sees images of {self.size[0]} x {self.size[1]}, bands {bands}"

    def to(self, device: torch.device) -> None:
        self.network.to(device)
        self.factor, self.offset = self.factor.to(device), self.offset.to(device)

    def view(self, images: Tensor) -> Tensor:
        """The student's images (B, C, H, W), normalised for it, as the teacher takes them."""
        images = images[:, self.bands] * self.factor[:, None, None] + self.offset[:, None, None]
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) of the student's images."""
        return self.network(self.view(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Its last map (B, channels, h, w) of the student's images, normalised as its classifier takes it."""
        view = self.view(images)
        return self.network.forward_intermediates(view, indices=1, norm=True, intermediates_only=True)[-1]


class Imitation(nn.Module):
    """Features of a student brought to those of a teacher: of the whole image, and place by place.

    A teacher's features are standardised channel by channel with the statistics of all that was seen in training, since
    few channels may hold most of their variance (PHI-S, Ranzinger et al. 2024, arXiv 2410.01680).

    Args:
        features: of the student, of the whole image.
        channels: of its last map.
        width: channels of the teacher.
    """

    def __init__(self, features: int, channels: int, width: int) -> None:
        super().__init__()
        self.overall, self.local = nn.Linear(features, width), nn.Linear(channels, width)
        self.taught = nn.BatchNorm1d(width, affine=False, momentum=None)  # for its statistics, the mean of all batches

    def forward(self, last: Tensor, coarsest: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and a map (B, C, h, w) -> (B, width) and (B, h, w, width)."""
        return self.overall(last), self.local(coarsest.permute(0, 2, 3, 1))

    def loss(self, overall: Tensor, places: Tensor, taught: Tensor) -> Tensor:
        """1 - the cosine to the teacher's features, the mean over places, and that of their means.

        Args:
            overall, places: as `forward` gives them; the places are resized to the teacher's.
            taught: map (B, width, h, w) of the teacher.
        """
        taught = taught.float()
        if self.training:
            self.taught(taught.flatten(2))
        taught = F.batch_norm(taught, self.taught.running_mean, self.taught.running_var)
        places = F.interpolate(places.float().movedim(-1, 1), taught.shape[2:], mode="bilinear")
        similar = F.cosine_similarity(places, taught, 1).mean()
        return 2 - similar - F.cosine_similarity(overall.float(), taught.mean((2, 3)), 1).mean()


def make_teacher(
    spec: sections.Teacher,
    seen: tuple[list[float], list[float]],
    classes: list[str] | None = None,
    unit_range: bool = True,
) -> Teacher:
    """The network that a recipe names, for a student whose images have the mean and std `seen`.

    Args:
        classes: that its logits are to be of; None: only its features are asked for.
        unit_range: the student's images are scaled to 0..1 before mean and std. Where a teacher's were not likewise, it
            gets the student's normalised values.

    Raises:
        UserError: there is no such network, it knows other classes, or it takes other channels.
    """
    made = _published(spec, classes) if spec.name is not None else _of_run(spec, classes)
    taken, given = len(made.mean), len(spec.bands or seen[0])
    if given != taken or max(spec.bands or [0]) > len(seen[0]):
        raise UserError(
            f"model.teacher.bands is {spec.bands}: the teacher takes {taken} channels and the images have "
            f"{len(seen[0])}; expected for each of its channels the number of one of these, from 1"
        )
    own = (made.mean, made.std) if made.unit_range in (None, unit_range) else None
    return Teacher(made.network, own, made.size, spec.bands, seen, made.about)


class _Made(NamedTuple):
    """A network with what it was trained on; `unit_range` None where it does not say."""

    network: Any
    mean: list[float]
    std: list[float]
    unit_range: bool | None
    size: tuple[int, int]
    about: dict[str, str]


def _published(spec: sections.Teacher, classes: list[str] | None) -> _Made:
    assert spec.name is not None
    refuse_unknown_model("model.teacher.name", spec.name)
    known = timm.get_pretrained_cfg(spec.name)
    size = _pair(spec.image_size or (list(known.input_size[1:]) if known else 224))
    network = create(spec.name, arguments_of(Model(name=spec.name), size), pretrained=True)
    if classes is not None and network.num_classes != len(classes):
        raise UserError(
            f"model.teacher: {spec.name} was published for {network.num_classes} classes, but the images have "
            f"{len(classes)}: its logits say nothing of these; train it on them and name that run as "
            "model.teacher.checkpoint"
        )
    cfg = network.pretrained_cfg
    words = {"name": spec.name, "licence": str(cfg.get("license") or "unknown")}
    return _Made(network, list(cfg["mean"]), list(cfg["std"]), True, size, words)


def _of_run(spec: sections.Teacher, classes: list[str] | None) -> _Made:
    recipe, unit_range = _recipe_of(spec)
    assert spec.checkpoint is not None
    path, model, data = spec.checkpoint, recipe["model"], recipe["data"]
    if classes is not None:
        if model.get("decoder") or model.get("detector") or "classes" not in data:
            raise UserError(f"model.teacher.checkpoint: {path} is a run of {recipe['task']}, not of a classifier")
        if data["classes"] != classes:
            theirs, ours = listed(data["classes"], most=5), listed(classes, most=5)
            raise UserError(f"model.teacher.checkpoint: {path} knows the classes {theirs}, but the images have {ours}")
    size = _pair(spec.image_size or data["image_size"])
    arguments = arguments_of(Model(name=model["name"], args=model["args"]), size)
    network = create(model["name"], arguments, num_classes=len(classes or ()), in_chans=len(data["mean"]))
    start_from(network, path, model["name"], arguments)
    words = {"name": model["name"], "of": str(path)}
    return _Made(network, data["mean"], data["std"], unit_range, size, words)


def _recipe_of(spec: sections.Teacher) -> tuple[dict[str, Any], bool | None]:
    """The recipe of a run, and whether its images were scaled to 0..1."""
    assert spec.checkpoint is not None
    if (said := about(spec.checkpoint)) is None:
        raise UserError(f"model.teacher.checkpoint: {spec.checkpoint} is no run and no checkpoint of visionattn fit")
    return yaml.safe_load(said.said["recipe"]), said.unit_range


def feature_channels(spec: sections.Teacher) -> int:
    """Channels of the features of a teacher, from its name or its run's recipe alone."""
    model = Model(name=spec.name) if spec.name is not None else None
    if model is None:
        said, _ = _recipe_of(spec)
        model = Model(name=said["model"]["name"], args=said["model"]["args"])
    refuse_unknown_model("model.teacher.name", model.name)
    with torch.device("meta"):
        network = create(model.name, model.args)
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"model.teacher: {model.name} gives no maps (it has no forward_intermediates): take another")
    return network.feature_info[-1]["num_chs"]


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _fingerprint(network: Any) -> str:
    """Of the weights."""
    found = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        found.update(key.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
