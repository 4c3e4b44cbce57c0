"""Volumes and scenes through the same commands as image files: fit, check, predict in the format they came in."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from visionattn.cli import main

RECIPE = """\
task: segmentation
model: {name: test_resnet, decoder: fpn, decoder_args: {pyramid_channels: 32, segmentation_channels: 64}}
data: {format: FORMAT, root: ROOT, image_size: 48, batch_size: 4, workers: 0, classes: [background, thing]}
optim: {lr: 3e-3}
train: {epochs: 1}
evaluate: {bootstrap: 10}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


def recipe_for(kind: str, root: Path, folder: Path) -> str:
    path = folder / f"{kind}.yaml"
    path.write_text(RECIPE.replace("FORMAT", kind).replace("ROOT", str(root)))
    return str(path)


def block(rng: np.random.Generator, height: int, width: int, side: int) -> np.ndarray:
    """(height, width) mask of a square anywhere."""
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(4, (height - side, width - side))
    mask[top : top + side, left : left + side] = 1
    return mask


def dice(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over pairs of prediction and truth, of class 1."""
    found = [((a == 1) & (b == 1)).sum() / ((a == 1).sum() + (b == 1).sum()) for a, b in pairs]
    return 2 * float(np.mean(found))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Six patients with a bright block each, two volumes of two of them."""
    nibabel = pytest.importorskip("nibabel")
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    affine = np.diag([-0.8, 1.2, 5.0, 1.0])
    for name in ("p1_a", "p1_b", "p2_a", "p2_b", "p3_a", "p4_a", "p5_a", "p6_a"):
        mask = np.repeat(block(rng, 40, 36, 14)[..., None], 5, axis=2)
        mask[..., [0, 4]] = 0
        intensities = (1000.0 * mask + rng.normal(0, 80, mask.shape)).astype(np.int16)
        for folder, content in (("images", intensities), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(content, affine), root / folder / f"{name}.nii.gz")
    return root


def test_volumes_are_trained_by_slices_measured_whole_and_written_back(volumes, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    recipe, run = recipe_for("nifti", volumes, tmp_path), tmp_path / "run"
    keys = ["data.group='p[0-9]+'", "data.val_fraction=0.3", "data.test_fraction=0.2"]
    assert main(["check", recipe, *keys]) == 0
    text = capsys.readouterr().out
    assert "groups" in text
    assert "problems: none" in text
    assert main(["fit", recipe, "--run", str(run), *keys, "train.epochs=6"]) == 0
    result = json.loads((run / "evaluation" / "val" / "metrics.json").read_text())
    with (run / "evaluation" / "val" / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    assert result["noun"] == "volume"
    assert result["samples"] == len(cases)
    assert result["rules"]["unit"] == "mm"
    assert sum(row["pixels"] for row in result["per_class"]) == len(cases) * 40 * 36 * 5
    assert main(["predict", str(run), str(volumes / "images"), "-o", str(tmp_path / "out")]) == 0
    truths = {path.name: nibabel.load(path) for path in (volumes / "masks").iterdir()}
    found = {path.name: nibabel.load(path) for path in (tmp_path / "out").iterdir()}
    assert found.keys() == truths.keys()
    for name, written in found.items():
        assert written.shape == truths[name].shape
        np.testing.assert_allclose(written.affine, truths[name].affine)
        assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1}
    assert dice([(np.asarray(found[name].dataobj), np.asarray(truths[name].dataobj)) for name in truths]) > 0.8
    damaged = shutil.copytree(volumes, tmp_path / "damaged")
    flip_a_bit(damaged / "images" / "p3_a.nii.gz")
    assert main(["check", recipe, *keys, f"data.root={damaged}"]) == 1
    assert "images/p3_a.nii.gz: damaged, cannot be read" in capsys.readouterr().out
    assert main(["fit", recipe, "--run", str(tmp_path / "other"), *keys, f"data.root={damaged}"]) == 2
    assert "images/p3_a.nii.gz: damaged, cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["predict", str(run), str(damaged / "images"), "-o", str(tmp_path / "sound")]) == 1
    assert "images/p3_a.nii.gz: damaged, cannot be read" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "sound").iterdir()} == truths.keys() - {"p3_a.nii.gz"}
    assert main(["predict", str(run), str(volumes / "images"), "-o", str(tmp_path / "nowhere" / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def flip_a_bit(path: Path) -> None:
    """In the middle of a .nii.gz file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_voxels_without_a_value_are_named(volumes, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    root = shutil.copytree(volumes, tmp_path / "data")
    source = nibabel.load(root / "images" / "p2_a.nii.gz")
    voxels = source.get_fdata(dtype=np.float32)
    voxels[0, :3, 0] = np.nan, np.inf, -np.inf
    nibabel.save(nibabel.Nifti1Image(voxels, source.affine), root / "images" / "p2_a.nii.gz")
    assert main(["check", recipe_for("nifti", root, tmp_path)]) == 0
    assert "images/p2_a.nii.gz: 3 of 7,200 voxels are NaN or infinite" in capsys.readouterr().err


def test_dicom_series_are_written_as_volumes_on_the_grid_of_their_masks(tmp_path, capsys):
    nibabel, pydicom = pytest.importorskip("nibabel"), pytest.importorskip("pydicom")
    root, affine, rng = tmp_path / "data", np.diag([-0.5, -0.5, 3.0, 1.0]), np.random.default_rng(0)
    (root / "masks").mkdir(parents=True)
    for k in range(5):
        mask = np.stack([block(rng, 40, 36, 14) for _ in range(6)], axis=-1)
        array = (100 * mask + rng.normal(0, 15, mask.shape)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / "masks" / f"p{k}.nii.gz")
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
    recipe, run, keys = recipe_for("dicom", root, tmp_path), tmp_path / "run", ["data.window=150", "data.level=50"]
    assert main(["check", recipe, *keys]) == 0
    assert "problems: none" in capsys.readouterr().out
    assert main(["fit", recipe, "--run", str(run), *keys, "train.epochs=6", "evaluate.surface=false"]) == 0
    for name in ("README", "DICOMDIR", ".DS_Store"):  # above the series
        (root / "images" / name).write_text("not an image")
    assert main(["predict", str(run), str(root / "images"), "-o", str(tmp_path / "out")]) == 0
    found = {path.name: nibabel.load(path) for path in (tmp_path / "out").iterdir()}
    truths = {path.name: nibabel.load(path) for path in (root / "masks").iterdir()}
    assert found.keys() == truths.keys()
    for written in found.values():
        np.testing.assert_array_equal(written.affine, affine)
    assert dice([(found[name].get_fdata(), truths[name].get_fdata()) for name in truths]) > 0.8
    cut = root / "images" / "p1" / "4.dcm"
    cut.write_bytes(cut.read_bytes()[:500])
    capsys.readouterr()
    assert main(["predict", str(run), str(root / "images"), "-o", str(tmp_path / "sound")]) == 1
    assert "images/p1/4.dcm: without" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "sound").iterdir()} == truths.keys() - {"p1.nii.gz"}


def test_volumes_of_a_patient_in_two_splits_are_refused(volumes, tmp_path, capsys):
    recipe = recipe_for("nifti", volumes, tmp_path)
    for split, lines in (("train", "p1_a\np2_a\np2_b\np3_a"), ("val", "p1_b\np4_a")):
        (tmp_path / f"{split}.txt").write_text(lines)
    keys = [f"data.lists.{split}={tmp_path / split}.txt" for split in ("train", "val")] + ["data.group='p[0-9]+'"]
    assert main(["fit", recipe, "--run", str(tmp_path / "run"), *keys]) == 2
    assert "p1 (train, val)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Scenes of four bands with a bright field each and a border without data."""
    rasterio = pytest.importorskip("rasterio")
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    grid = {"driver": "GTiff", "width": 70, "height": 60, "crs": "EPSG:32633"}
    for row, (split, count) in enumerate([("train", 3), ("val", 1), ("test", 1)]):
        for i in range(count):
            mask = block(rng, 60, 70, 25)
            bands = (rng.normal(400, 40, (4, 60, 70)) + 900.0 * mask).astype(np.int16)
            bands[1] *= -1
            bands[:, :3] = 0
            place = rasterio.Affine(10, 0, 5e5 + 700 * i, 0, -10, 5e6 - 600 * row)
            for folder, content, more in (("images", bands, {"nodata": 0}), ("masks", mask[None], {})):
                path = root / folder / split / f"{i}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                profile = grid | {"count": len(content), "dtype": content.dtype, "transform": place} | more
                with rasterio.open(path, "w", **profile) as file:
                    file.write(content)
    return root


def test_scenes_are_trained_by_crops_and_written_georeferenced(scenes, tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("pyogrio")
    recipe, run = recipe_for("geotiff", scenes, tmp_path), tmp_path / "run"
    keys = ["data.crops_per_image=8", "data.rare_crops=0.5", "data.augment={band_dropout: 0.2, rot90: 0.5}"]
    assert main(["check", recipe, *keys]) == 0
    assert "problems: none" in capsys.readouterr().out
    keys += ["train.epochs=5", "train.monitor=miou", "evaluate.tta=[hflip]"]
    assert main(["fit", recipe, "--run", str(run), *keys]) == 0
    result = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert result["headline"] == "miou"
    assert sum(row["pixels"] for row in result["per_class"]) == 57 * 70, "the border has no label"
    given, out = scenes / "images" / "train", tmp_path / "out"
    assert main(["predict", str(run), str(given), "-o", str(out), "--polygons"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{i}.{kind}" for i in range(3) for kind in ("gpkg", "tif")]
    pairs = []
    for path in sorted(given.iterdir()):
        with rasterio.open(out / path.name) as written, rasterio.open(path) as image:
            assert (written.crs, written.transform, written.shape) == (image.crs, image.transform, image.shape)
            assert (written.read(1)[:3] == 255).all()
            assert set(np.unique(written.read(1)[3:])) <= {0, 1}
            with rasterio.open(scenes / "masks" / "train" / path.name) as truth:
                pairs.append((written.read(1), truth.read(1)))
    assert dice(pairs) > 0.8


def test_one_unreadable_scene_does_not_keep_the_others_from_being_predicted(scenes, tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio")
    recipe, run, given = recipe_for("geotiff", scenes, tmp_path), tmp_path / "run", tmp_path / "in"
    assert main(["fit", recipe, "--run", str(run), "data.batch_size=3", "evaluate.surface=false"]) == 0
    given.mkdir()
    (given / "a.tif").write_bytes(b"no raster")
    shutil.copy(scenes / "images" / "test" / "0.tif", given / "b.tif")
    with rasterio.open(given / "b.tif") as source:
        profile, values = source.profile, source.read()
    with rasterio.open(given / "c.tif", "w", **profile | {"crs": None}) as sink:
        sink.write(values)
    with rasterio.open(given / "d.tif", "w", **profile | {"count": 3}) as sink:
        sink.write(values[:3])
    predict = ["predict", str(run), str(given), "-o"]
    assert main([*predict, str(tmp_path / "polygons"), "--polygons"]) == 2
    text = capsys.readouterr().err
    assert "c.tif" in text
    assert "coordinate reference system" in text
    assert not (tmp_path / "polygons").exists()
    assert main([*predict, str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert "a.tif: not a readable raster" in text
    assert "d.tif: 3 bands, but the network was trained on 4 bands" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.tif", "c.tif"]
