"""What a run was made with: versions, devices, git state; the same facts for `visionattn doctor`."""

import logging
import platform
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from visionattn import __version__, kernels

__all__ = ["describe", "doctor", "doctor_of_kernels", "silence"]

REMARKS = (
    r".*does not have many workers.*",  # data in memory need none; `data.workers` is the user's key
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*",  # what torchmetrics has synchronised
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning 2.6 with torch 2.15
    r".*No (?:positive|negative) samples in targets.*",  # of a class that the images at hand cannot measure
)


def silence() -> None:
    """Filter remarks of Lightning and PyTorch that a user of a recipe can do nothing about."""
    for remark in REMARKS:
        warnings.filterwarnings("ignore", remark)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def describe() -> dict[str, Any]:
    """Plain data: command, python, platform, device, threads, installed versions, git state of the folder."""
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "git": _git(Path.cwd()),
    }


def _versions() -> dict[str, str]:
    """Of visionattn, of all that it requires with its extras, and of what it takes where it is installed."""
    try:
        required = [re.split(r"[^\w.-]", text)[0] for text in requires("visionattn") or ()]
    except PackageNotFoundError:  # run from its folder
        required = ["torchvision", "timm", "lightning", "numpy"]
    installed = {"visionattn": f"{__version__}, not installed"}
    for name in dict.fromkeys(["visionattn", "torch", *required, "triton", "natten"]):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the folder's repository and whether it has uncommitted changes; None outside one."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def doctor() -> str:
    """The text of `visionattn doctor`: versions, devices, and which kernels will be used and why."""
    facts = describe()
    lines = [f"python {facts['python']} on {facts['platform']}", "", "packages"]
    lines += [f"  {name:<28} {number}" for name, number in facts["versions"].items()]
    lines += ["", "devices", f"  cpu    {facts['threads']} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append(f"  cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}, which found no device"
            if torch.version.cuda
            else "built without CUDA"
        )
        lines.append(f"  no GPU: torch {torch.__version__} is {built}")
    lines += ["", "kernels (what `auto` takes)"]
    lines += [f"  {line}" for line in kernels.describe_backends()]
    return "\n".join(lines)


def doctor_of_kernels() -> str:
    """The text of `visionattn doctor --kernels`, which tries the Triton kernels on calls of models and keeps what came
    of it: for each kind of call that was ever tried here, whether `auto` takes the kernel, and why not."""
    if not torch.cuda.is_available():
        return "no GPU: there are no kernels to try; every attention runs in PyTorch, which needs no trial"
    from visionattn.tools.benchmark import try_kernels

    try_kernels()
    found = kernels.verdicts()
    lines = [f"{len(found)} kinds of calls, by {kernels.verdict_file()}"]
    return "\n".join([*lines, *(f"  {kind}: {verdict}" for kind, verdict in found.items())])
