"""A teacher: a trained network that is asked what it makes of a student's images, and never changed.

It sees what the student sees, in its own bands, normalisation and size. It is no part of the student: not of its state
dict, its optimizer or its parameters, and copies of the student share it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from visionattn.errors import UserError, listed
from visionattn.models.networks import create, make_network, refuse_unknown
from visionattn.models.weights import load_checkpoint
from visionattn.recipe import sections
from visionattn.recipe.sections import Model

__all__ = ["Teacher", "make_teacher"]


class Teacher:
    """A network beside a student.

    Args:
        network: of timm, or of ours.
        mean, std: of each of its channels, of values in 0..1; None: it takes the student's normalised values.
        size: (height, width) of the images that it takes.
        bands: the student's channel, from 1, that each of its channels is; None: they are the same.
        seen: mean and std of each channel of the student's images.
        about: what it is, in plain data.
    """

    def __init__(
        self,
        network: Any,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: tuple[int, int],
        bands: list[int] | None,
        seen: tuple[list[float], list[float]],
        about: dict[str, str],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size, self.about = size, about | {"weights": _fingerprint(network)}
        self.bands = [band - 1 for band in bands or range(1, len(seen[0]) + 1)]
        theirs, ours = ([torch.tensor(values)[self.bands] for values in seen] for _ in range(2))
        if mean is not None and std is not None:
            ours = [torch.tensor(mean), torch.tensor(std)]
        self.factor, self.offset = theirs[1] / ours[1], (theirs[0] - ours[0]) / ours[1]

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


def make_teacher(spec: sections.Teacher, classes: list[str], seen: tuple[list[float], list[float]]) -> Teacher:
    """The classifier that a recipe names, for a student whose images have the mean and std `seen`.

    Raises:
        UserError: there is no such network, it knows other classes, or it takes other channels.
    """
    if spec.name is not None:
        refuse_unknown("model.teacher.name", spec.name, timm.list_models(), "visionattn list, timm.list_models()")
        known = timm.get_pretrained_cfg(spec.name)
        size = _pair(spec.image_size or (list(known.input_size[1:]) if known else 224))
        arguments = {"img_size": size} if known and known.fixed_input_size else {}
        network = create(spec.name, arguments, pretrained=True)
        about = {"name": spec.name, "licence": str(network.pretrained_cfg.get("license") or "unknown")}
        mean, std, theirs = network.pretrained_cfg["mean"], network.pretrained_cfg["std"], network.num_classes
        if theirs != len(classes):
            raise UserError(
                f"model.teacher: {spec.name} was published for {theirs} classes, but the images have {len(classes)}: "
                "its logits say nothing of these; train it on them and name that run as model.teacher.checkpoint"
            )
    else:
        network, mean, std, size, about = _of_run(spec, classes)
    taken, given = len(mean), len(spec.bands or seen[0])
    if given != taken or max(spec.bands or [0]) > len(seen[0]):
        raise UserError(
            f"model.teacher.bands is {spec.bands}: the teacher takes {taken} channels and the images have "
            f"{len(seen[0])}; expected for each of its channels the number of one of these, from 1"
        )
    return Teacher(network, mean, std, size, spec.bands, seen, about)


def _of_run(spec: sections.Teacher, classes: list[str]) -> tuple[Any, list[float], list[float], tuple[int, int], dict]:
    """Network, mean, std, size and description of a run of ours."""
    assert spec.checkpoint is not None
    path = spec.checkpoint
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    said = load_checkpoint(file).get("visionattn")
    if not isinstance(said, dict) or "recipe" not in said:
        raise UserError(f"model.teacher.checkpoint: {file} is no checkpoint of visionattn fit")
    recipe = yaml.safe_load(said["recipe"])
    model, data = recipe["model"], recipe["data"]
    if model.get("decoder") or model.get("detector") or "classes" not in data:
        raise UserError(f"model.teacher.checkpoint: {path} is a run of {recipe['task']}, not of a classifier")
    if data["classes"] != classes:
        theirs, ours = listed(data["classes"], most=5), listed(classes, most=5)
        raise UserError(f"model.teacher.checkpoint: {path} knows the classes {theirs}, but the images have {ours}")
    size = _pair(spec.image_size or data["image_size"])
    started = Model(name=model["name"], args=model["args"], checkpoint=file)
    network = make_network(started, len(classes), len(data["mean"]), size)
    return network, data["mean"], data["std"], size, {"name": model["name"], "of": str(path)}


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _fingerprint(network: Any) -> str:
    """Of the weights."""
    found = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        found.update(key.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
