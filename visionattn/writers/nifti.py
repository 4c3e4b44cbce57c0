"""Masks as NIfTI, NAME.nii.gz: what the recipe's masks say, with the orientation, affine and header of the volume.

Maps of what makes them doubtful are NAME_MAP.nii.gz, float32.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.labels import MaskCode
from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.files import new_file
from visionattn.writers import FilePerCase, readable

__all__ = ["open"]


class Volumes(FilePerCase):
    suffix = map_suffix = ".nii.gz"

    def __init__(
        self,
        out: Path,
        code: MaskCode,
        colors: Any,
        leave_out: Sequence[str],
        polygons: bool,
        maps: Sequence[str] = (),
    ) -> None:
        super().__init__(out, maps)
        self.code = code
        if polygons:
            raise UserError("--polygons is for scenes, but the model was trained on volumes")

    def write(self, case: Sequence[Any], predictions: Iterable[Prediction]) -> None:
        import nibabel

        labels = np.full((len(case), *case[0].size), IGNORE, np.uint8)
        maps = {name: np.zeros(labels.shape, np.float32) for name in self.maps}
        for prediction in readable(predictions):
            place = (prediction.index, *(prediction.window or ()))
            labels[place] = np.asarray(prediction.value)
            for name, values in maps.items():
                values[place] = prediction.doubts[name]
        (out,) = self.made_for(case[0].case)
        with new_file(out) as path:
            nibabel.save(_as_stored(case[0].volume, self.code.written(labels)), path)
        for name, file in self.map_files_of(case[0].case).items():
            with new_file(file) as path:
                nibabel.save(_as_stored(case[0].volume, maps[name]), path)


def _as_stored(volume: Any, labels: np.ndarray) -> Any:
    """A NIfTI image of (slices, rows, columns) on the grid of a `visionattn.data.formats._volumes.Volume`."""
    import nibabel

    stored, affine = volume.as_stored(labels), np.array(volume.stored_affine)
    if volume.files:
        return nibabel.Nifti1Image(stored, affine, dtype=stored.dtype)
    source = nibabel.load(volume.path)
    header = source.header.copy()
    header.set_data_dtype(stored.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the range that viewers show
    return type(source)(stored, source.affine, header)


open = Volumes
