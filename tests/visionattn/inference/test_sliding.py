"""Sliding windows: no seams, no row or column forgotten, bounded memory, wrong networks named."""

import time
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn.errors import UserError
from visionattn.inference.sliding import predict_windows, slide

CLASSES = 3


def pointwise(image: torch.Tensor) -> torch.Tensor:
    """(B, 2, h, w) -> three probabilities that depend on each pixel alone."""
    return torch.stack([image[:, 0], image[:, 1], image[:, 0] * image[:, 1]], dim=1).softmax(1)


def shift(image: torch.Tensor) -> torch.Tensor:
    """As `pointwise`, of the pixel five rows above and three columns to the left: wrong at the edges of a window."""
    return pointwise(F.pad(image, (3, 0, 5, 0))[:, :, : image.shape[2], : image.shape[3]])


def blurred(image: torch.Tensor) -> torch.Tensor:
    return pointwise(F.avg_pool2d(image, 7, 1, 3))


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def streamed(predict, image: torch.Tensor, window: tuple[int, int], **keys) -> torch.Tensor:
    size = tuple(image.shape[1:])
    bands = list(slide(predict, lambda part: image[:, *part].numpy(), size, CLASSES, window, **keys))
    rows = [rows for rows, _ in bands]
    assert rows[0].start == 0
    assert rows[-1].stop == size[0]
    assert [r.stop for r in rows[:-1]] == [r.start for r in rows[1:]]
    assert all(values.shape[1] == r.stop - r.start for r, values in bands)
    return torch.cat([values for _, values in bands], dim=1)


@pytest.mark.parametrize("predict", [pointwise, shift, blurred])
@pytest.mark.parametrize(("size", "overlap"), [((100, 131), 0.5), ((97, 64), 0.4), ((33, 200), 0.75)])
def test_a_map_is_the_same_tiled_or_whole(predict, size, overlap):
    image = picture(*size)
    whole = predict(image[None])[0]
    for tiled in (
        streamed(predict, image, (64, 64), overlap=overlap),
        predict_windows(predict, image, (64, 64), overlap, batch_size=3),
    ):
        torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 40), st.integers(4, 20)),
    st.floats(0, 0.8),
    st.integers(1, 9),
)
def test_any_size_window_and_overlap_cover_every_pixel(size, window, overlap, batch_size):
    image = picture(*size)
    whole = pointwise(image[None])[0]
    tiled = streamed(pointwise, image, window, overlap=overlap, batch_size=batch_size)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(predict_windows(pointwise, image, window, overlap, batch_size), whole, atol=1e-5, rtol=0)


def test_strips_of_columns_are_the_columns_of_the_whole():
    image = picture(90, 150)
    whole = streamed(blurred, image, (32, 48))
    strips = [streamed(blurred, image, (32, 48), columns=slice(*ends)) for ends in ((0, 40), (40, 41), (41, 150))]
    torch.testing.assert_close(torch.cat(strips, dim=2), whole, atol=1e-6, rtol=0)


def test_an_image_smaller_than_the_window_is_seen_whole():
    seen = []

    def predict(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return pointwise(image)

    image = picture(20, 30)
    streamed(predict, image, (64, 64))
    predict_windows(predict, image, (64, 64))
    assert seen == [(1, 2, 20, 30)] * 2


def test_windows_without_anything_are_left_out():
    image = picture(64, 96)
    calls = []

    def read(window: tuple[slice, slice]) -> np.ndarray | None:
        return image[:, *window].numpy() if window[1].stop > 48 else None

    def predict(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return pointwise(batch)

    bands = slide(predict, read, (64, 96), CLASSES, (32, 32), overlap=0, batch_size=2)
    values = torch.cat([band for _, band in bands], dim=1)
    assert sum(calls) == 4
    assert not values[:, :, :32].any()
    torch.testing.assert_close(values[:, :, 32:], pointwise(image[None, :, :, 32:])[0])


def test_nothing_is_read_after_closing():
    """What is read may be closed then, as a raster is whose mask could not be written."""
    reading = []

    def read(window: tuple[slice, slice]) -> np.ndarray:
        reading.append("starts")
        time.sleep(0.2)
        reading.append("ends")
        return np.zeros((2, 16, 16), dtype=np.float32)

    with closing(slide(pointwise, read, (320, 16), CLASSES, (16, 16), batch_size=1)) as bands:
        next(bands)
    seen = list(reading)
    time.sleep(0.3)
    assert seen[-1] == "ends"
    assert reading == seen


def test_bands_stay_small_however_high_the_image():
    def read(window: tuple[slice, slice]) -> np.ndarray:
        return np.zeros((2, *(part.stop - part.start for part in window)), dtype=np.float32)

    sizes = [values.numel() for _, values in slide(pointwise, read, (1000, 64), CLASSES, (64, 64))]
    assert max(sizes) <= CLASSES * 64 * 64


@pytest.mark.parametrize(
    ("predict", "error", "says"),
    [
        (lambda x: pointwise(x)[:, :2], ValueError, r"gave \(4, 2, 16, 16\).*expected \(4, 3, 16, 16\)"),
        (lambda x: pointwise(x)[..., ::2, ::2], ValueError, r"gave \(4, 3, 8, 8\)"),
        (lambda x: pointwise(x) * 2, ValueError, "expected probabilities"),
        (lambda x: pointwise(x) * torch.nan, UserError, "not finite"),
    ],
)
def test_networks_that_give_something_else_are_refused(predict, error, says):
    with pytest.raises(error, match=says):
        streamed(predict, picture(40, 40), (16, 16))


@pytest.mark.parametrize("keys", [{"overlap": 1.0}, {"overlap": -0.1}, {"columns": slice(10, 41)}])
def test_arguments_out_of_range_are_refused(keys):
    with pytest.raises(ValueError, match=r"overlap is|columns are"):
        streamed(pointwise, picture(40, 40), (16, 16), **keys)


def test_what_reading_raises_reaches_the_caller():
    def read(window: tuple[slice, slice]) -> np.ndarray:
        raise UserError("scene.tif: damaged")

    with pytest.raises(UserError, match=r"scene\.tif: damaged"):
        next(slide(pointwise, read, (40, 40), CLASSES, (16, 16)))
