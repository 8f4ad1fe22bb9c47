"""From Gram matrices to what the page shows: sums by layer, by module, and by both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..layer_names import split_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..measurement import Measurement

    FloatArray = NDArray[np.float64]

# More columns than this are narrower than a pixel: neighbouring layers share one then.
MAX_COLUMNS = 400
MAX_MODULES = 24


@dataclass(frozen=True)
class Column:
    """A layer, or several neighbouring ones: the stack's name (``model.layers.``), and the first and last number."""

    stack: str
    first: int
    last: int

    @property
    def label(self) -> str:
        """Return the layers' numbers: ``12``, or ``12–15``."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


@dataclass(frozen=True)
class PageNumbers:
    """What the page shows; V = 1 + T: the base's θ₀ and the T task vectors.

    Attributes:
        columns: the layers, C of them.
        modules: kinds of tensors within layers (``self_attn.q_proj``), M of them.
        column_gram: Gram matrices by layer, float64 ``[C, V, V]``.
        cell_squares: ‖θ₀‖² and ‖τ_t‖² by module and layer, float64 ``[M, C, V]``; NaN where a layer has no such module.
        outside: rows of the measurement that are in no layer (embeddings, final norm, ``lm_head``).
        unchanged: names of the tensors that no model changed; empty tensors are not among them.
        num_changed: how many tensors each model changed, int64 ``[T]``.
    """

    columns: tuple[Column, ...]
    modules: tuple[str, ...]
    column_gram: FloatArray
    cell_squares: FloatArray
    outside: tuple[int, ...]
    unchanged: tuple[str, ...]
    num_changed: NDArray[np.int64]

    @property
    def module_squares(self) -> FloatArray:
        """Return ‖θ₀‖² and ‖τ_t‖² by module, over all layers, float64 ``[M, V]``."""
        squares: FloatArray = np.nansum(self.cell_squares, axis=1)
        return squares

    @property
    def column_cosines(self) -> FloatArray:
        """Return the cosines between task vectors by layer, float64 ``[C, T, T]``; NaN where one of them is zero."""
        norms = np.sqrt(np.diagonal(self.column_gram, axis1=1, axis2=2)[:, 1:])
        products = norms[:, :, None] * norms[:, None, :]
        cosines = np.full_like(products, np.nan)
        np.divide(self.column_gram[:, 1:, 1:], products, out=cosines, where=products > 0)
        clipped: FloatArray = np.clip(cosines, -1.0, 1.0)
        return clipped


def page_numbers(measurement: Measurement) -> PageNumbers:
    """Return the sums that the page of a measurement shows."""
    squares = np.diagonal(measurement.gram, axis1=1, axis2=2)
    columns, column_of = _columns(measurement.names)
    modules, module_of = _modules(measurement)
    num_vectors = squares.shape[1]
    column_gram = np.zeros((len(columns), num_vectors, num_vectors))
    cells = np.full((len(modules), len(columns), num_vectors), np.nan)
    for row, column in column_of.items():
        cell = cells[module_of[row], column]
        cell[:] = np.where(np.isnan(cell), 0, cell) + squares[row]
        column_gram[column] += measurement.gram[row]
    is_changed = squares[:, 1:] > 0
    is_unchanged = ~is_changed.any(axis=1) & (measurement.numels > 0)
    return PageNumbers(
        columns=columns,
        modules=modules,
        column_gram=column_gram,
        cell_squares=cells,
        outside=tuple(row for row in range(len(squares)) if row not in column_of and measurement.numels[row] > 0),
        unchanged=tuple(name for name, same in zip(measurement.names, is_unchanged, strict=True) if same),
        num_changed=is_changed.sum(axis=0),
    )


def relative(squares: FloatArray) -> FloatArray:
    """Return ‖τ_t‖ / ‖θ₀‖, float64 ``[..., T]``, from squares ``[..., V]``; NaN where ‖θ₀‖ is 0."""
    base = squares[..., :1]
    ratios = np.divide(squares[..., 1:], base, out=np.full_like(squares[..., 1:], np.nan), where=base > 0)
    result: FloatArray = np.sqrt(ratios)
    return result


def _columns(names: tuple[str, ...]) -> tuple[tuple[Column, ...], dict[int, int]]:
    """The layers in order, and the column of each tensor that is in one."""
    split = {row: parts for row, name in enumerate(names) if (parts := split_name(name)) is not None}
    stacks = {stack: i for i, stack in enumerate(dict.fromkeys(parts.stack for parts in split.values()))}
    layers = sorted({(stacks[parts.stack], parts.layer, parts.stack) for parts in split.values()})
    width = max(1, -(-len(layers) // MAX_COLUMNS))
    groups = [layers[start : start + width] for start in range(0, len(layers), width)]
    columns = tuple(Column(group[0][2], group[0][1], group[-1][1]) for group in groups)
    position = {(stack, layer): i for i, group in enumerate(groups) for _, layer, stack in group}
    return columns, {row: position[parts.stack, parts.layer] for row, parts in split.items()}


def _modules(measurement: Measurement) -> tuple[tuple[str, ...], dict[int, int]]:
    """The kinds of tensors within layers, and that of each tensor; the smallest kinds share one if there are many."""
    kinds: dict[int, str] = {}
    numels: dict[str, int] = {}
    for row, name in enumerate(measurement.names):
        parts = split_name(name)
        if parts is not None:
            # Experts of a mixture are one kind: mlp.experts.*.up_proj.
            words = ["*" if word.isdigit() else word for word in parts.rest.lstrip(".").split(".")]
            kind = ".".join(words).removesuffix(".weight") or "(itself)"
            kinds[row] = kind
            numels[kind] = numels.get(kind, 0) + int(measurement.numels[row])
    shown = list(numels)
    if len(shown) > MAX_MODULES:
        largest = set(sorted(shown, key=lambda kind: -numels[kind])[: MAX_MODULES - 1])
        shown = [kind for kind in shown if kind in largest] + [f"{len(numels) - len(largest)} other modules"]
    index = {kind: i for i, kind in enumerate(shown)}
    return tuple(shown), {row: index.get(kind, len(shown) - 1) for row, kind in kinds.items()}
