"""The page, section by section: what a reader wants to know first stands first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..methods.metagpt import share_of_squares
from ..model_card import equation, model_id, without_paths
from ..quantities import format_count
from ..trust import DISTANT_RATIO, DOMINANT_SHARE, NOTABLE_COSINE
from .charts import (
    Format,
    Row,
    SizeScale,
    bar_rows,
    cell_rows,
    column_name,
    cosine_class,
    cosine_legend,
    cosine_matrix,
    scrolling,
    size_class,
    size_legend,
)
from .elements import Content, Element, document, element, name_of, shortened
from .numbers import PageNumbers, page_numbers, relative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..measurement import Measurement
    from ..report import MergeReport

    FloatArray = NDArray[np.float64]

# What a page lists at most; the rest is counted.
_MAX_TENSORS = 40
_MAX_UNCHANGED = 200
_MAX_PAIRS = 12
_MAX_REMARKS = 5
_MAX_TEXT_LENGTH = 1000
_MAX_OPEN_MAPS = 3
# A title for each cell of a page with more cells than this would make it several MB.
_MAX_TITLES = 20_000


def measurement_page(measurement: Measurement, report: MergeReport | None = None) -> str:
    """Return a measurement as one HTML page that needs nothing else: no script, no font, no network.

    Args:
        measurement: what to show.
        report: the merge that the measurement was made or used for, if there was one: its coefficients are shown too.
    """
    numbers = page_numbers(measurement)
    num_models = len(measurement.labels)
    title = f"{num_models} fine-tuned {'model' if num_models == 1 else 'models'} of {_base_name(measurement)}"
    sections = [
        _head(measurement, title),
        _warnings(measurement, numbers, report),
        _models(measurement, numbers, report),
        _cosines(measurement),
        *_by_layer(measurement, numbers),
        *_by_module(measurement, numbers),
        *_outside(measurement, numbers),
        _unchanged(measurement, numbers),
        _foot(),
    ]
    return document(title, *(section for section in sections if section is not None))


def _head(measurement: Measurement, title: str) -> Element:
    numel = int(measurement.numels.sum())
    return element(
        "header",
        element("h1", title),
        element(
            "p",
            f"{len(measurement.names):,} tensors, {format_count(numel)} parameters. The task vector of a model is what "
            "fine-tuning changed: τ = θ − θ₀, the model minus the base.",
        ),
    )


def _warnings(measurement: Measurement, numbers: PageNumbers, report: MergeReport | None) -> Element:
    warnings = list(measurement.warnings())
    if report is not None:
        warnings = [without_paths(text, report) for text in report.warnings]
    items = [element("li", _cut(text), class_="warning") for text in warnings]
    if not items:
        items.append(
            element(
                "li",
                f"Nothing to warn of: no task vector is zero or as long as {DISTANT_RATIO:.0%} of the base"
                + (
                    f", no pair has a cosine beyond ±{NOTABLE_COSINE}, and no model takes more than "
                    f"{DOMINANT_SHARE:.0%} of the weight."
                    if len(measurement.labels) > 1
                    else "."
                ),
                class_="fine",
            )
        )
    items += [element("li", text) for text in _remarks(measurement, numbers)]
    return _section("Before you merge" if report is None else "What to look at", element("ul", *items, class_="notes"))


def _remarks(measurement: Measurement, numbers: PageNumbers) -> list[str]:
    """What the sums over the whole model do not show."""
    remarks = []
    labels = [shortened(label) for label in measurement.labels]
    num_tensors = int((measurement.numels > 0).sum())
    for label, num_changed in zip(labels, numbers.num_changed, strict=True):
        if 0 < num_changed < num_tensors:
            remarks.append(f"{label} changed {num_changed:,} of {num_tensors:,} tensors; the others equal the base's.")
    return _at_most(remarks) + _at_most(_remarks_on_cosines(measurement, numbers, labels))


def _remarks_on_cosines(measurement: Measurement, numbers: PageNumbers, labels: Sequence[str]) -> list[str]:
    total = measurement.cosines
    by_layer = np.nan_to_num(numbers.column_cosines)
    found = []
    for i, j in _pairs(len(labels)) if len(by_layer) else []:
        worst = int(np.abs(by_layer[:, i, j]).argmax())
        cosine = float(by_layer[worst, i, j])
        if abs(cosine) > NOTABLE_COSINE >= abs(total[i, j]):
            text = (
                f"{labels[i]} and {labels[j]} have a cosine of {cosine:.2f} in {column_name(numbers.columns[worst])}, "
                f"though of {total[i, j]:.2f} over the whole model."
            )
            found.append((-abs(cosine), text))
    return [text for _, text in sorted(found)]


def _at_most(remarks: list[str]) -> list[str]:
    if len(remarks) <= _MAX_REMARKS:
        return remarks
    return [*remarks[:_MAX_REMARKS], f"{len(remarks) - _MAX_REMARKS:,} more of this kind."]


def _models(measurement: Measurement, numbers: PageNumbers, report: MergeReport | None) -> Element:
    head = ["", "model", "λ of MetaGPT", "share", "‖τ‖", "‖τ‖ / ‖θ₀‖", "tensors changed"]
    if report is not None:
        head.insert(4, "λ in this merge")
        # A plan may have put the base among the models; a page is only made where it has not.
        used = report.coefficients.mean(axis=0)
    coefficients, norms = measurement.coefficients(), measurement.norms
    rows = []
    for t, label in enumerate(measurement.labels):
        share = float(coefficients[t])
        fill = element("span", style=f"width:{100 * share:.2f}%")
        cells: list[Content] = [
            element("td", str(t + 1), class_="index"),
            element("th", name_of(label), scope="row"),
            _number(f"{share:.4f}"),
            element("td", element("span", fill, class_="share"), f" {100 * share:.1f} %", class_="bar"),
            _number(f"{norms[t]:#.4g}"),
            _number(_percent(norms[t] / measurement.base_norm if measurement.base_norm else math.nan)),
            _number(f"{numbers.num_changed[t]:,} of {len(measurement.names):,}"),
        ]
        if report is not None:
            cells.insert(4, _number(f"{used[t]:.4f}"))
        rows.append(element("tr", *cells))
    text = [
        element(
            "p",
            "MetaGPT weights a model by its share of the squared norms, λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖²: a model that moved "
            "ten times as far gets a hundred times the weight.",
        )
    ]
    if report is not None:
        which = "" if len(report.scopes) == 1 else f", the mean over {len(report.scopes):,} scopes"
        facts = f"This merge: {report.method}, granularity {report.granularity}; {equation(report)}{which}."
        text.append(element("p", facts))
    return _section("Models", *text, _table(head, rows, left=("", "model", "share")))


def _cosines(measurement: Measurement) -> Element | None:
    if len(measurement.labels) < 2:
        return None
    return _section(
        "Cosines between the task vectors",
        element(
            "p",
            "Near 0, the models changed different things, which is what MetaGPT’s bound assumes. Near 1, they learnt "
            "the same, and it counts twice. Below 0, they undo each other.",
        ),
        cosine_matrix([name_of(label) for label in measurement.labels], measurement.cosines.tolist()),
        cosine_legend(),
    )


def _by_layer(measurement: Measurement, numbers: PageNumbers) -> list[Element | None]:
    if not numbers.columns:
        return []
    squares = np.diagonal(numbers.column_gram, axis1=1, axis2=2)[:, 1:]
    norms = np.sqrt(squares)
    shares = np.array([share_of_squares(row, 2.0) for row in squares])
    norm_rows, share_rows = [], []
    for t, label in enumerate(measurement.labels):
        norm_rows.append(Row(_numbered(t, label), norms[:, t].tolist(), _range(norms[:, t], _norm)))
        share_rows.append(Row(_numbered(t, label), shares[:, t].tolist(), _range(shares[:, t], _lambda)))
    sections: list[Element | None] = [
        _section(
            "Norms by layer",
            element("p", f"‖τ‖ of each layer’s tensors, on one scale for all models: up to {_norm(norms.max())}."),
            bar_rows(norm_rows, numbers.columns, float(norms.max()), text=_norm),
        )
    ]
    if len(measurement.labels) > 1:
        sections.append(
            _section(
                "Share of λ by layer",
                element(
                    "p", f"What each layer’s own norms would give (--granularity layer): up to {shares.max():.2f}."
                ),
                bar_rows(share_rows, numbers.columns, float(shares.max()), text=_lambda),
            )
        )
        sections.append(_cosines_by_layer(measurement, numbers))
    return sections


def _cosines_by_layer(measurement: Measurement, numbers: PageNumbers) -> Element:
    by_layer = numbers.column_cosines
    largest = np.abs(np.nan_to_num(by_layer)).max(axis=0)
    pairs = sorted(_pairs(len(measurement.labels)), key=lambda pair: -largest[pair])
    titles = len(pairs) * len(numbers.columns) <= _MAX_TITLES
    rows = []
    for i, j in pairs:
        label = element("span", _numbered(i, measurement.labels[i]), " · ", _numbered(j, measurement.labels[j]))
        values = by_layer[:, i, j]
        rows.append(Row(label, values.tolist(), _range(values, _cosine)))
    chart = [cell_rows(rows[:_MAX_PAIRS], numbers.columns, cosine_class, text=_cosine, titles=titles)]
    if len(rows) > _MAX_PAIRS:
        others = cell_rows(rows[_MAX_PAIRS:], numbers.columns, cosine_class, text=_cosine, titles=titles)
        chart.append(_details(f"the other {len(rows) - _MAX_PAIRS} pairs", others, is_open=False))
    order = "Pairs with the largest cosines first. " if len(rows) > 1 else ""
    text = f"{order}Each cell is a layer."
    return _section("Cosines by layer", element("p", text), *chart, cosine_legend())


def _by_module(measurement: Measurement, numbers: PageNumbers) -> list[Element | None]:
    if not numbers.columns:
        return []
    cells = relative(numbers.cell_squares)
    totals = relative(numbers.module_squares)
    scale = SizeScale.of(cells.ravel().tolist())
    titles = cells.size <= _MAX_TITLES
    maps: list[Element] = []
    for t, label in enumerate(measurement.labels):
        rows = [
            Row(name_of(module), cells[m, :, t].tolist(), _percent(float(totals[m, t])))
            for m, module in enumerate(numbers.modules)
        ]
        chart = cell_rows(rows, numbers.columns, size_class(scale), text=_percent, titles=titles)
        maps.append(_details(_numbered(t, label), chart, is_open=t < _MAX_OPEN_MAPS))
    legend = None if scale is None else size_legend(scale, _percent)
    text = "‖τ‖ / ‖θ₀‖ of each kind of tensor in each layer, and at the right over all layers."
    return [_section("Change by module and layer", element("p", text), legend, *maps)]


def _outside(measurement: Measurement, numbers: PageNumbers) -> list[Element | None]:
    if not numbers.outside:
        return []
    squares = np.diagonal(measurement.gram, axis1=1, axis2=2)
    rows = sorted(numbers.outside, key=lambda row: -int(measurement.numels[row]))[:_MAX_TENSORS]
    ratios = relative(squares[rows])
    scale = SizeScale.of(ratios.ravel().tolist())
    class_of = size_class(scale)
    lines = []
    for row, values in zip(rows, ratios, strict=True):
        cells = [element("td", _percent(v), class_=f"tint {class_of(v)}" if math.isfinite(v) else "") for v in values]
        numel = _number(format_count(int(measurement.numels[row])))
        lines.append(element("tr", element("th", name_of(measurement.names[row]), scope="row"), numel, *cells))
    head = ["tensor", "parameters", *(f"{t} {shortened(label)}" for t, label in enumerate(measurement.labels, start=1))]
    if len(measurement.labels) > 4:
        head[2:] = [str(t) for t in range(1, len(measurement.labels) + 1)]
    num_hidden = len(numbers.outside) - len(rows)
    more = element("p", f"The {num_hidden:,} smallest are left out.") if num_hidden else None
    text = "‖τ‖ / ‖θ₀‖ of embeddings, final norm, head, and whatever else has no layer’s number in its name."
    table = _table(head, lines, left=("tensor",))
    return [_section("Tensors outside of the layers", element("p", text), table, more)]


def _unchanged(measurement: Measurement, numbers: PageNumbers) -> Element:
    names = numbers.unchanged
    heading = "Tensors that no model changed"
    if not names:
        return _section(heading, element("p", "None: every tensor was changed by at least one model."))
    items = [element("li", name_of(name)) for name in names[:_MAX_UNCHANGED]]
    if len(names) > _MAX_UNCHANGED:
        items.append(element("li", f"… and {len(names) - _MAX_UNCHANGED:,} more"))
    count = f"{len(names):,} of {len(measurement.names):,} tensors. A merge copies them from the base."
    listing = _details("their names", element("ul", *items, class_="names"), is_open=len(names) <= 12)
    return _section(heading, element("p", count), listing)


def _foot() -> Element:
    text = (
        "Made by metagpt-fast. Norms and cosines describe weights; whether a merge is any good, only evaluation tells."
    )
    return element("footer", element("p", text))


def _section(heading: str, *content: Element | None) -> Element:
    return element("section", element("h2", heading), *content)


def _details(summary: Content, content: Element, *, is_open: bool) -> Element:
    opened = {"open": ""} if is_open else {}
    return element("details", element("summary", summary), content, **opened)


def _table(head: Sequence[str], rows: Sequence[Element], *, left: tuple[str, ...]) -> Element:
    cells = [element("th", text, scope="col", class_="" if text in left else "number") for text in head]
    return scrolling(element("table", element("thead", element("tr", *cells)), element("tbody", *rows)))


def _number(text: str) -> Element:
    return element("td", text, class_="number")


def _numbered(t: int, label: str) -> Element:
    return element("span", element("span", str(t + 1), class_="index"), " ", name_of(label))


def _cut(text: str) -> str:
    """A warning may quote names of any length."""
    return text if len(text) <= _MAX_TEXT_LENGTH else f"{text[:_MAX_TEXT_LENGTH]} …"


def _base_name(measurement: Measurement) -> str:
    return shortened(model_id(measurement.base))


def _pairs(num_models: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(num_models) for j in range(i + 1, num_models)]


def _range(values: FloatArray, text: Format) -> str:
    if np.isnan(values).all():
        return "–"
    low, high = text(float(np.nanmin(values))), text(float(np.nanmax(values)))
    return low if low == high else f"{low} to {high}"


def _norm(value: float) -> str:
    return f"{value:#.3g}" if value > 0 else "0"


def _lambda(value: float) -> str:
    return f"{value:.3f}"


def _cosine(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    """A ratio in percent with three digits; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:#.3g} %".replace(". ", " ") if value > 0 else "0 %"
