"""Sliding-window inference: an image of any size through a network that sees one window at a time.

Windows overlap and are blended by Gaussian weights that sum to 1 at every pixel. Where windows overlap, the outer
quarter of the overlap is left out, since a network knows least there: one that looks no further than that from a pixel
gives the same map tiled or whole.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionattn.data.sample import Window
from visionattn.errors import UserError

__all__ = ["Predict", "Read", "predict_windows", "slide", "strips"]

Predict = Callable[[Tensor], Tensor]  # images (B, C, h, w) -> probabilities (B, classes, h, w)
Read = Callable[[Window], np.ndarray | None]  # -> (C, h, w) float32, as the network wants it; None: nothing there
SIGMA = 1 / 8  # of the Gaussian weights, in windows, as nnU-Net has it
TILE = 512  # strips are whole tiles of this width, which writers compress at once
BAND_BYTES = 2**28  # of the band that is being blended; wider scenes are done in strips of columns


def slide(
    predict: Predict,
    read: Read,
    size: tuple[int, int],
    classes: int,
    window: tuple[int, int],
    overlap: float = 0.5,
    batch_size: int = 4,
    columns: slice | None = None,
    device: torch.device | str = "cpu",
    more: int = 0,
) -> Generator[tuple[slice, Tensor], None, None]:
    """Class probabilities of an image too large for memory, as bands of finished rows from top to bottom.

    The band that is being blended takes 4 * classes * window height * columns bytes, whatever the image's height. To
    bound it for wide images, do them in several runs over `columns`: the values are exactly the same.

    Args:
        predict: gets batches of windows on `device`, and gives probabilities, not logits.
        read: the pixels of a window; the next batch is read in another thread while the network works, to the end or
            until the generator is closed. Windows without anything (None) are left out.
        size: (H, W) of the image.
        window: (h, w) of what the network sees at most; it sees smaller images whole.
        overlap: least share of a window that the next one covers again, from 0 to below 1.
        columns: give only these columns.
        more: planes that `predict` gives behind the probabilities, which are blended alike.

    Yields:
        the rows, and their probabilities (classes + more, rows, columns) float32 on `device`; 0 where there was
        nothing.

    Raises:
        UserError: the network's results are not finite.
        ValueError: arguments out of range, or results that are no probabilities (B, classes, h, w).
    """
    columns = columns or slice(0, size[1])
    if not 0 <= columns.start < columns.stop <= size[1]:
        raise ValueError(f"columns are {columns.start} to {columns.stop} of an image {size[1]} wide")
    (tops, down), (lefts, across) = _grid(size, window, overlap, device)
    height, width = down.shape[1], across.shape[1]
    used = [i for i, left in enumerate(lefts) if columns.start - width < left < columns.stop]
    groups = [used[i : i + batch_size] for i in range(0, len(used), batch_size)]

    def images(top: int, group: list[int]) -> list[tuple[int, np.ndarray]]:
        windows = [(i, read((slice(top, top + height), slice(lefts[i], lefts[i] + width)))) for i in group]
        return [(i, image) for i, image in windows if image is not None]

    band = torch.zeros(classes + more, height, columns.stop - columns.start, device=device)
    with closing(_ahead(images, [(top, group) for top in tops for group in groups])) as coming:
        for weights, (top, end) in zip(down, pairwise([*tops, size[0]]), strict=True):
            for _ in groups:
                if batch := next(coming):
                    stack = torch.from_numpy(np.stack([image for _, image in batch])).to(device)
                    values = _checked(predict, stack, more, classes)
                    for (i, _), value in zip(batch, values, strict=True):
                        _add(band, value * (weights[:, None] * across[i]), lefts[i] - columns.start)
            yield slice(top, end), band[:, : end - top].clone()
            _move_up(band, end - top)


def strips(width: int, column_bytes: int) -> Iterator[slice]:
    """Columns of a scene to be done at once: whole tiles, of about equal width, whose band stays within BAND_BYTES."""
    tiles = math.ceil(width / TILE)
    parts = math.ceil(tiles / max(BAND_BYTES // (column_bytes * TILE), 2))
    step = math.ceil(tiles / parts) * TILE
    return (slice(left, min(left + step, width)) for left in range(0, width, step))


def predict_windows(
    predict: Predict,
    image: Tensor,
    window: tuple[int, int],
    overlap: float = 0.5,
    batch_size: int = 4,
    more: int = 0,
) -> Tensor:
    """Probabilities (classes + more, H, W) of an image (C, H, W) in memory, on its device; the rest as in `slide`."""
    size = image.shape[1], image.shape[2]
    (tops, down), (lefts, across) = _grid(size, window, overlap, image.device)
    height, width = down.shape[1], across.shape[1]
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    total = None
    for group in (places[n : n + batch_size] for n in range(0, len(places), batch_size)):
        crops = [image[:, tops[i] : tops[i] + height, lefts[j] : lefts[j] + width] for i, j in group]
        values = _checked(predict, torch.stack(crops), more)
        if total is None:
            total = image.new_zeros(values.shape[1], *image.shape[1:], dtype=torch.float32)
        for (i, j), value in zip(group, values, strict=True):
            _add(total[:, tops[i] : tops[i] + height], value * (down[i][:, None] * across[j]), lefts[j])
    assert total is not None  # an image has at least one window
    return total


def _ahead(work: Callable[..., Any], calls: Sequence[tuple]) -> Generator[Any, None, None]:
    """Results of the calls in order; each call runs in another thread while its predecessor's result is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(work, *calls[0])
        for call in calls[1:]:
            done = coming.result()
            coming = pool.submit(work, *call)
            yield done
        yield coming.result()


