"""NIfTI volumes and DICOM series as slices: orientation, intensities, geometry, and what is refused."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.recipe import DicomData, NiftiData

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
from visionattn.data.formats import _volumes as volumes  # noqa: E402

SHAPE = (6, 5, 4)  # right to left, front to back, feet to head, before files store it otherwise
LPS = np.diag([-0.5, -0.75, 2.0, 1.0])  # mm


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def labels() -> np.ndarray:
    return (values() % 3).astype(np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray = LPS, codes: str | None = None) -> Path:
    """A NIfTI file of an array whose axes are LPS, stored with its axes along `codes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    if codes:
        turn = nibabel.orientations.ornt_transform(*map(nibabel.orientations.axcodes2ornt, ("LPS", codes)))
        image = image.as_reoriented(turn)
    nibabel.save(image, path)
    return path


def nifti(root: Path, **keys) -> NiftiData:
    return NiftiData(format="nifti", root=root, **{"classes": ["none", "liver", "tumour"]} | keys)


@pytest.fixture
def pair(tmp_path) -> Path:
    save(tmp_path / "images/p1.nii.gz", values())
    save(tmp_path / "masks/p1.nii.gz", labels())
    return tmp_path


def series(folder: Path, array: np.ndarray = None, **tags) -> Path:
    """A DICOM series of an array with the axes LPS; files are named against the order of their slices."""
    array = values() if array is None else array
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(array.shape[2]):
        slice_of(folder / f"{array.shape[2] - k}.dcm", array[:, :, k].T, k, **tags)
    return folder


def slice_of(path: Path, pixels: np.ndarray, k: int, **tags) -> None:
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header = pydicom.dataset.FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.SeriesInstanceUID = "1.2.3"
    header.Rows, header.Columns = pixels.shape
    header.PixelSpacing = [0.75, 0.5]
    header.ImagePositionPatient = [0, 0, 2 * k]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 1
    header.PixelData = pixels.astype(np.int16).tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def dicom(root: Path, **keys) -> DicomData:
    return DicomData(format="dicom", root=root, **{"classes": ["none", "liver", "tumour"]} | keys)


@pytest.fixture
def study(tmp_path) -> Path:
    series(tmp_path / "images/p1")
    save(tmp_path / "masks/p1.nii.gz", labels())
    return tmp_path


def test_a_volume_becomes_slices_in_order(pair):
    items, problems = volumes.scan(nifti(pair, window=100, level=50))
    assert problems == []
    assert [item.name for item in items] == [f"p1_slice{k:03d}" for k in range(4)]
    assert {(item.case, item.group, item.size, item.channels, item.spacing) for item in items} == {
        ("p1", "p1", (5, 6), 1, (2.0, 0.75, 0.5))
    }
    for k, item in enumerate(items):
        np.testing.assert_allclose(item.image()[0], values()[:, :, k].T.clip(0, 100) / 100, atol=1e-6)
        assert item.image().dtype == np.float32
        np.testing.assert_array_equal(item.mask(), labels()[:, :, k].T)
        assert item.mask().dtype == np.int64
        part = slice(1, 4), slice(2, 6)
        np.testing.assert_array_equal(item.image(part), item.image()[:, *part])
        np.testing.assert_array_equal(item.mask(part), item.mask()[part])


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "SLP", "AIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_orientation_shows_the_same_slices(tmp_path, codes, axis, ending):
    save(tmp_path / f"images/p1{ending}", values(), codes=codes)
    save(tmp_path / "masks/p1.nii.gz", labels(), codes="LAS")
    items, problems = volumes.scan(nifti(tmp_path, axis=axis, window=1000, level=500))
    assert problems == []
    shown = values() if axis == 2 else values()[:, :, ::-1]
    truth = labels() if axis == 2 else labels()[:, :, ::-1]
    assert len(items) == SHAPE[axis]
    for k, item in enumerate(items):
        np.testing.assert_allclose(item.image()[0], shown.take(k, axis).T / 1000, atol=1e-6)
        np.testing.assert_array_equal(item.mask(), truth.take(k, axis).T)
    assert items[0].spacing == ((0.5, 2.0, 0.75), (0.75, 2.0, 0.5), (2.0, 0.75, 0.5))[axis]


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLP", "AIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_go_back_to_where_they_are_stored(tmp_path, codes, axis):
    path = save(tmp_path / "a.nii", values(), codes=codes)
    volume = volumes.open_volume(path, axis)
    slices = np.stack([volume.voxels().values(k)[..., 0] for k in range(volume.shape[0])])
    np.testing.assert_array_equal(volume.as_stored(slices), nibabel.load(path).get_fdata())


def test_without_a_window_percentiles_become_0_and_1(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.normal(40, 10, (40, 40, 20)).astype(np.float32)
    array[0, 0, 0], array[0, 0, 1] = 1e6, np.nan
    save(tmp_path / "images/p1.nii.gz", array)
    save(tmp_path / "masks/p1.nii.gz", np.zeros(array.shape, np.uint8))
    items, _ = volumes.scan(nifti(tmp_path))
    image = np.stack([item.image() for item in items])
    assert np.isfinite(image).all()
    assert image.min() == 0
    assert image.max() == 1
    assert (image == 0).mean() == pytest.approx(0.005, abs=0.002)
    assert image.mean() == pytest.approx(0.5, abs=0.02)


def test_a_fourth_axis_is_channels(tmp_path):
    save(tmp_path / "images/p1.nii.gz", np.stack([values(), 2 * values()], axis=-1))
    save(tmp_path / "masks/p1.nii.gz", labels())
    items, problems = volumes.scan(nifti(tmp_path, window=1000, level=500))
    assert problems == []
    assert {item.channels for item in items} == {2}
    np.testing.assert_allclose(items[3].image()[1], 2 * values()[:, :, 3].T / 1000, atol=1e-6)


def test_scaled_files_are_read_by_their_scale(tmp_path):
    image = nibabel.Nifti1Image(values(), LPS)
    image.header.set_slope_inter(0.5, -10)
    (tmp_path / "images").mkdir()
    nibabel.save(image, tmp_path / "images/p1.nii.gz")
    save(tmp_path / "masks/p1.nii.gz", labels().astype(np.float64))
    items, _ = volumes.scan(nifti(tmp_path, window=100, level=0))
    stored = nibabel.load(tmp_path / "images/p1.nii.gz").get_fdata()
    np.testing.assert_allclose(items[2].image()[0], (stored[:, :, 2].T + 50).clip(0, 100) / 100, atol=1e-6)
    np.testing.assert_array_equal(items[2].mask(), labels()[:, :, 2].T)


def test_a_compressed_volume_is_unpacked_once(pair, monkeypatch):
    monkeypatch.setattr(volumes, "_CACHE", volumes._Cache())
    loaded, load = [], volumes._load
    monkeypatch.setattr(volumes, "_load", lambda volume: loaded.append(volume.path.parent.name) or load(volume))
    for item in volumes.scan(nifti(pair))[0]:
        item.image()
        item.mask()
    assert sorted(loaded) == ["images", "masks"]


def test_the_cache_keeps_to_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "_CACHE", volumes._Cache())
    monkeypatch.setattr(volumes, "CACHE_BYTES", 3 * values().nbytes)
    for k in range(5):
        save(tmp_path / f"images/p{k}.nii.gz", values())
        save(tmp_path / f"masks/p{k}.nii.gz", labels())
    for item in volumes.scan(nifti(tmp_path))[0]:
        item.image()
        item.mask()
    assert len(volumes._CACHE.kept) == 4  # two volumes of int16, two masks of uint8


def test_items_can_be_sent_to_another_process(pair):
    item = volumes.scan(nifti(pair))[0][1]
    again = pickle.loads(pickle.dumps(item))
    assert again == item
    np.testing.assert_array_equal(again.image(), item.image())


def test_patients_are_groups(tmp_path):
    for name in ("anna_1", "anna_2", "bert_1"):
        save(tmp_path / f"images/{name}.nii.gz", values())
        save(tmp_path / f"masks/{name}.nii.gz", labels())
    items, _ = volumes.scan(nifti(tmp_path, group="^[a-z]+"))
    assert {(item.case, item.group) for item in items} == {("anna_1", "anna"), ("anna_2", "anna"), ("bert_1", "bert")}


def test_values_that_are_no_classes_are_named(pair):
    save(pair / "masks/p1.nii.gz", labels() * 7)
    items, problems = volumes.scan(nifti(pair))
    assert problems == []
    with pytest.raises(UserError, match=r"masks/p1\.nii\.gz, slice 1 of axis 2: the mask has 7, 14, but classes are"):
        items[1].mask()
    items, _ = volumes.scan(nifti(pair, ignore_index=14, values=[0, 7, 99]))
    np.testing.assert_array_equal(items[1].mask(), np.array([0, 1, IGNORE])[labels()[:, :, 1].T])


def moved(x: float) -> np.ndarray:
    affine = LPS.copy()
    affine[0, 3] = x
    return affine


@pytest.mark.parametrize(
    ("array", "affine", "says"),
    [
        (labels(), moved(3.0), r"images/p1\.nii\.gz and .*masks/p1\.nii\.gz have different affines: .* 3 mm apart"),
        (labels(), np.diag([-1.0, -0.75, 2, 1]), "different affines"),
        (labels()[1:], LPS, r"images/p1\.nii\.gz is 6x5x4, but .*masks/p1\.nii\.gz is 5x5x4"),
        (np.stack([labels()] * 2, -1), LPS, r"masks/p1\.nii\.gz: 2 volumes in one mask file"),
        (labels()[0], LPS, r"masks/p1\.nii\.gz: its shape is \(5, 4\), expected three axes"),
    ],
)
def test_masks_of_another_grid_are_problems(pair, array, affine, says):
    save(pair / "masks/p1.nii.gz", array, affine)
    items, problems = volumes.scan(nifti(pair))
    assert items == []
    assert len(problems) == 1
    assert re.search(says, problems[0])


def test_affines_may_differ_by_rounding(pair):
    save(pair / "masks/p1.nii.gz", labels(), LPS + 1e-4)
    assert volumes.scan(nifti(pair))[1] == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_damaged_files_are_named(tmp_path, ending):
    rng = np.random.default_rng(0)
    image = save(tmp_path / f"images/p1{ending}", rng.integers(0, 1000, (40, 40, 10), dtype=np.int16))
    save(tmp_path / "masks/p1.nii", np.zeros((40, 40, 10), np.uint8))
    image.write_bytes(image.read_bytes()[:5000])
    items, problems = volumes.scan(nifti(tmp_path))
    assert problems == []  # the header is sound
    with pytest.raises(UserError, match=rf"images/p1{ending}: damaged"):
        items[0].image()
    image.write_bytes(b"not a volume")
    assert f"images/p1{ending}: not a readable NIfTI file" in volumes.scan(nifti(tmp_path))[1][0]


def test_a_missing_mask_is_named(pair):
    save(pair / "images/p2.nii.gz", values())
    items, problems = volumes.scan(nifti(pair))
    assert len(items) == 4
    assert "images/p2.nii.gz: no mask" in problems[0]


def test_a_series_is_sorted_by_place_and_rescaled(study):
    series(study / "images/p1", RescaleSlope=2, RescaleIntercept=-100)
    items, problems = volumes.scan(dicom(study, window=400, level=100))
    assert problems == []
    assert [item.name for item in items] == [f"p1_slice{k:03d}" for k in range(4)]
    assert items[0].spacing == (2.0, 0.75, 0.5)
    for k, item in enumerate(items):
        expected = (2 * values()[:, :, k].T - 100 + 100) / 400
        np.testing.assert_allclose(item.image()[0], expected.clip(0, 1), atol=1e-6)
        np.testing.assert_array_equal(item.mask(), labels()[:, :, k].T)


def test_a_series_and_its_nifti_twin_are_the_same(study):
    twin = save(study / "twin.nii", values(), codes="RAS")
    for axis in (0, 1, 2):
        a, b = volumes.open_volume(study / "images/p1", axis), volumes.open_volume(twin, axis)
        np.testing.assert_allclose(a.corners(), b.corners(), atol=1e-6)
        np.testing.assert_array_equal(a.image(1), b.image(1))


def test_inverted_grey_is_turned_round(study):
    normal = volumes.open_volume(study / "images/p1").image(1, (100, 50))
    series(study / "images/p1", PhotometricInterpretation="MONOCHROME1")
    inverted = volumes.open_volume(study / "images/p1")
    assert inverted.inverted
    np.testing.assert_allclose(inverted.image(1, (100, 50)), 1 - normal, atol=1e-6)


def drop_slice(folder: Path) -> None:
    (folder / "2.dcm").unlink()


def second_series(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 9, SeriesInstanceUID="1.2.4")


def same_place(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 3)


def uneven(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 0, ImagePositionPatient=[0, 0, 8.5])


def other_size(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[1:, :, 0].T, 4)


def without_place(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 4, ImagePositionPatient=None)


def frames(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 4, NumberOfFrames=2)


def colours(folder: Path) -> None:
    slice_of(folder / "9.dcm", values()[:, :, 0].T, 4, PhotometricInterpretation="RGB", SamplesPerPixel=3)


def no_dicom(folder: Path) -> None:
    (folder / "9.dcm").write_text("hello")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_slice, r"images/p1: slices are missing between 3\.dcm and 1\.dcm, which are 4 mm apart.* 2 mm"),
        (second_series, r"images/p1: 2 series in one folder \(4 files of 1\.2\.3, 1 files of 1\.2\.4\)"),
        (same_place, r"images/p1: (1|9)\.dcm and (1|9)\.dcm are at the same place"),
        (uneven, r"images/p1: slices are unevenly spaced, 2 to 2\.5 mm"),
        (other_size, r"images/p1/9\.dcm: Columns is 5, but 6 in 1\.dcm"),
        (without_place, r"images/p1/9\.dcm: without ImagePositionPatient"),
        (frames, r"images/p1/9\.dcm: several frames"),
        (colours, r"images/p1/9\.dcm: pixels are RGB"),
        (no_dicom, r"images/p1/9\.dcm: not a DICOM file"),
    ],
)
def test_series_that_are_no_volume_are_problems(study, spoil, says):
    (study / "images/p1/notes.txt").write_text("not an image")
    assert volumes.scan(dicom(study))[1] == []
    spoil(study / "images/p1")
    items, problems = volumes.scan(dicom(study))
    assert items == []
    assert len(problems) == 1
    assert re.search(says, problems[0])


def test_a_series_without_its_last_slice_is_told_by_its_mask(study):
    (study / "images/p1/1.dcm").unlink()
    items, (problem,) = volumes.scan(dicom(study))
    assert items == []
    assert re.search(r"images/p1 is 6x5x3, but .*masks/p1.* is 6x5x4; are slices of the series missing", problem)


def test_a_series_and_a_mask_without_each_other_are_named(study):
    series(study / "images/p2")
    (study / "masks/p3.nii.gz").write_bytes(b"")
    _, (series_alone, mask_alone) = volumes.scan(dicom(study))
    assert "images/p2: no mask" in series_alone
    assert re.search(r"masks/p3\.nii\.gz: no folder .*images/p3$", mask_alone)


def test_a_damaged_slice_is_named(study):
    path = study / "images/p1/3.dcm"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"images/p1/3\.dcm: damaged"):
        volumes.scan(dicom(study))[0][0].image()
