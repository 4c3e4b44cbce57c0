"""Outlines of masks, against shapely and by drawing them again."""

import numpy as np
import pytest

from visionattn.data.object_masks import Polygons
from visionattn.data.outlines import in_one, outlines

shapely = pytest.importorskip("shapely")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.7, 0.97, 1])
@pytest.mark.parametrize("seed", range(5))
def test_outlines_are_valid_and_hold_the_pixels(share, seed):
    mask = np.random.default_rng(seed).random((17, 23)) < share
    mask[3, 4] = True
    window = slice(0, 17), slice(0, 23)
    polygons = outlines(mask)
    shapes = [shapely.Polygon(outer, holes) for outer, *holes in polygons]
    assert all(shape.is_valid for shape in shapes)
    assert sum(shape.area for shape in shapes) == mask.sum()
    rows, columns = np.mgrid[window] + 0.5
    held = [shapely.contains_xy(shape, columns, rows) for shape in shapes]
    assert np.array_equal(np.sum(held, axis=0), mask)
    assert np.array_equal(Polygons((in_one(polygons),)).on(window), mask)


def test_an_island_in_a_hole_is_a_polygon_of_its_own():
    mask = np.ones((9, 9), bool)
    mask[1:8, 1:8] = False
    mask[3:6, 3:6] = True
    mask[4, 4] = False
    assert [[len(ring) for ring in polygon] for polygon in outlines(mask)] == [[4, 4], [4, 4]]
    assert [polygon[0].tolist() for polygon in outlines(mask)][1] == [[3, 3], [6, 3], [6, 6], [3, 6]]


def test_nothing_has_no_outline():
    assert outlines(np.zeros((3, 3), bool)) == []
