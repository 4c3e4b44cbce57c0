"""Small charts as inline SVG, in the fonts and colours (classes s0, s1, ...) of the page that they are put into."""

from collections.abc import Iterable
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

__all__ = ["Chart", "Span"]

Span = tuple[float, float]


class Chart:
    """A chart as inline SVG, to which lines, dots and bars are added in data coordinates."""

    def __init__(self, x: Span = (0, 1), y: Span = (0, 1), width: int = 340, height: int = 326, pad: int = 44) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right, self.top, self.bottom = pad, width - pad / 4, pad / 2.5, height - pad / 1.2
        self.parts: list[str] = []

    def axes(self, label: str, integer: bool = False) -> None:
        """Ticks and grid; `label` names the horizontal axis, `integer` keeps its ticks whole."""
        for tick in self._ticks(*self.x, integer):
            self._text(self._px(tick), self.bottom + 15, f"{tick:g}")
        for tick in self._ticks(*self.y):
            self._text(self.left - 6, self._py(tick) + 4, f"{tick:g}", "end")
            self.rule((self.x[0], tick), (self.x[1], tick), "grid")
        self._text((self.left + self.right) / 2, self.bottom + 32, label)

    @staticmethod
    def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
        slack = 1e-9 * (high - low)
        return [t for t in np.round(ticks, 12) if low - slack <= t <= high + slack and not (integer and t % 1)]

    def _px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def _py(self, y: float) -> float:
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def _text(self, left: float, top: float, text: str, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def rule(self, start: Span, end: Span, css: str) -> None:
        (x1, y1), (x2, y2) = ((self._px(x), self._py(y)) for x, y in (start, end))
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>')

    def line(self, points: Iterable[Span], css: str) -> None:
        path = " ".join(f"{self._px(x):.1f},{self._py(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{css}"/>')

    def dot(self, x: float, y: float, css: str) -> None:
        self.parts.append(f'<circle cx="{self._px(x):.1f}" cy="{self._py(y):.1f}" r="3" class="{css}"/>')

    def bar(self, x: Span, y: float, css: str) -> None:
        """A bar that stands on the axis, behind all else."""
        left, right, top = self._px(x[0]) + 0.5, self._px(x[1]) - 0.5, self._py(y)
        size = f'width="{right - left:.1f}" height="{self.bottom - top:.1f}"'
        self.parts.insert(0, f'<rect x="{left:.1f}" y="{top:.1f}" {size} class="{css}"/>')

    def mark(self, x: float, text: str) -> None:
        self.rule((x, self.y[0]), (x, self.y[1]), "mark")
        side = (x - self.x[0]) / (self.x[1] - self.x[0])
        self._text(self._px(x), self.top - 6, text, "end" if side > 0.8 else "start" if side < 0.2 else "middle")

    def figure(self, title: str, about: str, legend: Iterable[tuple[str, str]] = ()) -> str:
        """The chart with its title, a description for those who cannot see it, and a legend of (css, text)."""
        box = f'viewBox="0 0 {self.width} {self.height}"'
        svg = f'<svg {box} role="img"><title>{escape(about)}</title>{"".join(self.parts)}</svg>'
        items = "".join(f'<li class="{css}">{escape(text)}</li>' for css, text in legend)
        key = f'<ul class="legend">{items}</ul>' if items else ""
        return f"<figure><h4>{escape(title)}</h4>{svg}{key}</figure>"
