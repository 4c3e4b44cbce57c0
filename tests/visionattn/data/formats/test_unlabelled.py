"""Images without labels, in every format that is read: which samples there are, and what belongs together."""

import csv
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from visionattn.data import formats
from visionattn.data.splits import split
from visionattn.data.survey import mean_std, read_through
from visionattn.errors import UserError
from visionattn.tasks.pretraining.recipe import DATA
from visionattn.tasks.pretraining.transforms import Crops, Windows

RNG = np.random.default_rng(0)


def images(root: Path) -> dict:
    for patient in ("P1", "P2", "P3"):
        (root / patient / "deep").mkdir(parents=True)
        for k in range(2):
            picture = Image.fromarray(RNG.integers(0, 255, (40, 50), dtype=np.uint8))
            picture.save(root / patient / "deep" / f"{k}.png")
    return {"format": "unlabelled", "root": root, "group": "^(P[0-9]+)"}


def geotiff(root: Path) -> dict:
    root.mkdir()
    for k in range(3):
        values = RNG.integers(1, 4000, (13, 90, 70), dtype=np.uint16)
        values[:, :20] = 0
        profile = {"driver": "GTiff", "count": 13, "height": 90, "width": 70, "dtype": "uint16", "nodata": 0}
        place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 1000 * k, 0, -10, 0)}
        with rasterio.open(root / f"{k}.tif", "w", **profile, **place) as file:
            file.write(values)
    return {"format": "geotiff", "root": root, "bands": [4, 3, 2]}


def nifti(root: Path) -> dict:
    root.mkdir()
    for name in ("P1_a", "P1_b", "P2_a"):
        volume = nibabel.Nifti1Image(RNG.integers(-1000, 1000, (34, 36, 4)).astype(np.int16), np.eye(4))
        nibabel.save(volume, root / f"{name}.nii.gz")
    return {"format": "nifti", "root": root, "group": "^(P[0-9]+)", "window": 400, "level": 40}


def dicom(root: Path) -> dict:
    for name in ("one", "two"):
        (root / "archive" / name).mkdir(parents=True)
        for k in range(3):
            meta = pydicom.dataset.FileMetaDataset()
            meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
            header = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
            header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
            header.SeriesInstanceUID, header.Rows, header.Columns, header.PixelSpacing = "1.2.3", 40, 36, [1, 1]
            header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, 2 * k], [1, 0, 0, 0, 1, 0]
            header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
            header.BitsAllocated = header.BitsStored = 16
            header.HighBit, header.PixelRepresentation = 15, 1
            header.PixelData = RNG.integers(0, 900, (40, 36)).astype(np.int16).tobytes()
            header.save_as(root / "archive" / name / f"{k}.dcm", enforce_file_format=True)
    return {"format": "dicom", "root": root}


def arrays(root: Path) -> dict:
    root.mkdir()
    for k in range(4):
        np.save(root / f"{k}.npy", RNG.integers(0, 9000, (40, 50, 13), dtype=np.uint16))
    return {"format": "unlabelled", "root": root}


def npz(root: Path) -> dict:
    root.mkdir()
    np.savez(root / "a.npz", images=RNG.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    return {"format": "npz", "root": root / "a.npz"}


def npy(root: Path) -> dict:
    root.mkdir()
    np.save(root / "a.npy", RNG.random((6, 32, 32), dtype=np.float32))
    return {"format": "npz", "root": root / "a.npy"}


def table(root: Path) -> dict:
    images(root)
    with (root / "images.csv").open("w", newline="") as file:
        rows = [[f"{p}/deep/{k}.png", p] for p in ("P1", "P2", "P3") for k in range(2)]
        csv.writer(file).writerows([["path", "patient"], *rows])
    return {"format": "csv", "root": root / "images.csv", "group_column": "patient"}


def builtin(root: Path) -> dict:
    return {"format": "builtin", "name": "digits"}


EXPECTED = {  # samples, groups, channels
    images: (6, 3, 1),
    arrays: (4, 4, 13),
    geotiff: (3, 3, 3),
    nifti: (12, 2, 1),
    dicom: (6, 2, 1),
    npz: (6, 6, 3),
    npy: (6, 6, 1),
    table: (6, 3, 1),
    builtin: (1797, 1797, 1),
}


@pytest.mark.parametrize("made", EXPECTED, ids=lambda made: made.__name__)
def test_images_are_found_split_by_group_and_read(made, tmp_path):
    given = made(tmp_path / "data")
    section = DATA[given["format"]](**given, image_size=32, val_fraction=0.3)
    samples, classes, problems = formats.find(section)
    assert (classes, problems) == ([], [])
    dataset, more = split(samples, classes, section)
    assert not more
    count, groups, channels = EXPECTED[made]
    assert len(dataset.samples) == len({sample.name for sample in dataset.samples}) == count
    of_split = [{sample.group for sample in part} for part in dataset.splits.values()]
    assert not of_split[0] & of_split[1]
    assert len(of_split[0] | of_split[1]) == groups
    dataset = read_through(dataset)
    assert not [reading.error for part in dataset.readings.values() for reading in part if reading.error]
    mean, std = mean_std(dataset.readings["train"])
    assert len(mean) == channels
    data = section.model_copy(update={"mean": mean.tolist(), "std": std.tolist()})
    for item in (Crops(dataset.splits["train"], data, 0)[0, 0], Windows(dataset.splits["val"], data)[0]):
        assert item["image"].shape == (channels, 32, 32)
        assert item["image"].isfinite().all()


def test_missing_pixels_are_the_mean_and_marked(tmp_path):
    section = DATA["geotiff"](**geotiff(tmp_path / "data"), image_size=32)
    samples = formats.find(section).samples
    data = section.model_copy(update={"mean": [2000.0] * 3, "std": [1000.0] * 3})
    windows = Windows(samples, data)
    assert [len([p for p in windows.parts if p[0] == i]) for i in range(3)] == [4, 4, 4]
    first = windows[0]
    assert not first["valid"][:, :20].any()
    assert first["valid"][:, 20:].all()
    assert (first["image"][:, :20] == 0).all()
    crops = Crops(samples, data, 0)
    again = Crops(samples, data, 0)
    assert all((crops[3, i]["image"] == again[3, i]["image"]).all() for i in range(3))
    assert not (crops[3, 0]["image"] == crops[4, 0]["image"]).all()
    assert all(crops[0, i]["valid"].float().mean() >= 0.3 for i in range(3))


@pytest.mark.parametrize(
    ("format", "make", "words"),
    [
        ("unlabelled", lambda root: None, "is missing, expected a folder"),
        ("unlabelled", lambda root: root.mkdir(), "no files that end with"),
        ("npz", lambda root: None, "no such file"),
    ],
)
def test_what_is_not_there_is_named(format, make, words, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=words):
        formats.find(DATA[format](format=format, root=tmp_path / "data"))


def test_scenes_of_other_bands_are_named(tmp_path):
    given = geotiff(tmp_path / "data") | {"bands": None}
    profile = {"driver": "GTiff", "count": 4, "height": 40, "width": 40, "dtype": "uint8"}
    with rasterio.open(tmp_path / "data" / "x.tif", "w", **profile, transform=Affine(1, 0, 5, 0, -1, 5)) as file:
        file.write(np.ones((4, 40, 40), np.uint8))
    (line,) = formats.find(DATA["geotiff"](**given)).problems
    assert "x.tif: 4 bands, but 3 of 4 scenes have 13" in line
