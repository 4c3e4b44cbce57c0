"""Which scenes lie on the same ground, in whatever coordinate systems they are."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from visionattn.data.sample import Dataset, Sample
from visionattn.errors import listed

__all__ = ["same_ground"]

SHARED = 0.01  # of the smaller scene: less is the rounding of tiles that lie side by side
EDGE = 16  # points of an outline's edge, which bends in another coordinate system


def same_ground(dataset: Dataset) -> list[str]:
    """A line where scenes of different splits overlap on the ground."""
    pairs = []
    for (one, first), (other, second) in combinations(dataset.splits.items(), 2):
        shared = _overlapping([s for s in first if s.ground], [s for s in second if s.ground])
        pairs += [f"{one}: {a} and {other}: {b}" for a, b in shared]
    if not pairs:
        return []
    return [
        "scenes in different splits share ground, so results on held-out scenes are too good: "
        f"{listed(pairs, most=5)}; keep them together by data.group or data.lists"
    ]


def _overlapping(first: Sequence[Sample], second: Sequence[Sample]) -> list[tuple[str, str]]:
    """Names of those that overlap by more than SHARED of the smaller one, measured in the system of the first."""
    pairs = []
    for crs in dict.fromkeys(sample.ground[0] for sample in first if sample.ground):
        import shapely

        own = [sample for sample in first if sample.ground and sample.ground[0] == crs]
        mine, others = _polygons(own, crs), _polygons(second, crs)
        i, j = shapely.STRtree(others).query(mine, predicate="intersects")
        shared = shapely.area(shapely.intersection(mine[i], others[j]))
        enough = shared > SHARED * np.minimum(shapely.area(mine[i]), shapely.area(others[j]))
        pairs += [(own[a].name, second[b].name) for a, b in zip(i[enough], j[enough], strict=True)]
    return pairs


def _polygons(scenes: Sequence[Sample], crs: str) -> np.ndarray:
    """Their outlines in a coordinate system; an empty polygon of what that system cannot show."""
    import shapely
    from rasterio.warp import transform

    polygons = np.full(len(scenes), shapely.Polygon())
    for i, scene in enumerate(scenes):
        assert scene.ground is not None  # of those that are asked for
        system, outline = scene.ground
        corners = np.array(outline)
        if system != crs:
            steps = np.arange(EDGE)[:, None] / EDGE
            edges = [a + steps * (b - a) for a, b in zip(corners, np.roll(corners, -1, 0), strict=True)]
            corners = np.stack(transform(system, crs, *np.concatenate(edges).T), axis=1)
        if np.isfinite(corners).all():
            polygons[i] = shapely.make_valid(shapely.Polygon(corners))
    return polygons
