"""Outlines of masks: polygons along the edges of their pixels, which hold exactly these pixels.

Pixels that touch at a corner only are not connected; no ring meets itself, so that geographic programs take every
polygon as valid.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from visionattn.data.object_masks import Polygons

__all__ = ["in_one", "outlines"]

Ring = np.ndarray  # (n, 2) x and y of its corners, the last one not repeated


def outlines(mask: np.ndarray) -> list[list[Ring]]:
    """Polygons of a bool mask (h, w): each its outer ring, clockwise as one sees it, then its holes, the other way."""
    rings = [_corners(ring) for ring in _rings(mask)]
    areas = [_area(ring) for ring in rings]
    outer = sorted((area, k) for k, area in enumerate(areas) if area > 0)
    polygons = {k: [rings[k]] for k, area in enumerate(areas) if area > 0}
    for ring, area in zip(rings, areas, strict=True):
        if area < 0:
            polygons[next(k for _, k in outer if len(outer) == 1 or _inside(ring, rings[k]))].append(ring)
    return list(polygons.values())


def in_one(polygons: Sequence[Sequence[Ring]]) -> Ring:
    """All rings as one, joined by ways there and back, which hold nothing by the rule of even and odd crossings."""
    first, *others = [ring for polygon in polygons for ring in polygon]
    if not others:
        return first
    there_and_back = [np.concatenate([ring, ring[:1], first[:1]]) for ring in others]
    return np.concatenate([first, first[:1], *there_and_back])


def _rings(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Closed ways along pixel edges with the pixels to the right; cut in two where they would meet themselves."""
    following = _edges(mask)
    while following:
        way = [next(iter(following))]
        place, came = {way[0]: 0}, (0, 0)
        while (here := way[-1]) in following:
            there = _next(following, here, came)
            came = there[0] - here[0], there[1] - here[1]
            if there in place:
                ring = way[place[there] :]
                del way[place[there] :]
                for corner in ring:
                    del place[corner]
                yield np.array(ring)
            place[there] = len(way)
            way.append(there)


def _edges(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """From each corner where the edges of pixels at the mask's border lead to."""
    padded = np.pad(mask, 1)
    on = padded[1:-1, 1:-1]
    sides = [  # of a pixel at 0, 0: the neighbour beyond the side, and the side's corners
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    ]
    following = defaultdict(list)
    for beyond, start, end in sides:
        places = np.argwhere(on & ~beyond)[:, ::-1]
        for a, b in zip((places + start).tolist(), (places + end).tolist(), strict=True):
            following[a[0], a[1]].append((b[0], b[1]))
    return following


def _next(following: dict, here: tuple[int, int], came: tuple[int, int]) -> tuple[int, int]:
    """Where the way goes on: to the right where there is a choice."""
    choices = following[here]
    right = here[0] - came[1], here[1] + came[0]
    there = right if right in choices else choices[0]
    choices.remove(there)
    if not choices:
        del following[here]
    return there


def _corners(ring: Ring) -> Ring:
    """Without what lies on straight lines."""
    ahead = np.roll(ring, -1, axis=0) - ring
    return ring[(ahead != np.roll(ahead, 1, axis=0)).any(1)]


def _area(ring: Ring) -> float:
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _inside(hole: Ring, ring: Ring) -> bool:
    """Whether the pixel to the right of a hole's first edge, which belongs to the polygon, is in this outer ring."""
    along = np.sign(hole[1] - hole[0])
    column, row = np.floor(hole[0] + 0.5 * along + 0.5 * np.array([-along[1], along[0]])).astype(int)
    return bool(Polygons((ring,)).on((slice(row, row + 1), slice(column, column + 1))).item())
