"""DICOM series as slices: geometry, intensities as pydicom has them, what belongs to a series, and what is refused."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from visionattn.data import formats
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.recipe.sections import Data
from visionattn.tasks.segmentation.recipe import DATA

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
from visionattn.data.formats._volumes import open_volume  # noqa: E402

SHAPE = (6, 5, 4)  # right to left, front to back, feet to head
LPS = np.diag([-0.5, -0.75, 2.0, 1.0])  # mm


def values() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def labels() -> np.ndarray:
    return (values() % 3).astype(np.uint8)


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


def dicom(root: Path, **keys) -> Data:
    return DATA["dicom"](format="dicom", root=root, **{"classes": ["none", "liver", "tumour"]} | keys)


def scan(section: Data) -> tuple[list[Sample], list[str]]:
    """The slices that a section finds, and what is wrong."""
    samples, _, problems = formats.module_of(section).find(section)
    return samples, problems


@pytest.fixture
def study(tmp_path) -> Path:
    series(tmp_path / "images/p1")
    (tmp_path / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(labels(), LPS), tmp_path / "masks/p1.nii.gz")
    return tmp_path


def test_a_series_is_sorted_by_place_and_rescaled(study):
    series(study / "images/p1", RescaleSlope=2, RescaleIntercept=-100)
    samples, problems = scan(dicom(study, window=400, level=100))
    assert problems == []
    assert [sample.name for sample in samples] == [f"p1_slice{k:03d}" for k in range(4)]
    assert samples[0].spacing == (2.0, 0.75, 0.5)
    for k, sample in enumerate(samples):
        expected = (2 * values()[:, :, k].T - 100 + 100) / 400
        np.testing.assert_allclose(sample.image()[0], expected.clip(0, 1), atol=1e-6)
        np.testing.assert_array_equal(sample.target(), labels()[:, :, k].T)


def test_a_series_and_its_nifti_twin_are_the_same(study):
    twin = study / "twin.nii"
    nibabel.save(nibabel.as_closest_canonical(nibabel.Nifti1Image(values(), LPS)), twin)
    for axis in (0, 1, 2):
        a, b = open_volume(study / "images/p1", axis), open_volume(twin, axis)
        np.testing.assert_allclose(a.corners(), b.corners(), atol=1e-6)
        np.testing.assert_array_equal(a.image(1), b.image(1))


def test_inverted_grey_is_turned_round(study):
    normal = open_volume(study / "images/p1").image(1, (100, 50))
    series(study / "images/p1", PhotometricInterpretation="MONOCHROME1")
    inverted = open_volume(study / "images/p1")
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
    assert scan(dicom(study))[1] == []
    spoil(study / "images/p1")
    samples, problems = scan(dicom(study))
    assert samples == []
    assert len(problems) == 1
    assert re.search(says, problems[0])


def test_a_series_without_its_last_slice_is_told_by_its_mask(study):
    (study / "images/p1/1.dcm").unlink()
    samples, (problem,) = scan(dicom(study))
    assert samples == []
    assert re.search(r"images/p1 is 6x5x3, but .*masks/p1.* is 6x5x4; are slices of the series missing", problem)


def test_a_series_and_a_mask_without_each_other_are_named(study):
    series(study / "images/p2")
    (study / "masks/p3.nii.gz").write_bytes(b"")
    _, (series_alone, mask_alone) = scan(dicom(study))
    assert "images/p2: no mask" in series_alone
    assert re.search(r"masks/p3\.nii\.gz: no folder .*images/p3$", mask_alone)


def test_a_damaged_slice_is_named(study):
    path = study / "images/p1/3.dcm"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"images/p1/3\.dcm: damaged"):
        scan(dicom(study))[0][0].image()


# Intensities


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"RescaleSlope": 2.5, "RescaleIntercept": -30},
        {"RescaleSlope": 0.001, "RescaleIntercept": 0.5},
        {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0},
    ],
    ids=str,
)
def test_values_are_those_of_pydicom(study, tags):
    folder = series(study / "images/p1", **tags)
    width, level = (1.0, 0.5) if tags.get("RescaleSlope") == 0.001 else (1000.0, 500.0)
    samples, problems = scan(dicom(study, window=width, level=level))
    assert problems == []
    for k, sample in enumerate(samples):
        source = pydicom.dcmread(folder / f"{4 - k}.dcm")
        truth = pydicom.pixels.apply_modality_lut(source.pixel_array, source)
        shown = ((truth - level + width / 2) / width).clip(0, 1)
        np.testing.assert_allclose(sample.image()[0], shown, atol=1e-6)


@pytest.mark.parametrize(
    ("tags", "factor", "offset"),
    [
        ({"RescaleSlope": "", "RescaleIntercept": ""}, 1, 0),
        ({"RescaleSlope": None, "RescaleIntercept": 7}, 1, 7),
        ({"RescaleSlope": 3, "RescaleIntercept": ""}, 3, 0),
        ({"RescaleSlope": 3}, 3, 0),
        ({"RescaleIntercept": 7}, 1, 7),
    ],
    ids=str,
)
def test_an_empty_slope_is_1_and_an_empty_intercept_0(study, tags, factor, offset):
    series(study / "images/p1", **tags)
    samples, problems = scan(dicom(study, window=1000, level=500))
    assert problems == []
    for k, sample in enumerate(samples):
        np.testing.assert_allclose(sample.image()[0], (factor * values()[:, :, k].T + offset) / 1000, atol=1e-6)


def test_slices_may_be_scaled_differently(study):
    """As those of PET are."""
    for k in range(4):
        slice_of(study / f"images/p1/{4 - k}.dcm", values()[:, :, k].T, k, RescaleSlope=k + 1, RescaleIntercept=-k)
    samples, _ = scan(dicom(study, window=1000, level=500))
    for k, sample in enumerate(samples):
        np.testing.assert_allclose(sample.image()[0], ((k + 1) * values()[:, :, k].T - k).clip(0) / 1000, atol=1e-6)


def test_a_table_goes_before_slope_and_intercept(study):
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [200, 0, 16], "US"
    table.LUTData = np.arange(0, 800, 4, dtype=np.uint16).tobytes()
    folder = series(study / "images/p1", PixelRepresentation=0, ModalityLUTSequence=[table])
    samples, _ = scan(dicom(study, window=1000, level=500))
    for k, sample in enumerate(samples):
        source = pydicom.dcmread(folder / f"{4 - k}.dcm")
        truth = pydicom.pixels.apply_modality_lut(source.pixel_array, source)
        np.testing.assert_array_equal(truth, 4 * values()[:, :, k].T)
        np.testing.assert_allclose(sample.image()[0], truth / 1000, atol=1e-6)


# What belongs to a series


def bare(path: Path) -> Path:
    """The same data set in a file without preamble and file meta, called without an ending."""
    source = pydicom.dcmread(path)
    del source.file_meta
    path.unlink()
    source.save_as(path.with_name(f"IM{path.stem}"), implicit_vr=True, little_endian=True, enforce_file_format=False)
    return path.with_name(f"IM{path.stem}")


@pytest.mark.parametrize("which", [["2", "3"], ["1", "2", "3", "4"]])
def test_slices_without_preamble_and_ending_are_read(study, which):
    for name in which:
        bare(study / f"images/p1/{name}.dcm")
    samples, problems = scan(dicom(study, window=1000, level=500))
    assert problems == []
    assert len(samples) == 4
    for k, sample in enumerate(samples):
        np.testing.assert_allclose(sample.image()[0], values()[:, :, k].T / 1000, atol=1e-6)


def directory() -> bytes:
    """What a DICOMDIR of a study's folder holds, without its records."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.FileSetID = "STUDY"
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def report() -> bytes:
    """A structured report of another series, which has no pixels."""
    header = pydicom.dcmread(io.BytesIO(directory()))
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.BasicTextSRStorage
    header.SeriesInstanceUID, header.Modality = "1.2.9", "SR"
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


