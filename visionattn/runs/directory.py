"""What a run directory is: recipe.yaml, environment.json, metrics.csv, checkpoints/, evaluation/, report.html.

recipe.yaml is the resolved recipe, the one that ran. Everything in a run directory appears whole or not at all.
"""

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock, Timeout

from visionattn import recipe
from visionattn.data.sample import Dataset
from visionattn.data.survey import fingerprint
from visionattn.environment import describe
from visionattn.errors import UserError
from visionattn.files import new_folder, write_rows, write_text
from visionattn.kernels import bodies
from visionattn.recipe import Recipe
from visionattn.report.evaluation import RENAMED, Evaluation, history

__all__ = ["History", "RunDirectory"]


class RunDirectory:
    """A run directory, one that is there or one to be made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """Raises UserError where there is no run directory."""
        if not (path / "environment.json").is_file() or not (path / "recipe.yaml").is_file():
            raise UserError(f"{path}: not a run directory (no environment.json and recipe.yaml in it)")
        return cls(path)

    @staticmethod
    def name_for(name: str) -> Path:
        """Where a run called so goes unless it is said: runs/NAME-DATE-TIME."""
        return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"

    def refuse_existing(self) -> None:
        if self.path.exists():
            raise UserError(
                f"{self.path} exists and is never overwritten: give another --run, or go on with "
                f"fit --resume {self.path}"
            )

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def recipe(self) -> Recipe:
        spec = recipe.load(self.path / "recipe.yaml")
        monitor = spec.train.monitor
        if self.facts.get("format", 1) == 1 and monitor in RENAMED:
            spec = spec.model_copy(update={"train": spec.train.model_copy(update={"monitor": RENAMED[monitor]})})
        return spec

    @property
    def facts(self) -> dict[str, Any]:
        """The content of environment.json."""
        return json.loads((self.path / "environment.json").read_text(encoding="utf-8"))

    @property
    def evaluations(self) -> list[Evaluation]:
        """What is in evaluation/, in the order of the report."""
        folders = sorted(path.parent for path in self.path.glob("evaluation/[!.]*/metrics.json"))
        order = ("test", "val", "test-last", "val-last")
        folders.sort(key=lambda folder: order.index(folder.name) if folder.name in order else len(order))
        return [Evaluation.read(folder) for folder in folders]

    def make(self, spec: Recipe, dataset: Dataset, **facts: Any) -> None:
        """Begin a run: its recipe, its environment and what it is trained on."""
        data = {
            "images": {name: len(samples) for name, samples in dataset.splits.items()},
            "fingerprint": fingerprint(dataset),
            "skipped": list(dataset.skipped),
            "warnings": list(dataset.warnings),
        }
        facts = describe() | {"started": now(), "seed": spec.train.seed, "data": data, "format": 2} | facts
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}): give another --run") from None
        with new_folder(self.path) as folder:  # so that a run that is there can be resumed
            (folder / "recipe.yaml").write_text(recipe.dump(spec), encoding="utf-8")
            (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains this run meanwhile. Raises UserError where somebody does; a killed process lets go."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.path}: another process is training this run; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()
            (self.path / ".lock").unlink(missing_ok=True)

    def finish(self, seconds: float) -> None:
        facts = self.facts
        seconds += facts.get("seconds", 0)
        self._write_facts(facts | {"finished": now(), "seconds": seconds, "kernels": bodies()})

    def _write_facts(self, facts: dict[str, Any]) -> None:
        write_text(self.path / "environment.json", json.dumps(facts, indent=1))

    def refuse_other_data(self, dataset: Dataset) -> None:
        """Raises UserError where the samples are not those that the run began with.

        A run of 0.1.0 kept another fingerprint; of that only the numbers of images can be compared.
        """
        facts = self.facts
        began = facts["data"]
        counts = {name: len(samples) for name, samples in dataset.splits.items()}
        same = began["fingerprint"] == fingerprint(dataset) if facts.get("format", 1) > 1 else began["images"] == counts
        if not same:
            raise UserError(
                f"{self.path}: the images are not those the run began with; start a new run with "
                f"fit {self.path / 'recipe.yaml'}"
            )

    def refuse_other_facts(self, facts: dict[str, Any]) -> None:
        """Raises UserError where one of these is not what it was when the run began."""
        for key, value in facts.items():
            if (before := self.facts.get(key)) != value:
                raise UserError(
                    f"{self.path}: the {key} is {value}, but the run began with {before}; start a new run with "
                    f"fit {self.path / 'recipe.yaml'}"
                )


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


class History(pl.Callback):
    """metrics.csv, a row per epoch, from 1; the rows travel in the checkpoint, so a resumed run goes on with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._began, self._validated = time.monotonic(), False

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._began, self._validated = time.monotonic(), False

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row |= {name: value for name, value in values.items() if self._validated or not name.startswith("val/")}
        row["seconds"] = round(time.monotonic() - self._began, 2)
        self.rows.append(row)
        if trainer.is_global_zero:
            columns = [*dict.fromkeys(name for row in self.rows for name in row if name != "seconds"), "seconds"]
            write_rows(self.path, self.rows, columns)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = history(state["rows"])
