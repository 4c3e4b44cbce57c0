"""Real slices for a first walk, out of what nibabel carries: a head in two MR volumes, cut into eight slabs.

    python slices.py

writes slices/images/*.nii.gz and slices/masks/*.nii.gz (0 outside, 1 brain, 2 fluid; by thresholds, no radiologist's
work), and unlabelled/*.nii.gz. P1 to P4 are slabs of six slices, each seen twice.
"""

from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

scan = nibabel.load(Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz")
volumes = np.moveaxis(scan.get_fdata(dtype=np.float32), 3, 0)
for folder in ("slices/images", "slices/masks", "unlabelled"):
    Path(folder).mkdir(parents=True, exist_ok=True)
for time, volume in enumerate(volumes):
    smooth = ndimage.gaussian_filter(volume, 1)
    head = ndimage.binary_opening(smooth > 0.25 * np.quantile(smooth, 0.99), iterations=2)
    parts, count = ndimage.label(head)
    head = parts == 1 + np.argmax(ndimage.sum_labels(head, parts, range(1, count + 1)))
    mask = head.astype(np.uint8) + (head & (smooth > 1.2 * np.median(smooth[head])))
    for slab in range(4):
        part, name = slice(6 * slab, 6 * slab + 6), f"P{slab + 1}_{time}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume[:, :, part], scan.affine), f"slices/images/{name}")
        nibabel.save(nibabel.Nifti1Image(mask[:, :, part], scan.affine), f"slices/masks/{name}")
        nibabel.save(nibabel.Nifti1Image(volume[:, :, part], scan.affine), f"unlabelled/{name}")
print(f"{2 * 4} volumes of {volumes.shape[1]} x {volumes.shape[2]} x 6")
