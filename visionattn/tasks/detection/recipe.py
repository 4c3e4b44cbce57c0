"""What a detection recipe says."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from visionattn.data import formats
from visionattn.data.boxes import BoxSection
from visionattn.recipe import sections
from visionattn.recipe.sections import AbovePositive, NotNegative, Positive, Probability, Rate, Section

__all__ = ["DATA", "EXAMPLE", "AnyData", "Augment", "Data", "DetectorArgs", "Loss", "Recipe"]

Zoom = Annotated[float, Field(ge=0.1, le=10)]
Iou = Annotated[float, Field(gt=0, lt=1)]


class DetectorArgs(Section):
    """What all detectors have; sizes are in pixels as the network sees them."""

    fpn_channels: Positive = Field(128, description="of the feature pyramid")
    convs: Positive = Field(4, description="convolutions of each branch of the head")
    finest: Literal[4, 8, 16] | None = Field(
        None, description="stride of the finest map; unset: the coarsest one that reaches the training objects"
    )
    coarsest: Literal[16, 32, 64, 128] | None = Field(
        None, description="stride of the coarsest map; unset: 32, or as large objects need it"
    )
    sizes: list[AbovePositive] | None = Field(
        None, description="side of the objects that each map is for, fine to coarse; unset: measured"
    )
    ratios: list[AbovePositive] = Field([0.5, 1.0, 2.0], description="retinanet: height / width of the anchors")
    queries: Positive | None = Field(
        None,
        description="rt_detr, d_fine: most objects found at once; unset: twice those of the densest image or tile, at "
        "least 100",
    )
    layers: Positive = Field(6, description="rt_detr, d_fine: of the decoder")
    nms: Iou = Field(0.6, description="IoU above which the less sure of two detections is a duplicate")
    agnostic: bool = Field(False, description="detections of different classes can be duplicates of each other")

    @model_validator(mode="after")
    def _finest_is_finer(self) -> Self:
        if self.finest and self.coarsest and self.finest > self.coarsest:
            raise ValueError(f"finest is {self.finest}, expected at most coarsest, {self.coarsest}")
        return self


class Model(sections.FineTuned):
    """An encoder under a detector."""

    detector: str = Field("fcos", description="see `visionattn list --detectors`")
    detector_args: DetectorArgs = DetectorArgs()


class Augment(Section):
    """Random changes of training images and their objects together; probabilities unless said otherwise."""

    scale: Annotated[list[Zoom], Field(min_length=2, max_length=2)] = Field(
        [0.8, 1.25], description="smallest and largest random zoom; what is larger than the frame is cut"
    )
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rot90: Probability = Field(0.0, description="of one, two or three quarter turns")
    rotate: Annotated[float, Field(ge=0, le=15)] = Field(
        0.0, description="largest rotation either way, in degrees; boxes grow with it"
    )
    jitter: NotNegative = Field(0.0, description="strength of random gain and offset, in standard deviations")
    band_dropout: Probability = Field(0.0, description="of each band to be blanked out; one always stays")
    copy_paste: Probability = Field(
        0.0,
        description="of an object of any training image to be pasted, each class as likely: itself where data have "
        "masks, else the rectangle of its box; what it covers by more than half is ignored, by three quarters gone",
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is {self.scale}, expected [smallest, largest]")
        return self


class Data(sections.Data):
    """What detection wants of images with boxes, wherever they come from."""

    resize: Literal["fit", "none"] = Field(
        "fit",
        description="fit: whole images, enlarged or reduced to fit into image_size, whichever way round; none: native "
        "pixels, larger images cut into crops for training",
    )
    crops_per_image: Positive = Field(1, description="training crops of an image in each epoch")
    instances: Literal["boxes", "masks"] | None = Field(
        None, description="what of the objects is learned; unset: masks by a detector of masks, else boxes"
    )
    overlap: Rate = Field(
        0.25,
        description="share of a tile of image_size that the next one covers again, where larger images are not fitted",
    )
    object_crops: Probability = Field(
        0.5, description="share of crops around an object, each class as often, where images are larger than crops"
    )
    empty_crops: Probability = Field(
        0.3,
        description="largest share of training crops without an object; in place of others stand crops around objects",
    )
    balanced_sampling: bool = Field(
        False, description="draw images of rare classes more often, by the root of how rare the rarest of each is"
    )
    augment: Augment = Augment()


class Loss(Section):
    """The training loss: focal for classes, over what is labelled, and one for boxes."""

    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 1.0
    gamma: NotNegative = Field(2.0, description="of the focal loss")


class Train(sections.Train):
    """How long and in which way to train."""

    monitor: Literal["loss", "map", "map_50", "f1", "froc"] | None = Field(
        None, description="picks the best checkpoint and heads the report; unset: map"
    )


class Optim(sections.Optim):
    """Optimizer and schedule, by timm."""

    warmup_epochs: sections.Count = 1
    clip_grad: AbovePositive | None = Field(1.0, description="largest norm of the gradient")


class Evaluate(sections.Evaluate):
    """What is done on held-out images after training."""

    score: Literal["auto"] | Probability | list[Probability] = Field(
        "auto",
        description="least score of an object that is reported, one for all classes or for each; auto: with the best "
        "F1 on validation, kept in the checkpoint",
    )
    scales: Annotated[list[Zoom], Field(min_length=1)] = Field(
        [1.0], description="of the images that are looked at, besides the views of tta; what is found is fused"
    )
    match: Literal["centre"] | Iou = Field(
        0.5, description="what makes a detection right: this IoU, or its centre inside the object"
    )
    max_objects: Literal["auto"] | Positive = Field(
        "auto", description="most objects found in an image; auto: twice those of the densest one, at least 100"
    )


DATA = formats.sections("boxes", Data)
if TYPE_CHECKING:

    class AnyData(Data, BoxSection):
        """What the section of every format has, once it is resolved."""

        classes: list[str]  # unset in a file only
        mean: list[float]
        std: list[float]
else:
    AnyData = formats.union(DATA)


class Recipe(sections.Recipe):
    """A whole detection experiment."""

    task: Literal["detection"]
    model: Model
    data: AnyData
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()


EXAMPLE = {
    "model": {"name": "biformer_tiny", "detector": "fcos"},
    "data": {"format": "coco", "root": "images_and_boxes", "image_size": 512, "batch_size": 8},
    "optim": {"lr": 5e-4},
    "train": {"epochs": 60},
}
