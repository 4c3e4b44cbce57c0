"""Masks of volumes: NIfTI on the grid and with the header of the volume, whole or not at all."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from visionattn.data import formats
from visionattn.data.labels import MaskCode
from visionattn.data.prediction import PackedMask, Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import Unwritable
from visionattn.tasks.segmentation.recipe import DATA
from visionattn.writers import nifti

nibabel = pytest.importorskip("nibabel")
from nibabel.eulerangles import euler2mat  # noqa: E402

CLASSES = ["none", "liver", "tumour"]
CODE = MaskCode(CLASSES, [0, 1, 2])


def voxels() -> tuple[np.ndarray, np.ndarray]:
    """A noise volume and an oblique affine."""
    affine = np.eye(4)
    affine[:3, :3] = euler2mat(0.1, 0.2, 0.05) @ np.diag([-0.8, 0.9, 2.5])
    affine[:3, 3] = 10, -20, 30
    return np.random.default_rng(0).integers(0, 100, (9, 8, 7), dtype=np.int16), affine


@pytest.fixture
def scan(tmp_path) -> Path:
    nibabel.save(nibabel.Nifti1Image(*voxels()), tmp_path / "scan.nii")
    return tmp_path / "scan.nii"


def by_brightness(samples: list[Sample]) -> Iterator[Prediction]:
    """Three classes, a slice in two parts."""
    for index, sample in enumerate(samples):
        for window in ((slice(0, 3), slice(0, sample.size[1])), (slice(3, sample.size[0]), slice(0, sample.size[1]))):
            mask = np.digitize(sample.image(window)[0], [0.3, 0.6])
            yield Prediction(index, PackedMask(mask), window)


def with_doubts(samples: list[Sample]) -> Iterator[Prediction]:
    for prediction in by_brightness(samples):
        image = samples[prediction.index].image(prediction.window)
        yield prediction._replace(doubts={"entropy": image[0] / 2})


def write(path: Path, out: Path, axis: int = 2, predicted=by_brightness, maps: Sequence[str] = ()) -> None:
    section = DATA["nifti"](format="nifti", root=Path(), classes=CLASSES, axis=axis, window=100, level=50)
    samples, problems = formats.unlabelled([path], section, 1)
    assert problems == []
    with nifti.open(out, CODE, [None] * 3, [], polygons=False, maps=maps) as writer:
        writer.refuse(samples)
        writer.write(samples, predicted(samples))


@pytest.mark.parametrize("axis", [0, 2])
def test_maps_of_doubts_lie_on_the_grid_of_the_volume(tmp_path, axis):
    array, affine = voxels()
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_slope_inter(0.5, 3)  # of the scan, not of the map
    nibabel.save(image, tmp_path / "scan.nii.gz")
    stored = nibabel.load(tmp_path / "scan.nii.gz").get_fdata()
    write(tmp_path / "scan.nii.gz", tmp_path / "out", axis, with_doubts, ["entropy"])
    written = nibabel.load(tmp_path / "out" / "scan_entropy.nii.gz")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    np.testing.assert_allclose(written.get_fdata(), stored.clip(0, 100) / 200, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_volume_keeps_its_grid_and_header(tmp_path, files, axis, kind):
    array, affine = voxels()
    image = kind(array, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    image.set_qform(affine, code="scanner")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    write(tmp_path / "scan.nii.gz", tmp_path / "out", axis)
    written, source = nibabel.load(tmp_path / "out/scan.nii.gz"), nibabel.load(tmp_path / "scan.nii.gz")
    assert type(written) is type(source)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, source.affine)
    for name in ("qform_code", "sform_code", "xyzt_units"):
        assert written.header[name] == source.header[name]
    np.testing.assert_array_equal(written.get_fdata(), np.digitize(array / 100, [0.3, 0.6]))
    assert files(tmp_path) == ["out/scan.nii.gz", "scan.nii.gz"]


def test_a_volume_that_is_there_is_never_overwritten(tmp_path, scan):
    write(scan, tmp_path / "out")
    content = (tmp_path / "out/scan.nii.gz").read_bytes()
    with pytest.raises(Unwritable, match=r"out/scan\.nii\.gz exists; predictions are never overwritten"):
        write(scan, tmp_path / "out")
    assert (tmp_path / "out/scan.nii.gz").read_bytes() == content


def test_a_volume_with_an_unreadable_slice_is_not_written(tmp_path, scan, files):
    def damaged(samples: list[Sample]) -> Iterator[Prediction]:
        *parts, last = by_brightness(samples)
        yield from parts
        yield Prediction(last.index, error=f"{samples[last.index].name}: damaged")

    with pytest.raises(UserError, match="scan_slice006: damaged"):
        write(scan, tmp_path / "out", predicted=damaged)
    assert files(tmp_path) == ["scan.nii"]


def test_polygons_are_for_scenes(tmp_path):
    with pytest.raises(UserError, match="--polygons is for scenes"):
        nifti.open(tmp_path / "out", CODE, [None] * 3, [], polygons=True)


def test_a_full_disk_leaves_no_volume(tmp_path, scan, files, full_disk):
    with full_disk(100), pytest.raises(Unwritable, match=r"scan\.nii\.gz: could not be written .*has been removed"):
        write(scan, tmp_path / "out")
    assert files(tmp_path) == ["scan.nii"]
