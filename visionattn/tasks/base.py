"""What every task shares: making the network, optimizing it, guarding it, and checkpoints that explain themselves.

Configuration stops here: networks, losses and metrics take plain parameters.
"""

import difflib
import importlib
import os
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import visionattn.recipe as schema
from visionattn.data.loaders import seed_of
from visionattn.errors import UserError

__all__ = [
    *("AtomicCheckpointIO", "Task", "check_names", "load_checkpoint", "make_network", "module_of", "own_statistics"),
    "start_from",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all, in whichever moment the process is killed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        partial = f"{path}.partial"
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain data only: no file can execute code here.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each raise their own
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of tensors and plain data ({reason})") from None


def module_of(spec: schema.Recipe) -> ModuleType:
    """`visionattn.tasks.TASK.task`: each has `build`, `restore`, `labelled` and
    `evaluate_split`."""
    return importlib.import_module(f"visionattn.tasks.{spec.task}.task")


def check_names(spec: schema.Recipe) -> None:
    """Refuse, before any file of the data is opened, a model, a decoder or an optimizer that there is not."""
    if not timm.is_model(spec.model.name):
        known = timm.list_models()
        raise _unknown("model.name", spec.model.name, "model", known, "visionattn list, timm.list_models()")
    if spec.optim.name not in list_optimizers():
        raise _unknown("optim.name", spec.optim.name, "optimizer", list_optimizers(), "timm.optim.list_optimizers()")
    if spec.task == "segmentation":
        from visionattn.models.segmenters import (
            DECODERS,  # of segmentation_models_pytorch, which classification does without
        )

        decoder = spec.model.decoder
        if decoder is not None and decoder not in DECODERS:
            where = f"visionattn list --decoders: {', '.join(DECODERS)}"
            raise _unknown("model.decoder", decoder, "decoder", DECODERS, where)


def _unknown(key: str, name: str, kind: str, known: Collection[str], where: str) -> UserError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return UserError(f"{key} is {name!r}: unknown {kind}{hint} ({where})")


def make_network(spec: schema.Model, num_classes: int, channels: int, image_size: tuple[int, int]) -> nn.Module:
    """The network of a recipe's `model` section.

    Raises:
        UserError: unknown argument, no published weights, or a checkpoint that does not fit.
    """
    arguments = dict(spec.args)
    for name in ("drop_rate", "drop_path_rate"):
        if getattr(spec, name):
            arguments[name] = getattr(spec, name)
    default = timm.get_pretrained_cfg(spec.name)
    if default is not None and default.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    try:
        network = timm.create_model(
            spec.name, pretrained=spec.pretrained, num_classes=num_classes, in_chans=channels, **arguments
        )
    except Exception as error:  # each model raises its own for arguments that it cannot take
        reason = str(error) or type(error).__name__
        raise UserError(f"model {spec.name} cannot be made with {arguments or 'its defaults'}: {reason}") from None
    if spec.checkpoint is not None:
        start_from(network, spec, num_classes)
    return network


def own_statistics(spec: schema.Recipe, network: nn.Module, channels: int) -> dict[str, list[float]]:
    """Mean and std that published weights were trained with, unless the recipe says otherwise."""
    cfg = network.pretrained_cfg
    if not spec.model.pretrained or spec.data.mean is not None or len(cfg["mean"]) != channels:
        return {}
    return {"mean": list(cfg["mean"]), "std": list(cfg["std"])}


def start_from(network: nn.Module, spec: schema.Model, num_classes: int) -> None:
    """Load a checkpoint into the network; the head may differ in its class count, nothing else may."""
    path = spec.checkpoint.expanduser()
    state = load_checkpoint(path)
    state = state.get("state_dict", state.get("model", state))
    state = {key.removeprefix("network."): value for key, value in state.items()}
    own = network.state_dict()
    classifier = tuple(network.get_classifier().state_dict(prefix=f"{network.pretrained_cfg['classifier']}."))
    differ = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    if differ and differ <= set(classifier):
        print(f"{path}: head of {len(state[classifier[0]])} classes left out, the new one has {num_classes}")
        state = {key: value for key, value in state.items() if key not in classifier}
        differ = set()
    missing, unknown = own.keys() - state.keys() - set(classifier), state.keys() - own.keys()
    if differ or missing or unknown:
        raise UserError(
            f"{path}: not a checkpoint of {spec.name}: {_differences(own, state, missing, unknown, differ)}"
        )
    network.load_state_dict(state, strict=False)


def _differences(own: dict, state: dict, missing: set, unknown: set, differ: set) -> str:
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in sorted(differ)]
    parts = []
    for title, names in (("missing", sorted(missing)), ("unknown", sorted(unknown)), ("other shape", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


class Task(pl.LightningModule):
    """A network and how it is trained; a subclass adds the loss and the metrics.

    Args:
        network: the network, with timm's `no_weight_decay` and `group_matcher` where it has them.
        optim: optimizer and schedule.
        train: freezing is the network's, the rest (channels-last, seed) comes from here.
        freeze: "backbone", name patterns, or None.
        monitored: the logged value that picks the best checkpoint, such as "val/accuracy".
        names: the name of a training image from its index, for messages.
        provenance: plain data saved with every checkpoint (the recipe, the classes), enough to use it without its run.
    """

    evaluates_last = False  # besides the best weights

    def __init__(
        self,
        network: nn.Module,
        optim: schema.Optim,
        train: schema.Train,
        freeze: str | list[str] | None,
        monitored: str,
        names: Callable[[int], str],
        provenance: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        self.optim, self.train_spec, self.monitored = optim, train, monitored
        self.names, self.provenance = names, provenance
        _freeze(network, freeze)
        _optimizer(network, optim)  # wrong arguments are told now, not when training begins
        if train.channels_last:
            network.to(memory_format=torch.channels_last)
        if train.grad_checkpointing:
            network.set_grad_checkpointing()
        if train.compile:
            network.compile()

    def forward(self, image: Tensor) -> Tensor:
        if self.train_spec.channels_last:
            image = image.to(memory_format=torch.channels_last)
        return self.network(image)

    @property
    def maximize(self) -> bool:
        return not self.monitored.endswith("loss")

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
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
        schedules = [{"scheduler": scheduler, "interval": "step"}]
        if spec.schedule == "plateau":  # torch's: timm deprecates its own, which cannot be resumed
            mode = "max" if self.maximize else "min"
            plateau = ReduceLROnPlateau(optimizer, mode, spec.decay_rate, spec.patience_epochs, min_lr=spec.min_lr)
            schedules.append({"scheduler": plateau, "interval": "epoch", "monitor": self.monitored})
        return [optimizer], schedules

    def _steps_per_epoch(self) -> int:
        """Counted here, since Lightning's own counts start the loader, on a resume before it knows the epoch."""
        batches, limit = len(self.trainer.datamodule.train_dataloader()), self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // self.optim.accumulate)

    def lr_scheduler_step(self, scheduler: Scheduler | ReduceLROnPlateau, metric: Any) -> None:
        if self.optim.schedule != "plateau" or (
            isinstance(scheduler, Scheduler) and self.global_step <= self.warmup_steps
        ):
            scheduler.step_update(self.global_step)

    def on_train_epoch_end(self) -> None:
        """The plateau schedule steps here: Lightning would do it after the epoch's checkpoint has been written."""
        if self.optim.schedule == "plateau" and self.current_epoch >= self.optim.warmup_epochs:
            _, plateau = self.lr_schedulers()
            plateau.step(self.trainer.callback_metrics[self.monitored])

    def on_train_epoch_start(self) -> None:
        """Every epoch starts from a seed of its own, so that a resumed run goes on as the uninterrupted one."""
        pl.seed_everything(seed_of(self.train_spec.seed, self.current_epoch) % 2**32, verbose=False)
        self.train()
        for module in self.network.modules():
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()  # a frozen batch norm keeps its statistics too

    def check_finite(self, loss: Tensor, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Stop at the first loss that is not a number.

        Raises:
            UserError: with the epoch, the batch and its images.
        """
        if torch.isfinite(loss):
            return
        images = ", ".join(self.names(i) for i in batch["index"][:5].tolist())
        raise UserError(
            f"the loss became {loss.item()} in epoch {self.current_epoch}, batch {batch_idx} (images {images}, ...); "
            "training stopped and the checkpoints of the epochs before are kept. "
            f"Lower optim.lr (now {self.optim.lr:g}), set optim.clip_grad, or use another train.precision"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["visionattn"] = self.provenance


def _optimizer(network: nn.Module, spec: schema.Optim) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters, grouped by weight decay and, if asked for, by depth."""

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        keep = getattr(network, "no_weight_decay", set)()
        settings = {"weight_decay": spec.weight_decay, "no_weight_decay_list": [*keep, *spec.no_decay]}
        if spec.layer_decay is None:
            return param_groups_weight_decay(network, **settings)
        return param_groups_layer_decay(network, layer_decay=spec.layer_decay, **settings)

    try:
        return create_optimizer_v2(
            network, opt=spec.name, lr=spec.lr, momentum=spec.momentum, param_group_fn=groups, **spec.args
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.args is {spec.args}: {error}") from None


def _freeze(network: nn.Module, freeze: str | list[str] | None) -> None:
    if freeze is None:
        return
    if freeze == "backbone":
        head = {id(p) for p in network.get_classifier().parameters()}
        backbone = getattr(network, "encoder", network)
        frozen = [p for p in backbone.parameters() if id(p) not in head]
    else:
        names = dict(network.named_parameters())
        useless = [pattern for pattern in freeze if not any(fnmatch(name, pattern) for name in names)]
        if useless:
            some = ", ".join(list(names)[:: max(1, len(names) // 5)][:5])
            raise UserError(f"model.freeze: no parameter matches {', '.join(useless)}; names look like {some}")
        frozen = [p for name, p in names.items() if any(fnmatch(name, pattern) for pattern in freeze)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError("model.freeze leaves nothing to train")
