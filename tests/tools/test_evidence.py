"""Do maps find the evidence? Noise with a patch of stripes, whose direction is the class.

The network has learned it: 220 steps of 32 such images, drawn by another seed; its 48 thousand weights are kept.
"""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import visionattn

WEIGHTS = Path(__file__).parents[1] / "golden" / "explain" / "stripes.npz"
SIDE, PATCH = 64, 20  # pixels; the patch has 9.8 % of them
NARROW = {"depth": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "head_dim": 16, "n_win": 2, "topks": (1, 2, 4, -2)}


def made(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images (B, 1, H, W), the direction of their stripes, and where these are (B, H, W)."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 1, SIDE, SIDE)).astype(np.float32) * 0.5
    labels, where = rng.integers(0, 2, count), np.zeros((count, SIDE, SIDE), bool)
    for image, label, inside in zip(images, labels, where, strict=True):
        top, left = rng.integers(0, SIDE - PATCH + 1, 2)
        wave = np.sin(np.arange(PATCH) * 2 * np.pi / 5 + rng.uniform(0, 2 * np.pi)).astype(np.float32) * 1.2
        stripes = np.broadcast_to(wave, (PATCH, PATCH))
        image[0, top : top + PATCH, left : left + PATCH] += stripes if label else stripes.T
        inside[top : top + PATCH, left : left + PATCH] = True
    return torch.from_numpy(images), torch.from_numpy(labels), where


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = timm.create_model("biformer_tiny", num_classes=2, in_chans=1, **NARROW)
    with np.load(WEIGHTS) as stored:
        network.load_state_dict({name: torch.from_numpy(stored[name]) for name in stored})
    return network.float().eval()


def share(values: np.ndarray, inside: np.ndarray) -> float:
    """Of what speaks for the class, how much lies in the evidence."""
    positive = values.clip(min=0)
    return float(positive[inside].sum() / max(positive.sum(), 1e-12))


@torch.no_grad()
def test_the_network_has_learned_the_stripes(network):
    images, labels, _ = made(64, seed=2)
    assert (network(images).argmax(1) == labels).float().mean() > 0.95


def test_gradient_methods_find_the_patch_and_chance_does_not(network):
    images, labels, where = made(8, seed=3)
    shares: dict[str, list[float]] = {}
    for image, label, inside in zip(images, labels, where, strict=True):
        for found in visionattn.explain(network, image, method=["ig", "gradient"], target=int(label)):
            shares.setdefault(found.method, []).append(share(found.map, inside))
        noise = np.random.default_rng(int(label)).random(inside.shape)
        shares.setdefault("random", []).append(share(noise, inside))
    means = {method: np.mean(values) for method, values in shares.items()}
    assert means["ig"] > 0.3
    assert means["gradient"] > 0.3
    assert means["random"] == pytest.approx(PATCH**2 / SIDE**2, abs=0.02)
