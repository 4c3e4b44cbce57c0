"""What a scene of 16,000 x 16,000 pixels with 20,000 objects takes to be predicted, and how many the merge finds.

    python benchmarks/large_scene.py FOLDER [SIDE] [OBJECTS] [--stub]

The first call trains a detector for one epoch on small scenes, so that all of `visionattn predict` is as users have it,
the next ones measure; with `--stub` its network is replaced by one that finds every object of a tile as far as the tile
shows it. Prints seconds, the peak memory of the process and of the largest of its workers, and the count error.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import scipy.ndimage
import shapely
import torch
from rasterio.transform import Affine

from visionattn.cli import main
from visionattn.tasks.detection.task import DetectorTask

RECIPE = """\
task: detection
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [32, 32, 32, 64], n_win: 4, topks: [1, 4, 16, -2]}
  detector_args: {fpn_channels: 32, convs: 1}
data: {format: geotiff, root: ROOT, resize: none, image_size: 512, batch_size: 4, crops_per_image: 8}
train: {epochs: 1}
evaluate: {bootstrap: 0}
trainer: {accelerator: cpu}
"""


def write_scene(file: Path, side: int, objects: int, east: float) -> None:
    """Bright rectangles of 16 to 80 pixels, which do not touch, on a dark ground, and their GeoPackage."""
    rng = np.random.default_rng(objects)
    cells = int(np.ceil(objects**0.5))
    pitch = side // cells
    cell = rng.choice(cells * cells, objects, replace=False)
    size = rng.integers(16, min(80, pitch - 4), (objects, 2))
    corner = np.stack([cell % cells, cell // cells], 1) * pitch + rng.integers(0, pitch - 2 - size)
    boxes = np.concatenate([corner, corner + size], 1)
    pixels = np.full((1, side, side), 40, np.uint8)
    for left, top, right, bottom in boxes:
        pixels[0, top:bottom, left:right] = 200
    place = Affine(0.5, 0, east, 0, -0.5, 5_000_000)
    file.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(file, "w", **profile, transform=place, tiled=True, compress="deflate") as scene:
        scene.write(pixels)
    (west, north), (right, south) = (place * (boxes[:, i], boxes[:, i + 1]) for i in (0, 2))
    shapes = shapely.to_wkb(shapely.box(west, south, right, north))
    roofs = np.array(["roof"] * objects, object)
    out = file.with_suffix(".gpkg")
    pyogrio.raw.write(out, shapes, [roofs], ["class"], crs="EPSG:32633", geometry_type="Polygon")


def perfect(_: DetectorTask, images: list[torch.Tensor], targets: object = None) -> list[tuple[torch.Tensor, ...]]:
    """The rectangles of each image (1, h, w), clipped by it."""
    found = []
    for image in images:
        bright = image[0].numpy() > (image.min() + image.max()).item() / 2
        windows = scipy.ndimage.find_objects(scipy.ndimage.label(bright)[0])
        xyxy = torch.tensor([[c.start, r.start, c.stop, r.stop] for r, c in windows], dtype=torch.float32).view(-1, 4)
        found.append((xyxy, torch.zeros(len(xyxy), dtype=torch.int64), torch.full((len(xyxy),), 0.9)))
    return found


def measure(root: Path, side: int, objects: int, stub: bool) -> None:
    if not (root / "run").exists():
        for n, split in enumerate(("train", "val")):
            write_scene(root / "scenes" / split / f"{split}.tif", 1024, 80, 400_000 + 10_000 * n)
        write_scene(root / "large" / "large.tif", side, objects, 500_000)
        (root / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(root / "scenes")))
        main(["fit", str(root / "recipe.yaml"), "--run", str(root / "run")])
        print("trained: run this again to measure")
        return
    if stub:
        DetectorTask.forward = perfect  # type: ignore[method-assign,assignment]
    out, start = root / f"found-{time.time():.0f}", time.perf_counter()
    score = ["--score", "0.3" if stub else "0.05"]
    main(["predict", str(root / "run"), str(root / "large"), "-o", str(out), "--format", "gpkg", *score])
    seconds = time.perf_counter() - start
    found = sum(pyogrio.read_info(file, layer="objects")["features"] for file in out.rglob("*.gpkg"))
    own, workers = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"{seconds:.0f} s, {side * side / seconds / 1e6:.2f} Mpixel/s, peak {own:.2f} GiB, workers {workers:.2f} GiB")
    print(f"{found} objects found of {objects}: {found / objects - 1:+.2%}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--stub"]
    measure(
        Path(words[0]),
        int(words[1]) if len(words) > 1 else 16_000,
        int(words[2]) if len(words) > 2 else 20_000,
        "--stub" in sys.argv,
    )
