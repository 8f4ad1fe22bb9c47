"""Charts of the page: rows of bars or of coloured cells over the layers, and a matrix of cosines.

A row is one SVG as wide as its column of the table, so that every number of layers fits, and labels are plain HTML.
Colours are classes, which the style sheet gives for light and dark: ``s0`` to ``s9`` for sizes, ``n5`` to ``p5`` for
cosines from −1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .elements import Element, element, shortened
from .numbers import Column

NUM_STEPS = 10
# Upper ends of the steps of |cosine|; beyond 0.3 (trust.NOTABLE_COSINE) the colours are strong.
COSINE_STEPS = (0.05, 0.1, 0.2, 0.3, 0.6)
_TICK_STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500)
_MAX_TICKS = 13
_BAR_GAP = 0.12

Format = Callable[[float], str]


@dataclass(frozen=True)
class Row:
    """A row of a chart: its label, a value per column (NaN: there is none), and what is written at its end."""

    label: Element
    values: Sequence[float]
    summary: str


@dataclass(frozen=True)
class SizeScale:
    """Sizes to ten colours, in equal ratios from ``low`` to ``high``."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> SizeScale | None:
        """Return the scale for these values, over a factor of 10 to 1000; None if none is above 0."""
        positive = [value for value in values if math.isfinite(value) and value > 0]
        if not positive:
            return None
        high = max(positive)
        return cls(min(max(min(positive), high / 1000), high / 10), high)

    def step(self, value: float) -> int:
        """Return the colour of a positive value, 0 to 9."""
        position = math.log(value / self.low) / math.log(self.high / self.low) if value > self.low else 0.0
        return min(int(position * NUM_STEPS), NUM_STEPS - 1)


def bar_rows(rows: Sequence[Row], columns: Sequence[Column], highest: float, *, text: Format) -> Element:
    """Return rows of bars from 0 to ``highest``, a bar per column."""
    return _rows(rows, columns, "bars", lambda row: _bars(row.values, columns, highest, text))


def cell_rows(
    rows: Sequence[Row], columns: Sequence[Column], class_of: Callable[[float], str], *, text: Format, titles: bool
) -> Element:
    """Return rows of coloured cells, a cell per column; ``titles`` names each where the pointer rests."""
    return _rows(rows, columns, "cells", lambda row: _cells(row.values, columns, class_of, text if titles else None))


def size_class(scale: SizeScale | None) -> Callable[[float], str]:
    """Return what gives a size its class; ``zero`` where nothing changed."""
    return lambda value: "zero" if scale is None or value <= 0 else f"s{scale.step(value)}"


def size_legend(scale: SizeScale, text: Format) -> Element:
    """Return the colours of the sizes, with their ends in words."""
    swatches = [element("i", class_=f"s{step}") for step in range(NUM_STEPS)]
    zero = (element("i", class_="zero"), " unchanged")
    return element("p", text(scale.low), " ", *swatches, f" {text(scale.high)}", " · ", *zero, class_="legend")


def cosine_class(value: float) -> str:
    """Return the class of a cosine: ``d0`` near 0, ``p1`` to ``p5`` above, ``n1`` to ``n5`` below."""
    step = sum(abs(value) >= bound for bound in COSINE_STEPS)
    return f"{'d' if step == 0 else 'p' if value > 0 else 'n'}{step}"


def cosine_legend() -> Element:
    """Return the colours of the cosines, with their bounds."""
    items: list[Element | str] = [element("i", class_="d0"), f" below {COSINE_STEPS[0]:g}"]
    for step, bound in enumerate(COSINE_STEPS, start=1):
        items += [" · ", element("i", class_=f"p{step}"), element("i", class_=f"n{step}"), f" from ±{bound:g}"]
    return element("p", *items, class_="legend")


