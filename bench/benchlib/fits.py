"""Straight lines through measured points, with how far the points lie from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchlib.rows import Row

# What is swept: the parameter of a row that x is, and the unit in which x is told.
SWEEPS: dict[str, tuple[str, float, str]] = {
    "parameters": ("num_parameters", 1e9, "B parameters"),
    "models": ("num_models", 1, "models"),
    "tensors": ("num_tensors", 1000, "thousand tensors"),
    "shards": ("num_shards", 1, "shards"),
}


@dataclass(frozen=True)
class Line:
    """y = constant + slope · x, least squares of the relative deviations, so that small points count as large ones do.

    Attributes:
        slope: per unit of x.
        constant: at x = 0.
        residual: the largest |y - line| / y of the points.
    """

    slope: float
    constant: float
    residual: float

    def at(self, x: float) -> float:
        """Return the line's y."""
        return self.constant + self.slope * x

    def text(self, unit: str) -> str:
        """Return the line in words for a table or a picture; ``unit`` is that of y."""
        slope = 0.0 if abs(self.slope) < 1e-9 * abs(self.constant) else self.slope  # what rounding leaves
        sign = "+" if slope >= 0 else "−"
        percent = max(1, math.ceil(100 * self.residual))
        return f"{self.constant:.3g} {sign} {abs(slope):.3g}·x {unit}, within {percent} %"

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Return the line through points of at least two different x, each y > 0."""
        weights = [1 / y**2 for _, y in points]
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        square = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        product = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        slope = product / square
        constant = mean_y - slope * mean_x
        return cls(slope, constant, max(abs(y - constant - slope * x) / y for x, y in points))


@dataclass(frozen=True)
class Series:
    """One task of one sweep: its rows by x, and the lines through their metrics."""

    sweep: str
    task: str
    rows: tuple[Row, ...]

    def points(self, metric: str) -> list[tuple[float, float]]:
        """Return (x in units, median) of the rows that have the metric; ``cpu_seconds`` is user and system time."""
        name, unit, _ = SWEEPS[self.sweep]
        parts = ("user_seconds", "system_seconds") if metric == "cpu_seconds" else (metric,)
        return [
            (row.parameters[name] / unit, sum(row.metrics[part].median for part in parts))
            for row in self.rows
            if all(part in row.metrics for part in parts)
        ]

    def line(self, metric: str) -> Line | None:
        """Return the line through the metric's points; None with fewer than three."""
        points = self.points(metric)
        return Line.through(points) if len({x for x, _ in points}) >= 3 else None


def scale_series(rows: Sequence[Row]) -> list[Series]:
    """Return the series of the rows of suite ``scale``, in the order of ``SWEEPS`` and of the rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.suite == "scale" and row.parameters["sweep"] in SWEEPS:
            found.setdefault((row.parameters["sweep"], row.parameters["task"]), []).append(row)
    order = list(SWEEPS)
    return [Series(*key, tuple(found[key])) for key in sorted(found, key=lambda key: order.index(key[0]))]
