"""Objects of a scene of any size, through a detector that sees one tile at a time."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Window
from visionattn.inference.merging import merge, rows_of_tiles
from visionattn.inference.sliding import Read, ahead

__all__ = ["detect"]

Detect = Callable[[Tensor], Sequence[Boxes]]  # images (B, C, h, w) -> the objects of each, in its pixels, with scores


def detect(
    predict: Detect,
    read: Read,
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: float,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    agnostic: bool = False,
) -> Generator[Boxes, None, None]:
    """The objects of a scene, in its pixels, from top to bottom; memory does not grow with the scene's height.

    Args:
        predict: gets batches of tiles on `device`.
        read: the pixels of a window; the next batch is read in another thread while the network works, to the end or
            until the generator is closed. Windows without anything (None) are left out.
        size: (H, W) of the scene.
        tile: (h, w) of what the network sees at most.
        overlap: least share of a tile that the next one covers again; objects larger than that are put together from
            their parts.
        agnostic: see `visionattn.inference.merging.merge`.
    """
    rows = rows_of_tiles(size, tile, overlap)
    batches = [row[i : i + batch_size] for row in rows for i in range(0, len(row), batch_size)]

    def images(windows: Sequence[Window]) -> list[tuple[Window, np.ndarray]]:
        return [(window, image) for window in windows if (image := read(window)) is not None]

    def found(coming: Iterator[list[tuple[Window, np.ndarray]]]) -> Iterator[list[tuple[Window, Boxes]]]:
        for row in rows:
            shown: list[tuple[Window, Boxes]] = []
            for _ in range(0, len(row), batch_size):
                if batch := next(coming):
                    stack = torch.from_numpy(np.stack([image for _, image in batch])).to(device)
                    with torch.inference_mode():
                        objects = predict(stack)
                    shown += [(window, boxes) for (window, _), boxes in zip(batch, objects, strict=True)]
            yield shown

    with closing(ahead(images, [(batch,) for batch in batches])) as coming:
        yield from merge(found(coming), size, agnostic=agnostic)