def cosine_matrix(labels: Sequence[Element], cosines: Sequence[Sequence[float]]) -> Element:
    """Return the cosines between T task vectors as a table, the lower triangle; columns are numbered."""
    is_large = len(labels) > 8
    numbers = range(1, len(labels) + 1)
    head = element("tr", element("th"), element("th"), *(element("th", str(t), scope="col") for t in numbers))
    body = []
    columns = range(len(labels))
    for t, label in enumerate(labels):
        cells = [
            _cosine_cell(cosines[t][k], k == t, 2 if is_large else 3) if k <= t else element("td") for k in columns
        ]
        body.append(element("tr", element("td", str(t + 1), class_="index"), element("th", label, scope="row"), *cells))
    kind = "matrix many" if is_large else "matrix"
    return scrolling(element("table", element("thead", head), element("tbody", *body), class_=kind))


def column_name(column: Column) -> str:
    """Return the name of a layer: ``model.layers.12``."""
    return f"{shortened(column.stack) if column.stack else 'layer '}{column.label}"


def scrolling(content: Element) -> Element:
    """Return ``content`` in a box that scrolls sideways where the window is narrow."""
    return element("div", content, class_="scroll")


def _cosine_cell(value: float, is_self: bool, digits: int) -> Element:
    return element("td", f"{value:.{digits}f}", class_="self" if is_self else cosine_class(value))


def _rows(rows: Sequence[Row], columns: Sequence[Column], kind: str, marks: Callable[[Row], list[Element]]) -> Element:
    lines = []
    for row in rows:
        plot = element(
            "svg",
            *marks(row),
            viewBox=f"0 0 {len(columns)} 1",
            preserveAspectRatio="none",
            role="img",
            aria_label=f"over {len(columns)} layers: {row.summary}",
            class_=kind,
        )
        lines.append(
            element(
                "tr",
                element("th", row.label, scope="row"),
                element("td", plot, class_="plot"),
                element("td", row.summary, class_="number"),
            )
        )
    axis = element("tr", element("th"), element("td", _axis(columns), class_="plot"), element("td"))
    return scrolling(element("table", element("tbody", *lines, axis), class_="rows"))


def _bars(values: Sequence[float], columns: Sequence[Column], highest: float, text: Format) -> list[Element]:
    marks = []
    gap = _BAR_GAP if len(columns) <= 100 else 0
    for x, (value, column) in enumerate(zip(values, columns, strict=True)):
        height = value / highest if highest > 0 and math.isfinite(value) else 0.0
        # The title belongs to all of the column, so that a short bar can be pointed at.
        marks.append(
            element(
                "g",
                element("title", f"{column_name(column)}: {text(value)}"),
                element("rect", x=x, y=0, width=1, height=1, class_="ground"),
                element(
                    "rect", x=f"{x + gap:g}", y=f"{1 - height:.4f}", width=f"{1 - 2 * gap:g}", height=f"{height:.4f}"
                ),
            )
        )
    return marks


def _cells(
    values: Sequence[float], columns: Sequence[Column], class_of: Callable[[float], str], text: Format | None
) -> list[Element]:
    marks = []
    for x, (value, column) in enumerate(zip(values, columns, strict=True)):
        if math.isfinite(value):
            title = None if text is None else element("title", f"{column_name(column)}: {text(value)}")
            marks.append(element("rect", title, x=x, width=1, height=1, class_=class_of(value)))
    return marks


def _axis(columns: Sequence[Column]) -> Element:
    """The layers' numbers below a chart; where there are several stacks, the name of each at its first layer."""
    starts = [i for i, column in enumerate(columns) if i == 0 or column.stack != columns[i - 1].stack]
    if len(starts) > 1:
        ticks = [(i, f"{shortened(columns[i].stack)}{columns[i].first}") for i in starts]
        apart = len(columns) / 6
    else:
        step = next((step for step in _TICK_STEPS if len(columns) / step <= _MAX_TICKS), _TICK_STEPS[-1])
        ticks = [(i, str(column.first)) for i, column in enumerate(columns) if i % step == 0]
        apart = 0
    shown: list[Element] = []
    last = -math.inf
    for i, label in ticks:
        if i - last >= apart:
            centre = 100 * (i + 0.5) / len(columns)
            shown.append(element("span", label, style=f"left:{centre:.2f}%"))
            last = i
    return element("div", *shown, class_="axis several" if len(starts) > 1 else "axis")
