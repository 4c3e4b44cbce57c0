"""What a classification recipe says."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from visionattn.data import formats
from visionattn.data.labels import ClassSection
from visionattn.errors import nearest
from visionattn.recipe import sections
from visionattn.recipe.sections import AbovePositive, NotNegative, Positive, Probability, Rate, Ratio, Section, Share

__all__ = ["DATA", "EXAMPLE", "AnyData", "Augment", "Data", "Evaluate", "Loss", "Model", "Recipe", "Teacher"]


POLICIES = ("randaugment", "autoaugment", "trivialaugment", "augmix")  # of torchvision
SPREAD = r"mstd(?:\d+(?:\.\d+)?|inf)"
OF_TIMM = (  # parts that timm does not know it would pass over in silence
    rf"rand(?:-(?:m\d+(?:\.\d+)?|n\d+|p\d?\.\d+|{SPREAD}|mmax\d+|inc[01]|w\d|t|3a))+"
    rf"|augmix(?:-(?:m\d+|w\d+|d-?\d+|a\d+(?:\.\d+)?|b[01]|{SPREAD}))+"
    rf"|(?:original|originalr|v0|v0r|3a)(?:-{SPREAD})?"
)


class Teacher(sections.Teacher):
    """A classifier of the same classes, whose logits the student learns besides the labels."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="of the teacher; 1 - weight of the labels")
    temperature: AbovePositive = Field(2.0, description="of both logits, which are divided by it")


class Model(sections.FineTuned):
    """A network that may learn from another one."""

    teacher: Teacher | None = Field(
        None, description="such as {checkpoint: runs/large}: learn what this network says of the images too"
    )


class Augment(Section):
    """Random changes of training images; probabilities unless said otherwise."""

    crop_scale: Share = Field([0.5, 1.0], description="share of the image's area that a random resized crop keeps")
    crop_ratio: Ratio = Field([0.75, 4 / 3], description="width over height of that crop")
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest rotation either way, in degrees")
    jitter: Probability = Field(0.0, description="strength of brightness, contrast and saturation changes")
    policy: str | None = Field(
        None,
        description="randaugment, autoaugment, trivialaugment or augmix of torchvision; or timm's by its string, such "
        "as rand-m9-mstd0.5-inc1",
    )
    repeats: Positive = Field(
        1, description="times that an image that is drawn is in an epoch, changed anew; an epoch keeps its length"
    )
    erasing: Probability = 0.0
    mixup: NotNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    cutmix: NotNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")

    @field_validator("policy")
    @classmethod
    def _policy_is_known(cls, policy: str | None) -> str | None:
        if policy is None or policy in POLICIES or re.fullmatch(OF_TIMM, policy):
            return policy
        raise ValueError(
            f"policy is {policy!r}{nearest(policy, POLICIES)}; expected {', '.join(POLICIES)}, or timm's string, such "
            "as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5"
        )


class Data(sections.Data):
    """What classification wants of images, wherever they come from."""

    resize: Literal["crop", "squash", "none"] = Field(
        "crop",
        description="crop: shorter side to size / crop_pct, then the centre; squash: both sides; none: native pixels",
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    multi_label: bool | None = Field(None, description="images have several labels each; unset: as found in the data")
    balanced_sampling: bool = Field(False, description="draw every class equally often in training")
    augment: Augment = Augment()


class Loss(Section):
    """The training loss."""

    name: Literal["cross_entropy", "bce", "focal"] | None = Field(
        None, description="unset: cross_entropy for one label an image, bce for several"
    )
    label_smoothing: Rate = 0.0
    class_weights: Literal["balanced"] | list[AbovePositive] | None = None
    gamma: NotNegative = Field(2.0, description="focusing of the focal loss")
    auxiliary: NotNegative = Field(
        0.0, description="weight of the loss that a network has of its own besides (moh_*: the balance of its heads)"
    )


class Train(sections.Train):
    """How long and in which way to train."""

    monitor: Literal["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"] | None = Field(
        None, description="picks the best checkpoint; unset: accuracy, for multi-label auroc"
    )


class Evaluate(sections.Calibrated):
    """What is done on held-out images after training."""

    ood: Literal["knn"] | None = Field(
        None, description="tell images that are like none of those trained on, by the distance of their features"
    )


DATA = formats.sections("class", Data)
if TYPE_CHECKING:

    class AnyData(Data, ClassSection):
        """What the section of every format has, once it is resolved."""

        classes: list[str]  # unset in a file only
        channels: int
        multi_label: bool
        mean: list[float]
        std: list[float]
else:
    AnyData = formats.union(DATA)


class Recipe(sections.Recipe):
    """A whole classification experiment."""

    task: Literal["classification"]
    model: Model
    data: AnyData
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()


EXAMPLE = {
    "model": {"name": "biformer_tiny"},
    "data": {"format": "folder", "root": "images", "image_size": 224, "batch_size": 32},
    "optim": {"lr": 5e-4, "warmup_epochs": 5},
    "train": {"epochs": 100},
}
