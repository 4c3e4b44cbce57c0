"""What a pretraining recipe says."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from visionattn.data import formats
from visionattn.recipe import sections
from visionattn.recipe.sections import NotNegative, Positive, Probability, Rate, Section, Share, Side

__all__ = ["DATA", "EXAMPLE", "AnyData", "Augment", "Data", "Model", "Objective", "Probe", "Recipe"]


class Augment(Section):
    """Random changes of training images, on normalised values of any number of bands; probabilities unless said."""

    crop_scale: Share | None = Field(
        None, description="share of the area that a crop keeps; unset: [0.67, 1], vicreg [0.3, 1], native pixels [1, 1]"
    )
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rot90: Probability = Field(0.0, description="of one, two or three quarter turns")
    jitter: NotNegative | None = Field(
        None, description="strength of random gain and offset, shared and of each band; unset: 0.3 for vicreg, else 0"
    )
    blur: Probability = 0.0
    noise: NotNegative = Field(0.0, description="largest standard deviation of noise, in those of the data")
    band_dropout: Probability = Field(0.0, description="of each band to be blanked out; one always stays")


class Data(sections.Data):
    """What pretraining wants of images, wherever they come from."""

    resize: Literal["squash", "none"] = Field(
        "squash", description="squash: crops of the whole image are resized to image_size; none: native pixels"
    )
    val_fraction: Rate = Field(0.05, description="share drawn for validation where no such split is given")
    crops_per_image: Positive = Field(1, description="training crops of an image in each epoch")
    augment: Augment = Augment()


class Model(sections.Model):
    """The network that learns, and the one that it may learn from."""

    teacher: sections.Teacher | None = Field(
        None, description="distill: such as {name: vit_small_patch14_dinov2}, whose features are learned"
    )


class Objective(Section):
    """What is learned without labels."""

    name: Literal["mim", "vicreg", "distill"] = Field(
        "mim",
        description="mim: hidden pixels from visible ones; vicreg: features that two views have in common; distill: "
        "those of model.teacher",
    )
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.6, description="mim: share of the image that is hidden")
    mask_size: Positive | None = Field(
        None, description="mim: side of hidden cells in pixels; unset: a sixth of the image, 32 at most"
    )
    target: Literal["pixels", "norm_patch"] = Field(
        "pixels", description="mim: normalised pixels, or these standardised in each cell"
    )
    width: Positive = Field(512, description="vicreg: of the expander; distill: of the teacher's features, as found")
    local: Probability = Field(0.25, description="vicreg: weight of the term on places that both views see")


class Probe(sections.Data):
    """Labelled images on which the features are looked at now and then; they are never trained on."""

    image_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = Field(  # type: ignore[assignment]
        None, description="unset: that of data"
    )
    every: Positive = Field(10, description="epochs between probes; the first and the last one are probed too")


class Train(sections.Train):
    """How long and in which way to train."""

    monitor: Literal["loss", "linear", "linear_all", "knn", "knn_all"] | None = Field(
        None,
        description="picks the best checkpoint; unset: loss for mim; for vicreg linear, without a probe the last",
    )


DATA = formats.sections("", Data)
PROBE = formats.sections("class", Probe)
if TYPE_CHECKING:

    class AnyData(Data):
        """What the section of every format has, once it is resolved."""

        mean: list[float]  # unset in a file only
        std: list[float]

    AnyProbe = Probe
else:
    AnyData, AnyProbe = formats.union(DATA), formats.union(PROBE)


class Recipe(sections.Recipe):
    """A whole pretraining."""

    loss: ClassVar[Any] = None  # type: ignore[misc]  # other tasks have it in place of an objective
    evaluate: ClassVar[sections.Evaluate] = sections.Evaluate()  # type: ignore[misc]  # nothing to choose

    task: Literal["pretraining"]
    model: Model
    data: AnyData
    objective: Objective = Objective()
    probe: AnyProbe | None = None
    train: Train = Train()

    @model_validator(mode="after")
    def _taught_by_somebody(self) -> Self:
        if (self.objective.name == "distill") != (self.model.teacher is not None):
            raise ValueError("objective.name distill and model.teacher need each other: set both or none")
        return self


EXAMPLE = {
    "model": {"name": "biformer_tiny"},
    "data": {"format": "unlabelled", "root": "images", "image_size": 192, "batch_size": 128},
    "objective": {"name": "mim"},
    "optim": {"lr": 2e-4, "warmup_epochs": 10, "clip_grad": 3.0, "args": {"betas": [0.9, 0.95]}},
    "train": {"epochs": 300},
}
