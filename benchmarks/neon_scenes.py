"""NEON's tree crowns as GeoTIFF scenes with GeoPackages, from the pictures and VOC files of the PyPI wheel deepforest.

    pip download --no-deps deepforest==2.1.0 && unzip -q deepforest-*.whl 'deepforest/data/*'
    python benchmarks/neon_scenes.py deepforest/data neon

`neon/scenes` holds whole scenes of 0.1 m (train: 2299 x 2472 pixels, val: 1249 x 1035 of another tile, test: two other
sites), `neon/blocks` the validation scene in 12 blocks, for intervals. Where each was cut from its tile is not known:
it stands at the tile's corner.
"""

import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyogrio
import rasterio
import shapely
from PIL import Image
from rasterio.transform import Affine

SCENES = {
    "2019_YELL_2_528000_4978000_image_crop2": ("train", "EPSG:32612", 528000, 4978000),
    "2019_YELL_2_541000_4977000_image_crop": ("val", "EPSG:32612", 541000, 4977000),
    "OSBS_029": ("test", "EPSG:32617", 404211.9, 3285142.9),
    "SOAP_061": ("test", "EPSG:32611", 298000, 4100000),
}


def boxes(file: Path) -> np.ndarray:
    """The boxes (N, 4) of a VOC file as xyxy in pixels."""
    names = ("xmin", "ymin", "xmax", "ymax")
    found = ElementTree.parse(file).iter("bndbox")
    return np.array([[float(box.findtext(name) or "nan") for name in names] for box in found])


def _areas(xyxy: np.ndarray) -> np.ndarray:
    return (xyxy[:, 2:] - xyxy[:, :2]).prod(1)


def write(folder: Path, name: str, pixels: np.ndarray, found: np.ndarray, crs: str, corner: Affine) -> None:
    """One scene of pixels (H, W, 3) and its boxes (N, 4) in pixels, in map coordinates."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width, bands = pixels.shape
    with rasterio.open(
        folder / f"{name}.tif", "w", "GTiff", width, height, bands, crs, corner, "uint8", compress="deflate"
    ) as scene:
        scene.write(pixels.transpose(2, 0, 1))
    left, top, right, bottom = found.T
    west, north = corner * (left, top)
    east, south = corner * (right, bottom)
    pyogrio.raw.write(
        folder / f"{name}.gpkg",
        shapely.to_wkb(shapely.box(west, south, east, north)),
        [np.array(["Tree"] * len(found), object)],
        ["class"],
        crs=crs,
        geometry_type="Polygon",
    )


def main(source: Path, out: Path) -> None:
    for name, (split, crs, east, north) in SCENES.items():
        pixels = np.asarray(Image.open(source / f"{name}.png"))
        found = boxes(source / f"{name}.xml")
        corner = Affine(0.1, 0, east, 0, -0.1, north)
        write(out / "scenes" / split, name, pixels, found, crs, corner)
        if split != "val":
            continue
        rows, columns = (
            np.linspace(0, side, parts + 1).astype(int) for side, parts in ((pixels.shape[0], 3), (pixels.shape[1], 4))
        )
        for top, bottom in pairwise(rows):
            for left, right in pairwise(columns):
                inside = np.clip(found - [left, top] * 2, 0, [right - left, bottom - top] * 2)
                kept = inside[_areas(inside) >= 0.25 * _areas(found)]
                part = f"block_{top}_{left}"
                at = corner * Affine.translation(int(left), int(top))
                write(out / "blocks" / split, part, pixels[top:bottom, left:right], kept, crs, at)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
