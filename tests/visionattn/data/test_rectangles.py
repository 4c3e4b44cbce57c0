"""Largest rectangles, against all rectangles one by one."""

from itertools import combinations

import numpy as np
import pytest

from visionattn.data.rectangles import largest_rectangles


def inside(small, large) -> bool:
    return small != large and all(
        (s >= t) if k < 2 else (s <= t) for k, (s, t) in enumerate(zip(small, large, strict=True))
    )


@pytest.mark.parametrize("share", [0, 0.5, 0.8, 1])
def test_they_are_those_that_no_other_one_holds(share):
    region = np.random.default_rng(3).random((6, 7)) < share
    rows, columns = (list(combinations(range(n + 1), 2)) for n in region.shape)
    fitting = [
        (left, top, right, bottom)
        for top, bottom in rows
        for left, right in columns
        if region[top:bottom, left:right].all()
    ]
    expected = {one for one in fitting if not any(inside(one, other) for other in fitting)}
    found = largest_rectangles(region).tolist()
    assert {tuple(one) for one in found} == expected
    assert len(found) == len(expected)