OTHERS = {
    "README": b"not an image",
    "README.txt": b"not an image",
    "DICOMDIR": directory(),
    "report": report(),
    ".DS_Store": b"\0\0\0\1Bud1",
    "._1.dcm": b"\0\5\x16\7",
    "empty": b"",
    "preview.png": b"\x89PNG\r\n" + bytes(500),
}


def test_other_files_are_no_slices(study):
    for name, content in OTHERS.items():
        (study / "images/p1" / name).write_bytes(content)
    samples, problems = scan(dicom(study))
    assert problems == []
    assert len(samples) == 4


def test_folders_without_images_are_no_series(study):
    """Above and beside a series, as exports of hospitals have them."""
    (study / "images/docs").mkdir()
    for folder in ("images", "images/docs"):
        for name, content in OTHERS.items():
            (study / folder / name).write_bytes(content)
    series(study / "images/p2/axial")
    samples, problems = formats.unlabelled([study / "images"], dicom(study), 1)
    assert problems == []
    assert {sample.case for sample in samples} == {"p1", "p2/axial"}


def test_a_readme_above_a_labelled_series_is_no_series(study):
    (study / "images/p1/docs").mkdir()
    for folder in ("images", "images/p1/docs"):
        (study / folder / "README").write_text("not an image")
    (study / "images/p3").mkdir()
    (study / "images/p3/README").write_text("not an image")
    (study / "images/p1").rename(study / "images/p3/axial")
    (study / "masks/p3").mkdir()
    (study / "masks/p1.nii.gz").rename(study / "masks/p3/axial.nii.gz")
    samples, problems = scan(dicom(study))
    assert problems == []
    assert {sample.case for sample in samples} == {"p3/axial"}


