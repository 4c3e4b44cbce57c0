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
        with table.open(tmp_path / "t.csv", ["p:" + "long" * 30], lambda value: value.tolist()) as writer:
            for _ in range(rows):
                writer.write([sample], [Prediction(0, np.array([0.5]))])

    with full_disk(100), pytest.raises(Unwritable, match=r"t\.csv: could not be written .*has been removed"):
        write()
    assert files(tmp_path) == []