def _grid(
    size: tuple[int, int], window: tuple[int, int], overlap: float, device: torch.device | str
) -> list[tuple[list[int], Tensor]]:
    """Of rows and of columns: where windows start, and their weights (windows, window)."""
    if min(*size, *window) < 1:
        raise ValueError(f"size is {size} and window {window}, expected at least one pixel")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected 0 to below 1")
    axes = [_weights(length, min(part, length), overlap) for length, part in zip(size, window, strict=True)]
    return [(starts, torch.from_numpy(weights).to(device)) for starts, weights in axes]


def _weights(length: int, window: int, overlap: float) -> tuple[list[int], np.ndarray]:
    """Starts of the windows along an axis, and their weights (windows, window), which sum to 1 at each pixel."""
    step = max(1, window - int(np.ceil(window * overlap)))
    starts = [*range(0, length - window, step), length - window]
    margin = (window - step) // 4
    weights = np.tile(np.exp(-0.5 * (np.linspace(-0.5, 0.5, window) / SIGMA) ** 2), (len(starts), 1))
    weights[1:, :margin] = 0
    weights[:-1, window - margin :] = 0
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    for start, weight in zip(starts, weights, strict=True):
        weight /= total[start : start + window]
    return starts, weights.astype(np.float32)


def _checked(predict: Predict, images: Tensor, more: int, classes: int | None = None) -> Tensor:
    with torch.inference_mode():
        values = predict(images).float()
        classes = classes or values.shape[1] - more
        shape = (len(images), classes + more, *images.shape[2:])
        if values.shape != shape:
            raise ValueError(f"predict gave {tuple(values.shape)} for images {tuple(images.shape)}, expected {shape}")
        error = (values[:, :classes].sum(1) - 1).abs().max().item()
    if not np.isfinite(error):
        raise UserError("the network's results are not finite; was it trained to the end, and in which precision?")
    if error > 0.01:
        raise ValueError(f"predict gave values that sum to 1 with an error of {error:.3g}: expected probabilities")
    return values


def _add(band: Tensor, value: Tensor, left: int) -> None:
    """Add a window to the columns of a band; `left` may lie outside it."""
    first, last = max(left, 0), min(left + value.shape[2], band.shape[2])
    band[:, :, first:last] += value[:, :, first - left : last - left]


def _move_up(band: Tensor, rows: int) -> None:
    for plane in band:  # one by one, since the copy takes memory
        plane[: len(plane) - rows] = plane[rows:].clone()
        plane[len(plane) - rows :] = 0
