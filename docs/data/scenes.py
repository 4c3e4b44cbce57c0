"""A real landscape for a first walk, out of what matplotlib carries: heights around the Jacksboro fault, Tennessee.

    python scenes.py

writes scenes/images/*.tif (two bands: height above the sea in m, slope in degrees; 12 scenes of about 90 m a pixel),
scenes/masks/*.tif (0 slope, 1 valley, 2 ridge: how a place lies to the mean of the 2 km around it, which no pixel alone
tells), summits.geojson (a box around each summit), and country.tif, the whole of it.
"""

import json
from pathlib import Path

import numpy as np
import rasterio
from matplotlib import cbook
from rasterio.transform import from_origin
from scipy import ndimage

with cbook.get_sample_data("jacksboro_fault_dem.npz") as data:
    height = data["elevation"].astype(np.float32)
    step, west, north = float(data["dx"]), float(data["xmin"]), float(data["ymin"])
metres = step * 111_320 * np.array([1, np.cos(np.radians(north))])
down, right = np.gradient(height, *metres)
bands = np.stack([height, np.degrees(np.arctan(np.hypot(down, right)))]).astype(np.float32)
above = height - ndimage.uniform_filter(height, 23)
mask = np.where(above < -25, 1, np.where(above > 25, 2, 0)).astype(np.uint8)


def write(path: str, pixels: np.ndarray, row: int = 0, column: int = 0) -> None:
    place = from_origin(west + column * step, north - row * step, step, step)
    kind = {"driver": "GTiff", "crs": "EPSG:4326", "transform": place, "dtype": pixels.dtype, "count": len(pixels)}
    with rasterio.open(path, "w", height=pixels.shape[1], width=pixels.shape[2], **kind) as file:
        file.write(pixels)


for folder in ("scenes/images", "scenes/masks"):
    Path(folder).mkdir(parents=True, exist_ok=True)
for i, (row, column) in enumerate((row, column) for row in range(0, 342, 114) for column in range(0, 400, 100)):
    part = slice(row, row + 114), slice(column, column + 100)
    write(f"scenes/images/{i:02}.tif", bands[:, *part], row, column)
    write(f"scenes/masks/{i:02}.tif", mask[None, *part], row, column)
write("country.tif", bands)

tops = np.argwhere((height == ndimage.maximum_filter(height, 25)) & (above > 60))
found = []
for row, column in tops.tolist():
    x, y, r = west + (column + 0.5) * step, north - (row + 0.5) * step, 9 * step
    ring = [[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r], [x - r, y - r]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    found.append({"type": "Feature", "properties": {"class": "summit"}, "geometry": shape})
Path("summits.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": found}))
print(f"12 scenes, {len(found)} summits; ridges {(mask == 2).mean():.0%}, valleys {(mask == 1).mean():.0%}")
