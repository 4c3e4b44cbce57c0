"""NIfTI volumes as slices: orientation, intensities, geometry, and what is refused."""

import gzip
import pickle
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from visionattn.data import formats
from visionattn.data.sample import IGNORE, Sample
from visionattn.errors import UserError
from visionattn.recipe.sections import Data
from visionattn.tasks.segmentation.recipe import DATA

nibabel = pytest.importorskip("nibabel")
from visionattn.data.formats import _volumes  # noqa: E402

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


def nifti(root: Path, **keys) -> Data:
    return DATA["nifti"](format="nifti", root=root, **{"classes": ["none", "liver", "tumour"]} | keys)


def scan(section: Data) -> tuple[list[Sample], list[str]]:
    """The slices that a section finds, and what is wrong."""
    samples, _, problems = formats.module_of(section).find(section)
    return samples, problems


@pytest.fixture
def pair(tmp_path) -> Path:
    save(tmp_path / "images/p1.nii.gz", values())
    save(tmp_path / "masks/p1.nii.gz", labels())
    return tmp_path


def test_a_volume_becomes_slices_in_order(pair):
    samples, problems = scan(nifti(pair, window=100, level=50))
    assert problems == []
    assert [sample.name for sample in samples] == [f"p1_slice{k:03d}" for k in range(4)]
    assert {(sample.case, sample.group, sample.size, sample.channels, sample.spacing) for sample in samples} == {
        ("p1", "p1", (5, 6), 1, (2.0, 0.75, 0.5))
    }
    for k, sample in enumerate(samples):
        np.testing.assert_allclose(sample.image()[0], values()[:, :, k].T.clip(0, 100) / 100, atol=1e-6)
        assert sample.image().dtype == np.float32
        np.testing.assert_array_equal(sample.target(), labels()[:, :, k].T)
        assert sample.target().dtype == np.int64
        part = slice(1, 4), slice(2, 6)
        np.testing.assert_array_equal(sample.image(part), sample.image()[:, *part])
        np.testing.assert_array_equal(sample.target(part), sample.target()[part])


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "SLP", "AIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_orientation_shows_the_same_slices(tmp_path, codes, axis, ending):
    save(tmp_path / f"images/p1{ending}", values(), codes=codes)
    save(tmp_path / "masks/p1.nii.gz", labels(), codes="LAS")
    samples, problems = scan(nifti(tmp_path, axis=axis, window=1000, level=500))
    assert problems == []
    shown = values() if axis == 2 else values()[:, :, ::-1]
    truth = labels() if axis == 2 else labels()[:, :, ::-1]
    assert len(samples) == SHAPE[axis]
    for k, sample in enumerate(samples):
        np.testing.assert_allclose(sample.image()[0], shown.take(k, axis).T / 1000, atol=1e-6)
        np.testing.assert_array_equal(sample.target(), truth.take(k, axis).T)
    assert samples[0].spacing == ((0.5, 2.0, 0.75), (0.75, 2.0, 0.5), (2.0, 0.75, 0.5))[axis]


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLP", "AIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_go_back_to_where_they_are_stored(tmp_path, codes, axis):
    path = save(tmp_path / "a.nii", values(), codes=codes)
    volume = _volumes.open_volume(path, axis)
    slices = np.stack([volume.voxels().values(k)[..., 0] for k in range(volume.shape[0])])
    np.testing.assert_array_equal(volume.as_stored(slices), nibabel.load(path).get_fdata())


