"""Volumes and scenes through the command line: check, fit, and predictions in the format the images came in."""

from pathlib import Path

import numpy as np
import pytest

from visionattn.cli import main

RECIPE = """\
task: segmentation
model:
  name: biformer_tiny
  decoder: fpn
  args: {depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}
  decoder_args: {pyramid_channels: 32, segmentation_channels: 32}
data: {format: FORMAT, root: ROOT, image_size: 32, batch_size: 8, workers: 0, classes: [background, block], KEYS}
optim: {lr: 5e-3}
train: {epochs: 5}
evaluate: {bootstrap: 20, surface: false}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""
AFFINE = np.diag([-0.5, -0.5, 3.0, 1.0])


def block(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around 0 with a block around 100, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(4, (height - 20, width - 20))
    mask[top : top + 14, left : left + 14] = 1
    return (100 * mask + rng.normal(0, 15, mask.shape)).astype(np.int16), mask


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(40, 36, 6) a block through all slices, and its mask."""
    pairs = [block(seed, 40, 36) for _ in range(6)]
    return tuple(np.stack(part, axis=-1) for part in zip(*pairs, strict=True))


def nifti(root: Path) -> str:
    nibabel = pytest.importorskip("nibabel")
    for k in range(5):
        for kind, array in zip(("images", "masks"), volume(k), strict=True):
            (root / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), root / kind / f"p{k}.nii.gz")
    return "window: 150, level: 50"


def dicom(root: Path) -> str:
    nibabel, pydicom = pytest.importorskip("nibabel"), pytest.importorskip("pydicom")
    for k in range(5):
        array, mask = volume(k)
        (root / "masks").mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, AFFINE), root / "masks" / f"p{k}.nii.gz")
        (root / "images" / f"p{k}").mkdir(parents=True)
        for z in range(6):
            header = pydicom.Dataset()
            header.file_meta = pydicom.dataset.FileMetaDataset()
            header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.CTImageStorage
            header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = pydicom.uid.generate_uid()
            header.SeriesInstanceUID, header.PixelSpacing = f"1.2.{k}", [0.5, 0.5]
            header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, 3 * z], [1, 0, 0, 0, 1, 0]
            header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
            header.BitsAllocated = header.BitsStored = 16
            header.HighBit, header.PixelRepresentation = 15, 1
            header.Columns, header.Rows = array.shape[:2]
            header.PixelData = np.ascontiguousarray(array[:, :, z].T).tobytes()
            header.save_as(root / "images" / f"p{k}" / f"{9 - z}.dcm", enforce_file_format=True)
    return "window: 150, level: 50"


def geotiff(root: Path) -> str:
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("pyogrio")
    for k in range(5):
        image, mask = block(k, 60, 90)
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 4e5 + 45 * k, 0, -0.5, 5e6)}
        for kind, bands in (("images", np.stack([image, -image, image, image])), ("masks", mask[None])):
            (root / kind).mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "height": 60, "width": 90, "count": len(bands), "dtype": bands.dtype}
            with rasterio.open(root / kind / f"p{k}.tif", "w", **profile, **place) as sink:
                sink.write(bands)
    return "crops_per_image: 8, rare_crops: 0.5"


@pytest.mark.parametrize("made", [pytest.param(nifti, marks=pytest.mark.slow), dicom, geotiff])
def test_a_format_goes_in_and_comes_out(made, tmp_path, capsys):
    keys = made(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.replace("FORMAT", made.__name__).replace("ROOT", str(tmp_path / "data")).replace("KEYS", keys)
    )
    assert main(["check", str(recipe)]) == 0
    assert "problems: none" in capsys.readouterr().out
    assert main(["fit", str(recipe), "--run", str(tmp_path / "run")]) == 0
    images, out = tmp_path / "data" / "images", tmp_path / "out"
    polygons = ["--polygons"] if made is geotiff else []
    assert main(["predict", str(tmp_path / "run"), str(images), "-o", str(out), *polygons]) == 0
    truth, found = (sorted((tmp_path / name).iterdir()) for name in ("data/masks", "out"))
    if polygons:
        assert [path.name for path in found if path.suffix == ".gpkg"] == [f"p{k}.gpkg" for k in range(5)]
        found = [path for path in found if path.suffix != ".gpkg"]
    assert [p.name for p in found] == [p.name for p in truth]
    pairs = [(read(a), read(b)) for a, b in zip(truth, found, strict=True)]
    assert np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]) > 0.8


def read(path: Path) -> np.ndarray:
    """Where class 1 is, after the grid has been compared."""
    if path.suffix == ".tif":
        import rasterio

        with rasterio.open(path) as source:
            assert (source.crs, source.transform.a) == ("EPSG:32633", 0.5)
            return source.read(1) == 1
    import nibabel

    image = nibabel.load(path)
    np.testing.assert_array_equal(image.affine, AFFINE)
    return image.get_fdata() == 1
