"""Silences remarks of Lightning and PyTorch that a user of a recipe can do nothing about."""

import logging
import warnings

__all__ = ["silence"]

REMARKS = (
    r".*does not have many workers.*",  # data in memory need none; `data.workers` is the user's key
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning 2.6 with torch 2.15
    r".*No positive samples in targets.*",  # a class without images: its AUROC is reported as undefined
    r".*Average precision score for one or more classes was `nan`.*",
)


def silence() -> None:
    """Filter the remarks above; everything else is still shown."""
    for remark in REMARKS:
        warnings.filterwarnings("ignore", remark)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
