"""What every task shares: how a network is optimized and guarded, and checkpoints that explain themselves.

A task is a folder of `visionattn.tasks` with these files, and the file `task` with these functions:

- `recipe`: `Recipe`, what a recipe of the task says, and `EXAMPLE`, one to start from; torch-free.
- `transforms`, `losses`, `metrics`: `METRICS` says what is measured, for reports.
- `evaluation`: `measure(predictions, samples, spec, split) -> Evaluation`, on one process.
- `report`: `sections(evaluation) -> html`. `check`: `findings(dataset, spec) -> (rows, problems, notes)`.
- `task`:
  `refuse_names(spec)`: of models, decoders, optimizers that there are not;
  `resolve(spec, dataset) -> (spec, dataset)`: what the recipe leaves open, provisional before samples are read;
  `make(spec, dataset) -> Task`: the network, loss and metrics; without a data set as a checkpoint needs it;
  `training_set(dataset, spec)`, `evaluation_set(samples, data)`, `collate`: what loaders read;
  `predictions(task, samples, spec, fabric)`: of unlabelled samples, in order;
  `open_writer(spec, out, polygons)`, `described(case, predictions, spec)`: these as files, and as plain data;
  of masks also `class_numbers`, of boxes `format`;
  `refuse_other(spec, dataset)`: of labelled samples of another kind; `class_names(spec)`.

Configuration stops at `task`: networks, losses and metrics take plain parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric import Fabric
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset as TorchDataset
from torchmetrics import MeanMetric

from visionattn.backbones.backbone import LAYOUTS_KEPT, Backbone
from visionattn.data import formats
from visionattn.data.loaders import make_loader, seed_of
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Dataset, Sample
from visionattn.data.survey import mean_std
from visionattn.errors import UserError
from visionattn.inference.uncertainty import cases_needed
from visionattn.models import adapters
from visionattn.models.ensemble import each
from visionattn.models.networks import freeze, refuse_unknown, refuse_unknown_model, statistics_of
from visionattn.recipe.sections import Calibrated, Fitted, Optim, Recipe, Train
from visionattn.report.evaluation import Evaluation

__all__ = ["Evidence", "Task", "predict_in_batches", "refuse_few_crops", "refuse_in_vain", "refuse_names", "statistics"]

CHECKED_EVERY = 20  # steps: where losses lie on a GPU or in several processes, looking at each would stop all of them


class Evidence(NamedTuple):
    """What a network believes of an image, or a part of one, whose truth is known.

    Attributes:
        index: position of the sample.
        probabilities: (N, K), of an image or of some of its pixels.
        targets: (N,) class numbers, or (N, K) of 0 and 1.
        counts: (K, BINS) of the pixels of each class, by how probable their class is held.
        distance: of the features from those of training images.
    """

    index: int  # type: ignore[assignment]  # in place of tuple.index, which nobody calls
    probabilities: Tensor
    targets: Tensor
    counts: Tensor | None = None
    distance: float | None = None


class Task(pl.LightningModule):
    """A network and how it is trained; a subclass adds the loss and the metrics.

    Args:
        network: the network, with timm's `no_weight_decay` and `group_matcher` where it has them.
        optim: optimizer and schedule.
        train: freezing is the network's, the rest (channels-last, seed) comes from here.
        frozen: "backbone", name patterns, or None.
        monitored: the logged value that picks the best checkpoint, such as "val/accuracy".
        names: the name of a training sample from its index, for messages.

    Attributes:
        provenance: plain data saved with every checkpoint, enough to use it without its run.
        facts: plain data that environment.json keeps; where one has changed the run is not resumed.
        doubting: masks come with maps of what makes them doubtful.
        fitted: what is known of the probabilities.
        bank: (N, D) features of training images, which others are compared with.
    """

    evaluates_last = False  # besides the best weights
    calls_whole = False  # the network in training, and none of its parts, so that its parameters can be shared out
    doubting = False
    fitted: Fitted | None = None
    bank: Tensor | None = None

    def __init__(
        self,
        network: Any,
        optim: Optim,
        train: Train,
        frozen: str | list[str] | None,
        monitored: str,
        names: Callable[[int], str],
    ) -> None:
        super().__init__()
        self.network: nn.Module = network
        self.optim, self.train_spec, self.monitored = optim, train, monitored
        self.names, self.provenance, self.facts = names, dict[str, Any](), dict[str, Any]()
        self.val_loss = MeanMetric()
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []  # batch, its samples, its loss
        freeze(network, frozen)
        _optimizer(network, optim)  # wrong arguments are told now, not when training begins
        if train.channels_last:
            network.to(memory_format=torch.channels_last)
        if train.grad_checkpointing:
            network.set_grad_checkpointing()
        if train.compile:
            ours = any(isinstance(module, Backbone) for module in network.modules())
            network.compile(options=LAYOUTS_KEPT if ours else None)

    @property
    def looks(self) -> int:
        """How many predictions those are the mean of that this gives."""
        return 1

    def forward(self, image: Tensor, **options: Any) -> Any:
        return self.network(self._laid_out(image), **options)

    def each(self, image: Tensor) -> Iterator[Tensor]:
        """The logits of each network that is asked."""
        yield from each(self.network, self._laid_out(image))

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.to(memory_format=torch.channels_last) if self.train_spec.channels_last else image

    @property
    def maximize(self) -> bool:
        return not self.monitored.endswith("loss")

    def configure_optimizers(self) -> Any:
        spec = self.optim
        optimizer = _optimizer(self.network, spec)
        steps = self._steps_per_epoch()
        self.warmup_steps = spec.warmup_epochs * steps
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="constant" if spec.schedule == "plateau" else spec.schedule,
            num_epochs=self.train_spec.epochs,
            warmup_epochs=spec.warmup_epochs,
            warmup_lr=spec.warmup_lr,
            min_lr=spec.min_lr,
            decay_epochs=spec.decay_epochs,
            decay_rate=1.0 if spec.schedule == "poly" else spec.decay_rate,  # timm: the power of poly
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        schedules: list[dict[str, Any]] = [{"scheduler": scheduler, "interval": "step"}]
        if spec.schedule == "plateau":  # torch's: timm deprecates its own, which cannot be resumed
            mode: Literal["min", "max"] = "max" if self.maximize else "min"
            plateau = ReduceLROnPlateau(optimizer, mode, spec.decay_rate, spec.patience_epochs, min_lr=spec.min_lr)
            schedules.append({"scheduler": plateau, "interval": "epoch", "monitor": self.monitored})
        return [optimizer], schedules

    def _steps_per_epoch(self) -> int:
        """Counted here, since Lightning's own counts start the loader, on a resume before it knows the epoch."""
        trainer: Any = self.trainer  # which does not declare its data module
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // self.optim.accumulate)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.optim.schedule != "plateau" or (
            isinstance(scheduler, Scheduler) and self.global_step <= self.warmup_steps
        ):
            scheduler.step_update(self.global_step)

    def on_train_epoch_end(self) -> None:
        """The plateau schedule steps here: Lightning would do it after the epoch's checkpoint has been written."""
        self._refuse_infinite()
        if self.optim.schedule == "plateau" and self.current_epoch >= self.optim.warmup_epochs:
            schedulers: Any = self.lr_schedulers()  # timm's and the plateau
            schedulers[1].step(self.trainer.callback_metrics[self.monitored])

    def on_train_epoch_start(self) -> None:
        """Every epoch starts from a seed of its own, so that a resumed run goes on as the uninterrupted one."""
        rank = [self.global_rank] if self.global_rank else []  # each process has its own dropout and mixup
        pl.seed_everything(seed_of(self.train_spec.seed, self.current_epoch, *rank) % 2**32, verbose=False)
        self.train()
        for module in self.network.modules():
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()  # a frozen batch norm keeps its statistics too

    def log_loss(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Log a training loss and return it.

        Raises:
            UserError: a loss that is not a number, this one or one of the last steps, with its epoch, batch and images.
        """
        self._unchecked.append((batch_idx, batch["index"], loss.detach()))
        alone = loss.device.type == "cpu" and self.trainer.world_size == 1
        if len(self._unchecked) >= (1 if alone else CHECKED_EVERY):
            self._refuse_infinite()
        size = len(batch["index"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def log_validation_loss(self, loss: Tensor, size: int) -> None:
        """Log the mean loss of `size` samples; by torchmetrics: Lightning's own mean over processes truncates sizes."""
        self.val_loss.update(loss, size)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)

    def _refuse_infinite(self) -> None:
        if not self._unchecked:
            return
        losses = torch.stack([loss for *_, loss in self._unchecked])
        finite = torch.isfinite(losses).tolist()
        steps, self._unchecked = self._unchecked, []
        if self.trainer.strategy.reduce_boolean_decision(all(finite)):
            return
        first = finite.index(False) if False in finite else 0
        batch, index, loss = steps[first]
        images = ", ".join(self.names(i) for i in index[:5].tolist())
        raise UserError(
            f"the loss became {loss.item()} in epoch {self.current_epoch + 1}, batch {batch + 1} (images {images}, "
            "...); training stopped and the checkpoints of the epochs before are kept. "
            f"Lower optim.lr (now {self.optim.lr:g}), set optim.clip_grad, or use another train.precision"
        )

    def evidence(self, batch: dict[str, Any]) -> list[Evidence]:
        """What a labelled batch says of the probabilities, with `fitted` as it is."""
        raise NotImplementedError

    def complete(self, evaluation: Evaluation) -> None:
        """Add what is measured of the weights themselves, whatever split is evaluated; on the first process only."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights are kept as they are used, merged with adapters, and where there are any as they go on too."""
        checkpoint["visionattn"] = self.provenance
        plain = adapters.merged(checkpoint["state_dict"])
        if plain.keys() != checkpoint["state_dict"].keys():
            checkpoint |= {"state_dict": plain, "unmerged": checkpoint["state_dict"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "unmerged" in checkpoint:
            checkpoint["state_dict"] = checkpoint.pop("unmerged")


def refuse_names(spec: Recipe) -> None:
    """Raises UserError for a model or an optimizer that there is not."""
    refuse_unknown_model("model.name", spec.model.name)
    refuse_unknown("optim.name", spec.optim.name, list(map(str, list_optimizers())), "timm.optim.list_optimizers()")


def refuse_in_vain(evaluate: Calibrated, samples: Sequence[Sample]) -> None:
    """Raises UserError for a promise that so few labelled samples, or such, cannot be the ground of."""
    if evaluate.conformal is None:
        return
    if np.ndim(samples[0].label):
        raise UserError("evaluate.conformal is for one class an image, but the images have several labels each")
    noun = "cases" if samples[0].label is None else "images"
    groups, needed = len({sample.group for sample in samples}), cases_needed(evaluate.conformal)
    if groups < needed:
        raise UserError(
            f"evaluate.conformal is {evaluate.conformal:g}: for that {needed} validation {noun} of different groups "
            f"are needed, but there are {groups}: set it to at least {1 / (groups + 1):.3g}, or hold out more"
        )


def statistics(spec: Recipe, dataset: Dataset) -> dict[str, list[float]]:
    """`mean` and `std` of each channel: the recipe's, else those of published weights, else as measured.

    0 and 1 stand for what would be measured as long as the samples have not been read.

    Raises:
        UserError: for another number of channels than the images have.
    """
    data, channels = spec.data, dataset.channels
    resolved = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if dataset.readings:
        mean, std = mean_std(dataset.readings["train"])
        resolved = {key: [float(f"{v:.7g}") for v in values] for key, values in (("mean", mean), ("std", std))}
    if data.mean is None:
        resolved |= statistics_of(spec.model, channels, formats.module_of(data).KIND.unit_range)
    resolved |= {key: given for key in ("mean", "std") if (given := getattr(data, key)) is not None}
    for key, values in resolved.items():
        if len(values) != channels:
            raise UserError(f"data.{key} has {len(values)} values, but the images have {channels} channels")
    return resolved


def refuse_few_crops(data: Any, dataset: Dataset) -> None:
    """Raises UserError where an epoch has not enough training crops for a batch."""
    images = len(dataset.splits["train"])
    crops, enough = images * data.crops_per_image, -(-data.batch_size // images)
    if crops < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but an epoch has only {crops} training crops ({images} images, "
            f"data.crops_per_image {data.crops_per_image}): set data.batch_size to at most {crops}, or "
            f"data.crops_per_image to at least {enough}"
        )


def _optimizer(network: nn.Module, spec: Optim) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters, grouped by weight decay and, if asked for, by depth."""

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        keep: set[str] = getattr(network, "no_weight_decay", set)()
        settings: dict[str, Any] = {"weight_decay": spec.weight_decay, "no_weight_decay_list": [*keep, *spec.no_decay]}
        if spec.layer_decay is None:
            return param_groups_weight_decay(network, **settings)
        return param_groups_layer_decay(network, layer_decay=spec.layer_decay, **settings)

    try:
        return create_optimizer_v2(
            network, opt=spec.name, lr=spec.lr, momentum=spec.momentum, param_group_fn=groups, **spec.args
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.args is {spec.args}: {error}") from None


class _Readable(TorchDataset):
    """Items of a dataset, or the prediction that says why one cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except UserError as error:
            return Prediction(self.dataset.sample_of(number), error=str(error))


@torch.inference_mode()
def predict_in_batches(
    task: Task, dataset: Any, collate: Callable[[list], Any], batch_size: int, workers: int, fabric: Fabric
) -> Iterator[Prediction]:
    """What a task says of each item of an evaluation set, in order, on the device and in the precision of `fabric`."""
    for items in make_loader(_Readable(dataset), batch_size, workers, collate=list):
        readable = [item for item in items if not isinstance(item, Prediction)]
        predicted: Iterator[Prediction] = iter(())
        if readable:
            with fabric.autocast():
                predicted = iter(task.predict_step(fabric.to_device(collate(readable))))
        for item in items:
            yield item if isinstance(item, Prediction) else next(predicted)
