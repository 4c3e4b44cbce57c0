"""The sections that the recipes of all tasks share.

What a task adds stands in `visionattn/tasks/TASK/recipe.py`, what a data format needs at the top of
`visionattn/data/formats/FORMAT.py`.
"""

import os.path
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AbovePositive",
    "Adapter",
    "Bands",
    "Calibrated",
    "Count",
    "Data",
    "Evaluate",
    "FilePath",
    "FineTuned",
    "Fitted",
    "Lists",
    "Log",
    "Model",
    "NotNegative",
    "Optim",
    "Positive",
    "Probability",
    "Rate",
    "Ratio",
    "Recipe",
    "Section",
    "Share",
    "Teacher",
    "Train",
]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
AbovePositive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=32, le=8192)]  # pixels
Size = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]  # or [height, width]
FilePath = Annotated[Path, Field(strict=False), AfterValidator(lambda path: Path(os.path.expanduser(path)).absolute())]
Share = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
Ratio = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A closed, strict, immutable part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bands(Section):
    """Which bands trained weights have seen, and which they are to see: those of one name keep their kernels."""

    source: list[str] | None = Field(None, description="names of the weights' bands, in order")
    target: list[str] | None = Field(
        None, description="names of the images' bands, in order; one that is not among source gets the mean of all"
    )


class Model(Section):
    """The network, made by `timm.create_model`."""

    name: str = Field(description="a model of timm's registry, ours included: see `visionattn list`")
    pretrained: bool = Field(False, description="start from the published weights")
    checkpoint: FilePath | None = Field(
        None, description="start from the weights of a run of any task: its directory, a checkpoint, or any such file"
    )
    bands: Bands | None = Field(
        None,
        description="adapt first convolutions of a checkpoint or of published weights to other bands, by name; {}: all "
        "repeated or averaged",
    )
    drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    freeze: Literal["backbone"] | list[str] | None = Field(
        None, description="'backbone': train the head only (linear probe); or name patterns such as 'stages.0.*'"
    )
    args: dict[str, Any] = Field({}, description="further keyword arguments of the model's own constructor")


class Lora(Section):
    """Low-rank adapters."""

    rank: Positive = Field(8, description="of each adapter")


class Adapter(Section):
    """What is trained in place of the backbone's own weights; its norms stay as they are."""

    lora: Lora


class FineTuned(Model):
    """A network whose backbone may be adapted by a few weights."""

    adapter: Adapter | None = Field(
        None, description="such as {lora: {rank: 8}}: train low-rank adapters in the frozen backbone, and all above it"
    )

    @model_validator(mode="after")
    def _frozen_once(self) -> Self:
        if self.adapter is not None and self.freeze == "backbone":
            raise ValueError("no freeze: backbone beside adapter, which freezes the backbone's own weights itself")
        return self


class Teacher(Section):
    """A trained network that is asked what it makes of the images, and never changed."""

    name: str | None = Field(None, description="a model of timm's registry, with its published weights")
    checkpoint: FilePath | None = Field(None, description="or a run directory or checkpoint of ours")
    bands: list[Positive] | None = Field(
        None, description="the band of the images, from 1, that each of its channels is; unset: all, in their order"
    )
    image_size: Size | None = Field(None, description="unset: that which it was trained at")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.checkpoint is None):
            raise ValueError("either name or checkpoint")
        return self


class Lists(Section):
    """Text files with an image's name (or case) in each line."""

    train: FilePath | None = None
    val: FilePath | None = None
    test: FilePath | None = None


