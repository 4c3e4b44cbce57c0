"""What a notebook uses: train, check, load and use models from Python; the command line is thin over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import nn

from visionattn import recipe as recipes
from visionattn.data import formats
from visionattn.data.boxes import Boxes
from visionattn.data.images import pixels_of
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, cases
from visionattn.errors import UserError
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Fitted
from visionattn.report.evaluation import Evaluation, read_history
from visionattn.runs import calibrate as calibrating
from visionattn.runs import check as checking
from visionattn.runs import evaluate as evaluating
from visionattn.runs import fit as fitting
from visionattn.runs import predict as predicting
from visionattn.runs.checkpoints import Trained, load_ensemble
from visionattn.runs.directory import RunDirectory

if TYPE_CHECKING:
    import pandas

    from visionattn.tools.explanations import Explanation
    from visionattn.tools.export import Exported

__all__ = ["Predicted", "PredictedTable", "Run", "Table", "check", "fit", "load"]

ImageLike = str | Path | Image.Image | np.ndarray


def fit(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    run: str | Path | None = None,
) -> Run:
    """Train, evaluate and report what a recipe says.

    Args:
        recipe: a path, the name of a shipped recipe, or the recipe itself as a dict.
        overrides: values that replace the recipe's, as {"train.epochs": 5} or ["train.epochs=5"].
        run: the run directory to make; unset: runs/NAME-DATE-TIME.

    Returns:
        the finished run.

    Raises:
        UserError: anything that can be mended, before the run directory exists unless the loss stops being a number.
    """
    spec = _read(recipe, overrides)
    name = "recipe" if isinstance(recipe, Mapping) else Path(recipe).stem
    return Run(fitting.fit(spec, name, None if run is None else _path(run, "run")))


def check(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> checking.Findings:
    """Look through a recipe and its data before training; see `fit` for the arguments.

    Returns:
        what there is: `problems`, `notes`, and as text or HTML the whole table.
    """
    return checking.check(_read(recipe, overrides))


def load(path: str | Path, *others: str | Path) -> Run:
    """A run directory or a checkpoint file; of several, such as folds, the mean of what they predict.

    Raises:
        UserError: neither, or models that cannot be averaged.
    """
    run = Run(_path(path, "path"), *(_path(other, "path") for other in others))
    run.trained  # noqa: B018 - what cannot be loaded is told now
    return run


def _read(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> Recipe:
    if not isinstance(overrides, list | tuple | Mapping) or not all(isinstance(key, str) for key in overrides):
        raise UserError(f"overrides is {overrides!r}: expected a dict, or a list such as ['train.epochs=5']")
    if isinstance(recipe, Mapping):
        return recipes.of_mapping(recipe, overrides)
    return recipes.load(_path(recipe, "recipe", "a path, the name of a shipped recipe, or a dict"), overrides)


def _path(given: str | Path, name: str, expected: str = "a path") -> Path:
    if not isinstance(given, str | Path) or not str(given):
        raise UserError(f"{name} is {given!r}: expected {expected}")
    return Path(given)


class Table(list[dict[str, Any]]):
    """Rows of a table."""

    def to_pandas(self) -> pandas.DataFrame:
        """As a data frame. Raises ImportError where pandas is not installed."""
        import pandas

        return pandas.DataFrame(list(self))

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(name for row in self for name in row))
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{_text(row.get(name))}</td>' for name in columns)}</tr>" for row in self)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))


@dataclass(frozen=True)
class Predicted:
    """What a model says of one image, volume or scene.

    Attributes:
        name: path of the file, or `image[0]` for what was given as pixels.
        label: the predicted class, or labels joined by ;. None for masks.
        probabilities: by class name. None for masks.
        boxes: the objects, see `visionattn.data.boxes`. None for anything else.
        set: names of the classes that it may be of, the likeliest first. None where nothing was promised of such sets.
        doubts: what makes the prediction doubtful, by name: numbers, of masks maps (H, W).
        mask: (H, W) uint8 class numbers; of volumes (slices, rows, columns). 255 where there are no data.
        classes: names of the class numbers.
        features: (D,) of a network that has learned without labels. None for anything else.
        error: why it cannot be read; then there is nothing else.
    """

    name: str
    classes: list[str]
    label: str | None = None
    probabilities: dict[str, float] | None = None
    set: list[str] | None = None
    doubts: Mapping[str, Any] = field(default_factory=dict)
    mask: np.ndarray | None = None
    boxes: Boxes | None = None
    features: np.ndarray | None = None
    error: str | None = None


class PredictedTable(list[Predicted]):
    """Predictions in the order of what was given."""

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each: probabilities by class, of masks the share of pixels, of objects the number of each class."""
        return Table(self._rows()).to_pandas()

    def _rows(self) -> Iterator[dict[str, Any]]:
        for one in self:
            row: dict[str, Any] = {"name": one.name, "label": one.label}
            if one.probabilities is not None:
                row |= one.probabilities
                row |= {} if one.set is None else {"set": ";".join(one.set), "set_size": len(one.set)}
                row |= one.doubts
            if one.mask is not None:
                row.pop("label")
                row |= {name: float((one.mask == k).mean()) for k, name in enumerate(one.classes)}
            if one.features is not None:
                row.pop("label")
                row |= {f"f{k}": float(value) for k, value in enumerate(one.features, 1)}
            if one.boxes is not None:
                row.pop("label")
                row |= {name: int((one.boxes.labels == k).sum()) for k, name in enumerate(one.classes)}
            yield row | ({"error": one.error} if one.error else {})

    def _repr_html_(self) -> str:
        return Table(self._rows())._repr_html_()


