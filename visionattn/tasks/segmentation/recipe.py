"""What a segmentation recipe says."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from visionattn.data import formats
from visionattn.data.labels import MaskSection
from visionattn.errors import nearest
from visionattn.recipe import sections
from visionattn.recipe.sections import AbovePositive, NotNegative, Positive, Probability, Rate, Section

__all__ = ["DATA", "EXAMPLE", "AnyData", "Augment", "Data", "Loss", "Recipe"]


Zoom = Annotated[float, Field(ge=0.1, le=10)]  # beyond, a crop would be of a few pixels, or of a hundred times as many


class Model(sections.FineTuned):
    """An encoder with a decoder, or a whole segmenter of timm's registry."""

    decoder: str | None = Field(
        None,
        description="see `visionattn list --decoders`; unset: `name` is a whole segmenter, such as emcad_pvt_v2_b2",
    )
    decoder_args: dict[str, Any] = Field(
        {},
        description="keyword arguments of the decoder's own constructor; gates: triplet or ela: of the maps it takes",
    )


class Augment(Section):
    """Random changes of training images and their masks together; probabilities unless said otherwise."""

    scale: Annotated[list[Zoom], Field(min_length=2, max_length=2)] = Field(
        [1.0, 1.0], description="smallest and largest random zoom; the crop keeps its size"
    )
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rot90: Probability = Field(0.0, description="of one, two or three quarter turns")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest rotation either way, in degrees")
    jitter: NotNegative = Field(0.0, description="strength of random gain and offset, in standard deviations")
    band_dropout: Probability = Field(0.0, description="of each band to be blanked out; one always stays")
    multi_scale: list[Zoom] = Field([], description="each batch is resized by one of these factors")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is {self.scale}, expected [smallest, largest]")
        return self


class Data(sections.Data):
    """What segmentation wants of images with masks, wherever they come from."""

    resize: Literal["squash", "shorter", "none"] = Field(
        "squash",
        description="squash: whole images to image_size; shorter: shorter side to it, none: native pixels, both cut "
        "into crops for training and into overlapping windows afterwards",
    )
    crops_per_image: Positive = Field(1, description="training crops of an image in each epoch")
    rare_crops: Probability = Field(0.0, description="share of crops around a pixel of a class, rare ones as often")
    augment: Augment = Augment()


class Loss(Section):
    """The training loss, over labelled pixels only."""

    name: Literal["dice", "ce", "dice_ce", "focal", "tversky", "lovasz", "boundary", "mutation"] = "dice_ce"
    class_weights: Literal["balanced"] | list[AbovePositive] | None = Field(
        None, description="of the cross-entropy part; balanced: inverse pixel frequency"
    )
    ce_weight: NotNegative = Field(1.0, description="dice_ce, mutation: weight of the cross-entropy")
    dice_weight: NotNegative = Field(1.0, description="dice_ce, mutation: weight of the Dice loss")
    gamma: NotNegative = Field(2.0, description="focal: focusing")
    alpha: Probability = Field(0.3, description="tversky: weight of false positives; false negatives have 1 - alpha")
    deep: bool | None = Field(
        None, description="sum the loss over all outputs of the decoder; unset: where it has several, such as emcad"
    )


class Train(sections.Train):
    """How long and in which way to train."""

    monitor: Literal["loss", "dice", "iou", "miou", "miou_counted", "mf1", "mf1_counted", "pixel_accuracy"] | None = (
        Field(None, description="picks the best checkpoint and heads the report; unset: dice, the mean over cases")
    )


class Evaluate(sections.Calibrated):
    """What is done on held-out images after training."""

    leave_out: list[str] = Field(
        ["background"], description="classes that means over classes leave out; miou and mf1 are of all"
    )
    empty: Literal["standard", "transunet"] = Field(
        "standard",
        description="rule for a class that a case or its prediction lacks, and with transunet the HD95 of its code: "
        "see visionattn.tasks.segmentation.metrics",
    )
    surface: bool = Field(True, description="HD95 and normalised surface distance, where MONAI is installed")
    tolerance: NotNegative = Field(1.0, description="of the normalised surface distance, in mm or pixels")
    overlap: Rate = Field(0.5, description="share of a window that the next one covers again")


DATA = formats.sections("mask", Data)
if TYPE_CHECKING:

    class AnyData(Data, MaskSection):
        """What the section of every format has, once it is resolved."""

        mean: list[float]  # unset in a file only
        std: list[float]
else:
    AnyData = formats.union(DATA)


class Recipe(sections.Recipe):
    """A whole segmentation experiment."""

    task: Literal["segmentation"]
    model: Model
    data: AnyData
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _left_out_classes_are_there(self) -> Self:
        names = {"background", *self.data.class_names}  # the default, which not every data set has
        if unknown := [name for name in self.evaluate.leave_out if name not in names]:
            raise ValueError(
                f"evaluate.leave_out names {', '.join(unknown)}, which is no class{nearest(unknown[0], names)}; "
                f"classes: {', '.join(self.data.class_names[:20])}"
            )
        return self


EXAMPLE = {
    "model": {"name": "biformer_tiny", "decoder": "fpn"},
    "data": {
        "format": "image_mask",
        "root": "images_and_masks",
        "classes": ["background", "lesion"],
        "image_size": 224,
        "batch_size": 16,
    },
    "optim": {"lr": 5e-4, "warmup_epochs": 5},
    "train": {"epochs": 100},
}
