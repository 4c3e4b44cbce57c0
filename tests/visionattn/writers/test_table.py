"""Tables of predictions: whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from visionattn.data.images import ImageFile
from visionattn.data.prediction import Prediction
from visionattn.files import Unwritable
from visionattn.writers import table


@pytest.mark.parametrize("rows", [1, 2000])  # one is written as the table is closed, many before
def test_a_full_disk_leaves_no_half_table(tmp_path, files, full_disk, rows):
    sample = ImageFile("a.png", "a.png", "a.png", 1, (4, 4), path=Path("a.png"))

    def write() -> None:
        with table.open(tmp_path / "t.csv", ["p:" + "long" * 30], lambda p: p.value.tolist()) as writer:
            for _ in range(rows):
                writer.write([sample], [Prediction(0, np.array([0.5]))])

    with full_disk(100), pytest.raises(Unwritable, match=r"t\.csv: could not be written .*has been removed"):
        write()
    assert files(tmp_path) == []


@pytest.mark.parametrize("processes", [1, 3])
def test_values_too_long_for_a_table_are_kept_beside_it_row_by_row(tmp_path, files, processes):
    values = np.random.default_rng(0).random((7, 150)).astype(np.float32)
    samples = [ImageFile(f"{i}.png", f"{i}.png", f"{i}.png", 1, (4, 4), path=Path(f"{i}.png")) for i in range(8)]
    for process in reversed(range(processes)):  # the first one joins what the others have written
        writer = table.open(tmp_path / "t.csv", ["largest"], lambda p: [p.value.argmax()], 150)
        with writer.share(process, processes):
            for i in range(process, 8, processes):
                if i == 4:
                    writer.leave_out("4.png")
                else:
                    writer.write([samples[i]], [Prediction(0, values[i - (i > 4)])])
    names = [line.split(",")[0] for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert names == ["path", *(f"{i}.png" for i in range(8))]
    kept = np.load(tmp_path / "t.npy")
    assert np.isnan(kept[4]).all()
    assert np.array_equal(np.delete(kept, 4, 0), values)
    assert files(tmp_path) == ["t.csv", "t.npy"]
    (tmp_path / "t.csv").unlink()
    with pytest.raises(Unwritable, match=r"t\.npy exists"):
        table.open(tmp_path / "t.csv", [], len, 150)


def test_an_error_leaves_neither_table_nor_values(tmp_path, files):
    def fail() -> None:
        with table.open(tmp_path / "t.csv", ["x"], lambda p: [], 150) as writer:
            writer.leave_out("a.png")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert files(tmp_path) == []