class Run:
    """A trained network with what is known of it: a run directory, or a checkpoint file alone.

    Of several runs the networks are asked together; what is told of a run is told of the first one.
    """

    def __init__(self, path: Path, *others: Path) -> None:
        self.path, self._others = path, others

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def trained(self) -> Trained:
        """The best weights with the recipe that they were trained by."""
        return load_ensemble([self.path, *self._others])

    @property
    def recipe(self) -> Recipe:
        return self.trained.recipe

    @property
    def model(self) -> nn.Module:
        """The network with its best weights, in evaluation mode; takes normalised images."""
        return self.trained.task.network.eval()

    @property
    def _directory(self) -> RunDirectory:
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a checkpoint file: only a run directory has a history and a report")
        return RunDirectory(self.path)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """All that was measured, by split."""
        return {evaluation.folder.name: evaluation for evaluation in self._directory.evaluations}

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """The overall metrics of each split."""
        return {name: evaluation.overall for name, evaluation in self.evaluations.items()}

    @property
    def history(self) -> Table:
        """A row for each epoch, as metrics.csv."""
        rows = read_history(self._directory.path)
        return Table({name: float(cell) if cell else None for name, cell in row.items()} for row in rows)

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return self._directory.path / "report.html"

    def evaluate(self, data: str | Path | None = None, split: str | None = None) -> Evaluation:
        """Measure the model on its own held-out samples or on other labelled ones; nothing is written.

        Args:
            data: other labelled samples, laid out as those of the recipe.
            split: train, val or test; unset: test where there is one, else val.
        """
        return evaluating.evaluate_trained(self.trained, None if data is None else _path(data, "data"), split)

    def calibrate(
        self,
        data: str | Path | None = None,
        split: str | None = None,
        *,
        conformal: float | None = None,
        ood: str | None = None,
    ) -> Fitted:
        """Measure on labelled images how far the probabilities can be trusted, and keep it in the checkpoint.

        Runs of all folds are calibrated together, each on the images that it was validated on, and keep it each.

        Args:
            data: other labelled samples, laid out as those of the recipe.
            split: train, val or test; unset: val where there is one.
            conformal: share of the truth that sets may miss.
            ood: "knn" tells images that are like none of those trained on.
        """
        if self._others:
            if data is not None or split is not None or ood is not None:
                raise UserError(
                    "folds are calibrated together on what each was validated on, without data, split or ood"
                )
            fitted = calibrating.calibrate_folds([self.path, *self._others], conformal)
        else:
            data = None if data is None else _path(data, "data")
            fitted = calibrating.calibrate(self.path, data, split, conformal, ood)
        self.__dict__.pop("trained", None)
        return fitted

    def predict(self, images: ImageLike | Sequence[ImageLike], uncertainty: bool = False) -> PredictedTable:
        """What the model says of images.

        Args:
            uncertainty: with masks, maps of what makes them doubtful.
            images: a path of a file or folder, a PIL image, an array (H, W) or (H, W, C), or a list of such. Arrays
                have the values of the files that the model was trained on.

        Raises:
            UserError: a path is missing or not of the model's format, an array that is no image.
        """
        by_case, problems = samples_of(images, self.recipe)
        samples = [sample for case in by_case for sample in case]
        owner = [number for number, case in enumerate(by_case) for _ in case]
        spec, kind = self.recipe, part_of(self.recipe.task, "task")
        self.trained.task.doubting = uncertainty
        predicted = groupby(predicting.predictions(self.trained, samples), key=lambda p: owner[p.index])
        results = PredictedTable()
        for number, parts in predicted:
            case, first = by_case[number], owner.index(number)
            results.append(_described(case, [p._replace(index=p.index - first) for p in parts], spec, kind))
        classes = kind.class_names(spec)
        results += [Predicted(problem.split(":")[0], classes, error=problem) for problem in problems]
        return results

    def export(
        self,
        to: str = "onnx",
        out: str | Path | None = None,
        *,
        size: int | str | Sequence[int | str] = (),
        precision: str | Sequence[str] = (),
        data: str | Path | None = None,
    ) -> Exported:
        """Write the network as a file that runs without visionattn, into a new folder.

        Images (B, C, H, W) float32, values in 0..1 of uint8 and 16-bit files and as they are of scenes; normalisation,
        temperature and probabilities are in the graph. Beside it: model.json (all that has to be known, also in the
        file's metadata), check.json (what was measured), and of ONNX predict.py, which needs numpy and onnxruntime.

        Args:
            to: onnx, pt2, torchscript or safetensors (weights only).
            out: the folder; unset: `export-FORMAT` in the run directory, or beside the checkpoint.
            size: of images, such as 224 or "224,320"; "any": of all sizes, refused where the network's graph
                depends on them; several: a file each; unset: that of the recipe.
            precision: "fp16", "int8" (weights of matrices), or both: of ONNX a smaller file too, refused where it
                loses more than a point of accuracy.
            data: images to check on; unset: the recipe's validation images.

        Raises:
            UserError: the network cannot be exported so, or the file's results are not the network's; then nothing is
                left.
        """
        from visionattn.tools.export import export

        base = self.path if self.path.is_dir() else self.path.parent
        out = base / f"export-{to}" if out is None else _path(out, "out")
        return export(self.trained, to, out, size, precision, None if data is None else _path(data, "data"))

    def publish(self, out: str | Path, *, licence: str | None = None, data_licence: str | None = None) -> Path:
        """Write a folder for the Hugging Face hub: weights, configuration, recipe, metrics and a card; nothing is sent.

        `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the very network from it.

        Args:
            out: the folder to make.
            licence: of the weights, such as "apache-2.0"; unset: the strictest of code, weights that training started
                from, and data.
            data_licence: of the training data.

        Raises:
            UserError: no run directory; no licence that others may freely use follows, and none is given.
        """
        from visionattn.tools.publish import publish

        return publish(self.path, _path(out, "out"), licence, data_licence)

    def explain(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> list[Explanation]:
        """What predictions depend on, see `visionattn.explain`."""
        from visionattn.tools.explanations import explain

        return explain(self, images, **options)

    def _repr_html_(self) -> str:
        metrics = (
            Table({"split": name, **values} for name, values in self.metrics.items()) if self.path.is_dir() else Table()
        )
        table = metrics._repr_html_() if metrics else ""
        return f"<b>{escape(str(self.path))}</b>: {escape(self.recipe.model.name)}, {self.recipe.task}{table}"


def _described(case: list[Sample], parts: list[Prediction], spec: Recipe, kind: Any) -> Predicted:
    error = next((part.error for part in parts if part.error is not None), None)
    values = {"error": error} if error else kind.described(case, parts, spec)
    return Predicted(name=case[0].case, classes=kind.class_names(spec), **values)


def samples_of(images: ImageLike | Sequence[ImageLike], spec: Recipe) -> tuple[list[list[Sample]], list[str]]:
    """Case by case the samples of what is given, in its order, and a line for each thing that cannot be read."""
    given = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    channels = len(spec.data.mean or ())
    by_case: list[list[Sample]] = []
    problems: list[str] = []
    for i, image in enumerate(given):
        if isinstance(image, str | Path):
            samples, unread = formats.unlabelled([Path(image)], spec.data, channels)
            problems += unread
            by_case += [[samples[k] for k in members] for members in cases(samples).values()]
        else:
            by_case.append([formats.of_array(f"image[{i}]", pixels_of(image, f"image[{i}]"), spec.data, channels)])
    return by_case, problems