def test_without_a_window_percentiles_become_0_and_1(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.normal(40, 10, (40, 40, 20)).astype(np.float32)
    array[0, 0, 0], array[0, 0, 1] = 1e6, np.nan
    save(tmp_path / "images/p1.nii.gz", array)
    save(tmp_path / "masks/p1.nii.gz", np.zeros(array.shape, np.uint8))
    samples, _ = scan(nifti(tmp_path))
    image = np.stack([sample.image() for sample in samples])
    assert np.isfinite(image).all()
    assert image.min() == 0
    assert image.max() == 1
    assert (image == 0).mean() == pytest.approx(0.005, abs=0.002)
    assert image.mean() == pytest.approx(0.5, abs=0.02)


def test_a_fourth_axis_is_channels(tmp_path):
    save(tmp_path / "images/p1.nii.gz", np.stack([values(), 2 * values()], axis=-1))
    save(tmp_path / "masks/p1.nii.gz", labels())
    samples, problems = scan(nifti(tmp_path, window=1000, level=500))
    assert problems == []
    assert {sample.channels for sample in samples} == {2}
    np.testing.assert_allclose(samples[3].image()[1], 2 * values()[:, :, 3].T / 1000, atol=1e-6)


def test_scaled_files_are_read_by_their_scale(tmp_path):
    image = nibabel.Nifti1Image(values(), LPS)
    image.header.set_slope_inter(0.5, -10)
    (tmp_path / "images").mkdir()
    nibabel.save(image, tmp_path / "images/p1.nii.gz")
    save(tmp_path / "masks/p1.nii.gz", labels().astype(np.float64))
    samples, _ = scan(nifti(tmp_path, window=100, level=0))
    stored = nibabel.load(tmp_path / "images/p1.nii.gz").get_fdata()
    np.testing.assert_allclose(samples[2].image()[0], (stored[:, :, 2].T + 50).clip(0, 100) / 100, atol=1e-6)
    np.testing.assert_array_equal(samples[2].target(), labels()[:, :, 2].T)


def test_a_compressed_volume_is_unpacked_once(pair, monkeypatch):
    monkeypatch.setattr(_volumes, "_CACHE", _volumes._Cache())
    loaded, load = [], _volumes._load
    monkeypatch.setattr(_volumes, "_load", lambda volume: loaded.append(volume.path.parent.name) or load(volume))
    for sample in scan(nifti(pair))[0]:
        sample.image()
        sample.target()
    assert sorted(loaded) == ["images", "masks"]


def test_a_compressed_volume_is_mapped_from_then_on(pair, monkeypatch):
    opened, whole = [], gzip.open
    monkeypatch.setattr(gzip, "open", lambda path, *mode: opened.append(Path(path).parent.name) or whole(path, *mode))
    wanted = [sample.read() for sample in scan(nifti(pair))[0]]
    assert sorted(opened) == ["images", "masks"]
    monkeypatch.setattr(_volumes, "_CACHE", _volumes._Cache())  # as in another process
    for sample, values_and_mask in zip(scan(nifti(pair))[0], wanted, strict=True):
        for one, other in zip(sample.read(), values_and_mask, strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(opened) == 2
    assert not any(map(_volumes._bytes, _volumes._CACHE.kept.values()))
    save(pair / "images/p1.nii.gz", values()[::-1])
    turned = scan(nifti(pair))[0]
    assert any(not np.array_equal(sample.image(), image) for sample, (image, _) in zip(turned, wanted, strict=True))
    assert len(opened) == 3


def test_without_a_place_to_unpack_to_volumes_stay_in_memory_up_to_a_size(tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    monkeypatch.setattr(_volumes, "_CACHE", _volumes._Cache())
    monkeypatch.setattr(_volumes, "CACHE_BYTES", 3 * values().nbytes)
    for k in range(5):
        save(tmp_path / f"images/p{k}.nii.gz", values())
        save(tmp_path / f"masks/p{k}.nii.gz", labels())
    for sample in scan(nifti(tmp_path))[0]:
        sample.image()
        sample.target()
    assert len(_volumes._CACHE.kept) == 4  # two volumes of int16, two masks of uint8


def test_items_can_be_sent_to_another_process(pair):
    sample = scan(nifti(pair))[0][1]
    again = pickle.loads(pickle.dumps(sample))
    assert again == sample
    np.testing.assert_array_equal(again.image(), sample.image())


def test_patients_are_groups(tmp_path):
    for name in ("anna_1", "anna_2", "bert_1"):
        save(tmp_path / f"images/{name}.nii.gz", values())
        save(tmp_path / f"masks/{name}.nii.gz", labels())
    samples, _ = scan(nifti(tmp_path, group="^[a-z]+"))
    assert {(sample.case, sample.group) for sample in samples} == {
        ("anna_1", "anna"),
        ("anna_2", "anna"),
        ("bert_1", "bert"),
    }


def test_values_that_are_no_classes_are_named(pair):
    save(pair / "masks/p1.nii.gz", labels() * 7)
    samples, problems = scan(nifti(pair))
    assert problems == []
    with pytest.raises(UserError, match=r"masks/p1\.nii\.gz, slice 1 of axis 2: the mask has 7, 14, but classes are"):
        samples[1].target()
    samples, _ = scan(nifti(pair, ignore_index=14, values=[0, 7, 99]))
    np.testing.assert_array_equal(samples[1].target(), np.array([0, 1, IGNORE])[labels()[:, :, 1].T])


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
    samples, problems = scan(nifti(pair))
    assert samples == []
    assert len(problems) == 1
    assert re.search(says, problems[0])


def test_affines_may_differ_by_rounding(pair):
    save(pair / "masks/p1.nii.gz", labels(), LPS + 1e-4)
    assert scan(nifti(pair))[1] == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_damaged_files_are_named(tmp_path, ending):
    rng = np.random.default_rng(0)
    image = save(tmp_path / f"images/p1{ending}", rng.integers(0, 1000, (40, 40, 10), dtype=np.int16))
    save(tmp_path / "masks/p1.nii", np.zeros((40, 40, 10), np.uint8))
    image.write_bytes(image.read_bytes()[:5000])
    samples, problems = scan(nifti(tmp_path))
    assert problems == []  # the header is sound
    with pytest.raises(UserError, match=rf"images/p1{ending}: damaged"):
        samples[0].image()
    image.write_bytes(b"not a volume")
    assert f"images/p1{ending}: not a readable NIfTI file" in scan(nifti(tmp_path))[1][0]


def test_a_missing_mask_is_named(pair):
    save(pair / "images/p2.nii.gz", values())
    samples, problems = scan(nifti(pair))
    assert len(samples) == 4
    assert "images/p2.nii.gz: no mask" in problems[0]


def test_volumes_with_other_channels_are_named(tmp_path):
    for name, array in (("a", values()), ("b", values()), ("c", np.stack([values()] * 2, -1))):
        save(tmp_path / f"images/{name}.nii.gz", array)
        save(tmp_path / f"masks/{name}.nii.gz", labels())
    _, (problem,) = scan(nifti(tmp_path))
    assert re.search(r"images/c\.nii\.gz: 2 channels, but 2 of 3 volumes have 1", problem)
    samples, (problem,) = formats.unlabelled([tmp_path / "images"], nifti(tmp_path), 1)
    assert {sample.case for sample in samples} == {"a", "b"}
    assert re.search(r"images/c\.nii\.gz: 2 channels, but the network was trained on 1", problem)


@pytest.mark.parametrize("spacing", [1.0, 0.5])
def test_a_volume_is_measured_in_mm(tmp_path, spacing):
    save(tmp_path / "a.nii", values(), np.diag([-spacing, -spacing, spacing, 1]))
    samples, _ = formats.unlabelled([tmp_path / "a.nii"], nifti(tmp_path), 1)
    assert (samples[0].spacing, samples[0].unit) == ((spacing,) * 3, "mm")


# Damage that compression hides, and values that are none


def spoilt(path: Path, place: float, bit: int) -> bool:
    """Flip a bit of a .nii.gz file; whether its content is different now or cannot be unpacked."""
    whole, content = gzip.decompress(path.read_bytes()), bytearray(path.read_bytes())
    content[10 + int(place * (len(content) - 11))] ^= 1 << bit
    path.write_bytes(content)
    try:
        return zlib.decompressobj(31).decompress(bytes(content)) != whole
    except zlib.error:
        return True


@pytest.mark.parametrize("folder", ["images", "masks"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_flipped_bit_is_refused_by_name(tmp_path, folder, dtype):
    """Wherever it is: most places unpack without an error to other numbers, which only the check sum tells."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 300, (24, 24, 8)).astype(dtype)
    mask = rng.integers(0, 3, (24, 24, 8)).astype(np.uint8)
    silent = 0
    for number, place in enumerate(np.linspace(0.05, 1, 24)):
        case = tmp_path / str(number)
        save(case / "images/p1.nii.gz", image)
        save(case / "masks/p1.nii.gz", mask)
        path = case / folder / "p1.nii.gz"
        assert spoilt(path, place, number % 8) or place > 0.9  # the last bytes are the check sum itself
        samples, problems = scan(nifti(case))
        if problems:  # the header is damaged
            assert "p1.nii.gz" in problems[0]
            continue
        with pytest.raises(UserError, match=rf"{folder}/p1\.nii\.gz: damaged, cannot be read"):
            [(sample.image(), sample.target()) for sample in samples]
        silent += 1
    assert silent > 12


def test_the_check_sum_of_what_no_slice_needs_is_verified(tmp_path):
    """It stands behind the voxels; files of several compressed parts are whole files."""
    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.nii.gz", rng.integers(0, 1000, (40, 40, 30), dtype=np.int16))
    content = path.read_bytes()
    (sample, *_), _ = formats.unlabelled([path], nifti(tmp_path), 1)
    plain = sample.image()
    path.write_bytes(content[:-8] + bytes(4) + content[-4:])
    with pytest.raises(UserError, match=r"a\.nii\.gz: damaged, cannot be read .*CRC"):
        sample.image()
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"a\.nii\.gz: damaged, cannot be read .*end"):
        sample.image()
    whole = gzip.decompress(content)
    path.write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    np.testing.assert_array_equal(sample.image(), plain)


def test_values_of_compressed_files_are_those_of_nibabel(tmp_path):
    rng = np.random.default_rng(0)
    for dtype, slope in (("uint8", 1), ("int16", 0.25), ("float32", 1), ("float64", 1)):
        image = nibabel.Nifti1Image(rng.integers(0, 200, SHAPE).astype(dtype), LPS)
        image.header.set_slope_inter(slope, 0)
        nibabel.save(image, tmp_path / f"{dtype}.nii.gz")
        (*samples,), _ = formats.unlabelled([tmp_path / f"{dtype}.nii.gz"], nifti(tmp_path, window=1000, level=500), 1)
        truth = nibabel.load(tmp_path / f"{dtype}.nii.gz").get_fdata()
        for k, sample in enumerate(samples):
            np.testing.assert_allclose(sample.image()[0], truth[:, :, k].T.clip(0, 1000) / 1000, atol=1e-6)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    path = save(tmp_path / "a.nii.gz", values())
    section = nifti(tmp_path, window=1000, level=500)
    (sample, *_), _ = formats.unlabelled([path], section, 1)
    sample.image()
    save(path, values() + np.int16(100))
    np.testing.assert_allclose(sample.image()[0], (values()[:, :, 0].T + 100) / 1000, atol=1e-6)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_without_a_value_are_named_once(tmp_path, caplog, ending):
    array = values().astype(np.float32)
    array[0, 0, 1], array[1, 0, 2], array[2, 0, 2] = np.nan, np.inf, -np.inf
    path = save(tmp_path / f"a{ending}", array)
    samples, _ = formats.unlabelled([path], nifti(tmp_path, window=100, level=50), 1)
    images = np.stack([sample.image()[0].T for sample in samples], -1)
    assert [images[0, 0, 1], images[1, 0, 2], images[2, 0, 2]] == [0, 1, 0]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == f"{path}: 3 of 120 voxels are NaN or infinite"
