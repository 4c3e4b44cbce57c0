"""Pictures of these docs, of networks that the walks train and of some that are not trained.

    python docs/run.py --keep WALKS docs/walks/medical.md docs/walks/scenes.md
    python docs/pictures.py WALKS

writes to docs/pictures: attention.png (what one query can look at through routing, windows, halos and neighbourhoods;
untrained networks: where they can look, not what at), slice.png and map.png (what the walks predict, beside the truth),
and report.png (a report, photographed by Chromium).
"""

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pyogrio
import rasterio
import shapely
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, ListedColormap
from sklearn.datasets import load_sample_image

import visionattn

FOLDER = Path(__file__).parent / "pictures"
NETWORKS = {
    "biformer_tiny": "routing: the regions that are most like its own",
    "va_davit_tiny": "window: its own window",
    "va_halonet26t": "halo: its block and a margin",
    "nat_mini": "neighborhood: the 7 x 7 around it",
}
CLASSES = ListedColormap(["#009e73", "#d55e00"])  # of masks: 1 and 2
SIDE, QUERY = 256, (0.5, 0.4)  # pixels; row and column of the query, of the image's sides


def keys_of(name: str, image: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """(H, W), the mean over heads of the weights that a query of the first recorded map of places gives; the query."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad(), visionattn.record_attention(model) as record:
        model(image)
    calls = [call for calls in record.values() for call in calls]
    call = next(call for call in calls if call.kind == "space" and call.indices is not None)
    (height, width), (rows, columns) = call.queries, call.keys
    query = int(QUERY[0] * height), int(QUERY[1] * width)
    row = query[0] * width + query[1]
    weights, keys = call.weights[0, :, row].mean(0), call.indices[0, row]
    seen = torch.zeros(rows * columns).index_add(0, keys.clamp(min=0), weights * (keys >= 0))
    return seen.view(rows, columns).numpy(), query


def attention(walks: Path, out: Path) -> None:
    pixels = load_sample_image("china.jpg")[:, 100:527]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
    shown = image[0].permute(1, 2, 0).clamp(0, 1).numpy()
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(14, 4.2), layout="constrained")
    for axis, (name, words) in zip(axes, NETWORKS.items(), strict=True):
        seen, query = keys_of(name, (image - 0.45) / 0.225)
        step = SIDE / seen.shape[0]
        axis.imshow(shown, extent=(0, SIDE, SIDE, 0))
        axis.imshow(np.ma.masked_less_equal(seen, 0), extent=(0, SIDE, SIDE, 0), cmap="autumn", alpha=0.65)
        axis.plot((query[1] + 0.5) * step, (query[0] + 0.5) * step, "o", color="white", markeredgecolor="black")
        titled(axis, f"{name}\n{words}")
    figure.savefig(out, dpi=90)


def titled(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def masked(axis: Axes, image: np.ndarray, mask: np.ndarray, title: str) -> None:
    """An image (H, W) or (H, W, 3) under the classes 1 and 2 of a mask (H, W)."""
    axis.imshow(image, cmap="gray")
    axis.imshow(np.ma.masked_equal(mask, 0), cmap=CLASSES, vmin=1, vmax=2, alpha=0.5, interpolation="nearest")
    titled(axis, title)


def head(walks: Path, out: Path) -> None:
    """A slice of the medical walk: its masks, how unsure the network is, and what the class fluid depends on."""
    names = {
        "image": "slices/images/P1_0.nii.gz",
        "truth": "slices/masks/P1_0.nii.gz",
        "found": "found/P1_0.nii.gz",
        "unsure": "found/P1_0_entropy.nii.gz",
        "seen": "explained/P1_0-layercam.nii.gz",
    }
    held = {name: np.asarray(nibabel.load(walks / "medical" / file).dataobj)[..., 3].T for name, file in names.items()}
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.7), layout="constrained")
    masked(axes[0], held["image"], held["truth"], "mask of the data: brain, fluid")
    masked(axes[1], held["image"], held["found"], "predicted")
    for axis, name, title in ((axes[2], "unsure", "how unsure: entropy"), (axes[3], "seen", "what fluid depends on")):
        axis.imshow(held["image"], cmap="gray")
        axis.imshow(held[name], cmap="magma", alpha=0.6)
        titled(axis, title)
    figure.savefig(out, dpi=90)


def country(walks: Path, out: Path) -> None:
    """The map of the walk over scenes: heights with the true summits, and land forms with the boxes that were found."""
    walk = walks / "scenes"
    with rasterio.open(walk / "country.tif") as file, rasterio.open(walk / "map" / "country.tif") as made:
        height, mask, bounds = file.read(1), made.read(1), file.bounds
    extent = (bounds.left, bounds.right, bounds.bottom, bounds.top)
    relief = LightSource(315, 45).hillshade(height, vert_exag=0.05)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for axis, file, title in (
        (axes[0], "summits.geojson", "heights of Tennessee, and its summits"),
        (axes[1], "summits/country.gpkg", "predicted: valleys, ridges, and boxes around summits"),
    ):
        axis.imshow(relief, cmap="gray", extent=extent)
        for ring in shapely.from_wkb(pyogrio.raw.read(walk / file)[2]):
            axis.plot(*ring.exterior.xy, color="white", linewidth=1.2)
        axis.set(xlim=extent[:2], ylim=extent[2:])
        axis.set_title(title, fontsize=10)
    shown = np.ma.masked_equal(mask, 0)
    axes[1].imshow(shown, cmap=CLASSES, vmin=1, vmax=2, alpha=0.45, extent=extent, interpolation="nearest")
    figure.savefig(out, dpi=90)


def report(walks: Path, out: Path) -> None:
    page = (walks / "medical/runs/brain/report.html").resolve().as_uri()
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run([*browser, "--window-size=1100,1500", f"--screenshot={out}", page], check=True, capture_output=True)


PICTURES = {"attention": attention, "slice": head, "map": country, "report": report}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw(Path(sys.argv[1]), FOLDER.resolve() / f"{name}.png")
