"""Several processes of one run: what the first one has found out, the others take over.

Lightning starts the command again for every further device of a machine, torchrun and SLURM start all processes at
once. Either way the first one names the run, reads the data and writes; the others wait for what it hands over.
"""

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from visionattn.files import new_file

__all__ = ["forget_handover", "from_first", "is_first", "offer", "shard"]

T = TypeVar("T")
HANDOVER = "VISIONATTN_HANDOVER"  # where the processes that Lightning starts find what is handed over
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_TAKE_OVER = 2.0  # an error; those that start later are ended by their launcher


def is_first() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # which is set once the function is there


def shard() -> tuple[int, int]:
    """Number of this process, and how many torchrun or SLURM have started."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            started = environment()
            return started.global_rank(), started.world_size()
    return 0, 1


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in every process of the run; those that Lightning starts see `offer`.

    Raises:
        UserError: what `work` raises; the other processes end without a word of their own.
    """
    if not is_first():
        return _taken_over(_shared_place() if shard()[1] > 1 else Path(os.environ[HANDOVER]))
    if shard()[1] == 1:
        return work()
    try:
        result = work()
    except BaseException as error:
        _hand_over(_shared_place(), None, error)
        time.sleep(SECONDS_TO_TAKE_OVER)
        _shared_place().unlink(missing_ok=True)
        raise
    _hand_over(_shared_place(), result, None)
    os.environ[HANDOVER] = str(_shared_place())
    return result


def offer(result: object) -> None:
    """Keep what `from_first` gave for the processes that Lightning is about to start."""
    if is_first() and shard()[1] == 1:
        place = Path(tempfile.mkdtemp(prefix="visionattn-"), "handover")
        _hand_over(place, result, None)
        os.environ[HANDOVER] = str(place)


def forget_handover() -> None:
    """Remove what was handed over, once every process has it."""
    if is_first() and (place := os.environ.pop(HANDOVER, None)):
        Path(place).unlink(missing_ok=True)
        if Path(place).parent.name.startswith("visionattn-"):
            Path(place).parent.rmdir()


def _shared_place() -> Path:
    """The same for all processes that one launch has started, in a folder that all of them see."""
    words = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    name = "-".join(os.environ[word] for word in words if word in os.environ)
    return Path(f".visionattn-{name}")


def _hand_over(place: Path, result: object, error: BaseException | None) -> None:
    with new_file(place, replace=True) as unfinished:
        unfinished.write_bytes(pickle.dumps((result, None if error is None else str(error))))


def _taken_over(place: Path) -> Any:
    """What the first process has pickled."""
    while not place.is_file():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    result, error = pickle.loads(place.read_bytes())
    if error is not None:
        time.sleep(2 * SECONDS_TO_TAKE_OVER)  # a launcher ends all once one has ended, and the first is to tell why
        sys.exit(2)
    return result
