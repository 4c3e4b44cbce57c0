"""Batches of labelled images: they depend on the seed, the epoch and the number of processes only."""

import hashlib
import pickle
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.data.loaders import EpochSampler, SplitDataModule
from visionattn.runs import fit
from visionattn.tasks.base import Task
from visionattn.tasks.classification import task as classification
from visionattn.tasks.classification.recipe import DATA, Augment, Recipe

AUGMENT = Augment(vflip=0.5, rotate=20.0, jitter=0.3, policy="randaugment", erasing=0.3)


def folders(root: Path, **counts: int) -> Path:
    """A folder tree of noise images: folders(root, train__cat=3) writes three to root/train/cat."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return root


def trained(root: Path, seed: int = 0, **keys) -> tuple[Task, SplitDataModule]:
    """What `fit` trains, and the batches that it trains on."""
    keys = {"image_size": 32, "batch_size": 4, "augment": AUGMENT} | keys
    data, trainer = DATA["folder"](format="folder", root=root, **keys), {"accelerator": "cpu"}
    model, train = {"name": "test_resnet"}, {"seed": seed}
    spec = Recipe(task="classification", model=model, data=data, train=train, trainer=trainer)
    spec, dataset, task = fit.prepare(spec)
    training_set = classification.training_set(dataset, spec)
    return task, SplitDataModule(
        dataset, spec.data, training_set, classification.evaluation_set, classification.collate, seed
    )


def module(root: Path, seed: int = 0, **keys) -> SplitDataModule:
    return trained(root, seed, **keys)[1]


def epoch(loader: DataLoader, number: int = 0) -> str:
    """Fingerprint of all batches of an epoch."""
    loader.sampler.set_epoch(number)
    digest = hashlib.sha256()
    for batch in loader:
        for key in ("image", "label", "index"):
            digest.update(batch[key].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def tree(tmp_path) -> Path:
    return folders(tmp_path, train__a=9, train__b=14, val__a=3, val__b=3)


def test_batches(tree):
    data = module(tree)
    batches = list(data.train_dataloader())
    assert len(batches) == 5  # 23 images: the incomplete batch is left out
    assert batches[0]["image"].shape == (4, 3, 32, 32)
    assert batches[0]["image"].dtype == torch.uint8  # they are normalised on the device
    assert batches[0]["label"].dtype == batches[0]["index"].dtype == torch.int64
    labels = torch.tensor([sample.label for sample in data.dataset.splits["train"]])
    assert all(torch.equal(labels[b["index"]], b["label"]) for b in batches)
    held = [i for b in data.val_dataloader() for i in b["index"].tolist()]
    assert held == list(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_bytes_and_of_16_bits_are_in_one_range(tmp_path, workers):
    root = folders(tmp_path, train__a=4, train__b=4, val__a=1, val__b=1)
    for path in sorted((root / "train").rglob("*.png"))[::2]:
        Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(path)
    (batch,) = module(root, workers=workers, batch_size=8, augment=Augment()).train_dataloader()
    assert batch["image"].dtype == torch.float32
    assert batch["image"].max() <= 1
    assert ((batch["image"] - 40000 / 65535).abs().amax((1, 2, 3)) < 1e-4).sum() == 4


def test_batches_depend_on_seed_and_epoch_only(tree):
    alone, workers = module(tree, workers=0), module(tree, workers=2)
    first, later = (epoch(alone.train_dataloader(), n) for n in (0, 3))
    assert first != later
    loader = workers.train_dataloader()
    torch.rand(7)
    assert [epoch(loader, n) for n in (0, 1, 3)][::2] == [first, later]
    assert epoch(module(tree, seed=1).train_dataloader()) != first


def test_loading_leaves_the_global_generator_alone(tree):
    loader = module(tree, workers=0).train_dataloader()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epoch(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_datasets_can_be_sent_to_other_processes(tree):
    dataset = module(tree).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2, 5]["image"], dataset[2, 5]["image"])
    assert not torch.equal(copy[2, 5]["image"], dataset[5]["image"])


class Watch(pl.LightningModule):
    """Takes down which images came in which epoch, and the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[int]] = {}
        self.shapes: set = set()

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
        self.shapes.add(("train", *batch["label"].shape))
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.shapes.add(("val", *batch["label"].shape))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**keys) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **keys})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_training_sees_another_order_each_epoch_and_the_same_after_a_resume(tree, tmp_path, workers):
    whole, first, rest = Watch(), Watch(), Watch()
    trainer(max_epochs=4).fit(whole, module(tree, workers=workers))
    saving = [ModelCheckpoint(tmp_path / "saved", "last", save_on_train_epoch_end=True, enable_version_counter=False)]
    kept = {"enable_checkpointing": True, "callbacks": saving}
    trainer(max_epochs=2, **kept).fit(first, module(tree, workers=workers))
    trainer(max_epochs=4, **kept).fit(rest, module(tree, workers=workers), ckpt_path=tmp_path / "saved/last.ckpt")
    assert len({tuple(order) for order in whole.seen.values()}) == 4
    assert whole.seen == first.seen | rest.seen
    loader = module(tree).train_dataloader()
    loader.sampler.set_epoch(3)
    assert whole.seen[3] == [i for _, i in loader.sampler][:20]


class Watched(torch.nn.Module):
    """A loss that takes down the shapes of its labels."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss, self.shapes = loss, set()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.shapes.add(("train" if self.training else "val", *labels.shape))
        return self.loss(logits, labels)


@pytest.mark.parametrize("mixes", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_mixed_labels_in_training_only(tree, mixes):
    task, data = trained(tree, workers=0, augment=Augment(**mixes))
    task.loss = watched = Watched(task.loss)
    trainer(max_epochs=1).fit(task, data)
    assert watched.shapes == {("train", 4, 2), ("val", 4), ("val", 2)}


def test_balanced_sampling_draws_every_class_alike(tmp_path):
    root = folders(tmp_path, train__a=60, train__b=6, val__a=1, val__b=1)
    loader = module(root, balanced_sampling=True).train_dataloader()
    labels = np.array([sample.label for sample in loader.dataset.samples])
    drawn, orders = [], set()
    for number in range(40):
        loader.sampler.set_epoch(number)
        order = [i for _, i in loader.sampler]
        orders.add(tuple(order))
        drawn += labels[order].tolist()
    assert len(orders) == 40
    assert 0.45 < np.mean(drawn) < 0.55


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch(monkeypatch, shuffle):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        sampler = EpochSampler(20, seed=1, shuffle=shuffle)
        sampler.set_epoch(5)
        parts.append([i for _, i in sampler])
        assert len(sampler) == len(parts[-1])
    together = sorted(i for part in parts for i in part)
    assert len(set(together)) == len(together) == (18 if shuffle else 20)
    if shuffle:
        assert {len(part) for part in parts} == {6}


def test_repeated_samples_share_an_epoch_with_fewer_others_and_are_drawn_anew():
    sampler = EpochSampler(20, seed=1, shuffle=True, repeats=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        epochs.append(pairs)
        assert len(pairs) == len(set(pairs)) == len(sampler) == 20
        assert len({index for _, index in pairs}) == 7
        assert {draw for draw, _ in pairs} == {3 * epoch, 3 * epoch + 1, 3 * epoch + 2}
    assert not {draw for draw, _ in epochs[0]} & {draw for draw, _ in epochs[1]}
    plain = EpochSampler(20, seed=1, shuffle=True)
    plain.set_epoch(2)
    assert sorted(plain) == [(2, i) for i in range(20)]