def test_a_given_folder_without_any_series_is_refused(study):
    (study / "docs").mkdir()
    (study / "docs/README").write_text("not an image")
    with pytest.raises(UserError, match=r"no DICOM images in .*docs$"):
        formats.unlabelled([study / "images", study / "docs"], dicom(study), 1)


def spoilt(path: Path, how: str) -> Path:
    """A slice that cannot be used, without an ending where `how` says so."""
    source = pydicom.dcmread(path)
    if how.startswith("without "):
        delattr(source, how.removeprefix("without "))
        source.save_as(path)
        return path
    if how == "empty Rows":
        source.Rows = None
        source.save_as(path)
        return path
    if "bare" in how:
        path = bare(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * float(how.split()[-1]))])
    return path


SPOILT = [
    *(f"without {tag}" for tag in ("Rows", "Columns", "SeriesInstanceUID", "PixelSpacing", "PixelData")),
    *(f"cut to {share}" for share in (0, 0.1, 0.3, 0.5, 0.7, 0.95)),
    *(f"bare, cut to {share}" for share in (0, 0.02, 0.2, 0.5, 0.8)),
    "empty Rows",
]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("number", [1, 3])  # a slice at an end, whose lack leaves no gap, and one between others
def test_a_slice_that_cannot_be_read_refuses_the_series_by_name(study, how, number):
    for other in {1, 2, 3, 4} - {number} if "bare" in how else ():
        bare(study / f"images/p1/{other}.dcm")
    name = spoilt(study / f"images/p1/{number}.dcm", how).name
    samples, problems = formats.unlabelled([study / "images"], dicom(study), 1)
    if problems:
        assert samples == []
        assert re.search(rf"images/p1/{name}: ", problems[0])
    else:
        with pytest.raises(UserError, match=rf"images/p1/{name}: damaged"):
            samples[0].image()


def test_wherever_a_slice_is_cut_the_series_is_refused(study):
    path = study / "images/p1/1.dcm"
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"\b1\.dcm"):
            open_volume(study / "images/p1").voxels()


def test_a_series_is_measured_in_mm(study):
    series(study / "images/p1", PixelSpacing=[1, 1])
    samples, _ = formats.unlabelled([study / "images"], dicom(study), 1)
    assert (samples[0].spacing, samples[0].unit) == ((2.0, 1.0, 1.0), "mm")
