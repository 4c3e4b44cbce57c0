"""`trainer.strategy: fsdp`: each process has a share of the parameters, gradients and optimizer states.

By PyTorch's `fully_shard` (FSDP2) below Lightning's `ModelParallelStrategy`: what Lightning calls `fsdp` is FSDP1, that
no CPU can try. The blocks that timm groups parameters by are gathered one after the other. Checkpoints are files with
whole weights and optimizer states, as those of any run, and the trained network is evaluated whole.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from timm.models import group_parameters
from torch import nn
from torch.distributed.fsdp import fully_shard

from visionattn.errors import UserError
from visionattn.recipe import Recipe
from visionattn.tasks.base import Task

__all__ = ["FullySharded", "blocks_of", "refuse_sharded"]


def refuse_sharded(spec: Recipe, task: Task) -> None:
    """Raises UserError for what parameters that are shared out do not go with."""
    if spec.trainer.get("strategy") != "fsdp":
        return
    if not task.calls_whole:
        raise UserError(f"trainer.strategy fsdp shares out no parameters for task {spec.task}: take ddp")
    others = {
        "train.ema": spec.train.ema,
        "train.compile": spec.train.compile,
        "model.adapter": getattr(spec.model, "adapter", None),
    }
    for name in [name for name, value in others.items() if value]:
        raise UserError(f"trainer.strategy fsdp does not go with {name}: leave one of them out")


class FullySharded(ModelParallelStrategy):
    """All processes share out all parameters."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        assert self.lightning_module is not None  # by now
        self.lightning_module.configure_model = self._shard  # type: ignore[method-assign]  # when Lightning says so

    def _shard(self) -> None:
        task: Any = self.lightning_module
        if task.trainer.state.fn != TrainerFn.FITTING:
            return
        for block in [*blocks_of(task.network), task.network]:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])


def blocks_of(network: Any) -> Iterator[nn.Module]:
    """The modules that have all parameters of a group, and of no other one."""
    if not hasattr(network, "group_matcher"):
        return
    groups = group_parameters(network, network.group_matcher(coarse=False)).values()
    paths = {_above(names) for names in groups}
    for path in sorted(paths):
        if path and not any(other.startswith(f"{path}.") for other in paths):
            yield network.get_submodule(path)


def _above(names: list[str]) -> str:
    """The path of the smallest module that has all these parameters."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))