class Data(Section):
    """What every source of data shares."""

    image_size: Size = Field(224, description="pixels, one number or [height, width]")
    mean: list[float] | None = Field(
        None, description="per channel, of values in 0..1; unset: the weights' own, else measured"
    )
    std: list[AbovePositive] | None = Field(None, description="as mean")
    batch_size: Positive = 32
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="loading processes; unset: chosen from the cores"
    )
    survey: Literal["cached", "anew", "sample"] = Field(
        "cached",
        description="look at all images before training, cached: at those again whose size or time of change differs; "
        "sample: at 2000 only",
    )
    skip_bad: bool = Field(False, description="leave out (and report) images that cannot be read, instead of refusing")
    lists: Lists = Lists()
    val_fraction: Rate = Field(0.2, description="share drawn for validation where no such split is given")
    test_fraction: Rate = Field(0.0, description="share drawn for the test where no splits are given")
    fold: Count | None = Field(None, description="validate on this fold of train and val pooled, train on the others")
    folds: Annotated[int, Field(ge=2)] = 5
    split_seed: Count = Field(0, description="seed of every split that is drawn")
    labelled: Positive | None = Field(
        None, description="train on so many images of each class only, or of masks, objects or several labels in all"
    )

    @property
    def side(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def at(self, root: Path) -> Self:
        """The same section for other data that are laid out alike."""
        return self.model_copy(update={"root": root, "fold": None, "lists": Lists()})

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, expected 0 to {self.folds - 1} (folds is {self.folds})")
        return self


class Optim(Section):
    """Optimizer and schedule, by timm."""

    name: str = Field("adamw", description="an optimizer of timm: `timm.optim.list_optimizers()`")
    lr: AbovePositive = 5e-4
    weight_decay: NotNegative = 0.05
    momentum: Rate = 0.9
    args: dict[str, Any] = Field({}, description="further keyword arguments of the optimizer, such as betas")
    no_decay: list[str] = Field([], description="name patterns without weight decay, besides biases and norms")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="learning-rate factor per layer")
    schedule: Literal["cosine", "step", "plateau", "poly", "constant"] = "cosine"
    warmup_epochs: Count = 0
    warmup_lr: NotNegative = 1e-6
    min_lr: NotNegative = 1e-6
    decay_epochs: AbovePositive = Field(30, description="step: epochs between decays")
    decay_rate: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step, plateau: factor of a decay")
    patience_epochs: Count = Field(10, description="plateau: epochs without a better value before a decay")
    clip_grad: AbovePositive | None = Field(None, description="largest norm of the gradient")
    accumulate: Positive = Field(1, description="batches per optimizer step")


class Train(Section):
    """How long and in which way to train."""

    epochs: Positive = 100
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of averaged weights, which are then evaluated"
    )
    monitor: str | None = Field(None, description="the metric that picks the best checkpoint and heads the report")
    early_stopping: Positive | None = Field(None, description="epochs without a better monitored value before stopping")
    deterministic: bool = False
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False


class Evaluate(Section):
    """What is done on held-out images after training."""

    tta: list[Literal["hflip", "vflip", "rot90"]] = Field([], description="views to average predictions over")
    bootstrap: Annotated[int, Field(ge=0, le=100_000)] = Field(1000, description="resamples behind the 95 % intervals")
    explain: bool = Field(True, description="show in the report what the worst and the best images depend on")


class Fitted(Section):
    """What images that nothing was learned from have said of a network's probabilities; fit and calibrate write it."""

    images: Annotated[int, Field(gt=0, description="number of images, of masks that of cases; of a group one counts")]
    source: str = Field(description="val, or the other labelled data")
    temperature: AbovePositive = Field(1.0, description="of the logits, which are divided by it")
    least: Probability | None = Field(None, description="probability that puts a class into the set of an image")
    thresholds: list[Probability | None] | None = Field(
        None, description="of each class, the probability from which a pixel may be of it; unset where none is enough"
    )
    unfamiliar: NotNegative | None = Field(None, description="distance from the training images that few others reach")


class Calibrated(Evaluate):
    """What is done on held-out images, from which it is learned how far probabilities can be trusted."""

    calibration: Literal["temperature"] | None = Field(
        None, description="make probabilities agree with how often they come true, by one number measured on validation"
    )
    conformal: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="such as 0.1: say what else it may be, so that at most this share of the truth is missed"
    )
    fitted: Fitted | None = Field(None, description="unset: measured at the end of training, kept in the checkpoint")


class Log(Section):
    """Trackers besides metrics.csv."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "visionattn"


class Recipe(Section):
    """A whole experiment; each task has its own, with its `task`, `loss` and the `data` of the formats it takes.

    Relative paths in a recipe start from the folder in which the command runs; in paths, `${recipe}` is the folder of
    the recipe's own file. `extends: NAME` starts from another recipe.
    """

    task: str
    model: Model
    data: Data
    loss: Section
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    trainer: dict[str, Any] = Field({}, description="handed to lightning.Trainer as it is")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs}, but train.epochs is {self.train.epochs}: "
                "the warm-up would never end"
            )
        return self
