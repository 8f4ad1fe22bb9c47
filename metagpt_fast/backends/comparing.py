"""The reference backend with its results compared with what a merge has written, instead of written."""

from __future__ import annotations

import bisect
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import reference
from .._native import operand_errors_of
from ..dtypes import DType
from .reference import ReferenceBackend, read_bytes
from .tables import Backend, LayerElection, LayerTable, MaskTable, OutputTable, Written

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

SKIPPED = -2
"""In ``files`` of an output table: this result is not compared."""

# |kernel − reference| of a Gram matrix, relative to √(G_ii G_jj): docs/numerics.md derives 1.58e-5.
_GRAM_TOLERANCE = 1.6e-5
_Table = TypeVar("_Table", LayerTable, OutputTable, MaskTable, LayerElection)


@dataclass(frozen=True)
class Difference:
    """Elements of one tensor, or of a piece of it, that are not what the reference computes.

    Attributes:
        file: descriptor of the output's file.
        address: offset of the first of them in that file, in bytes.
        count: how many they are.
        num_bits: how many of their bits differ.
        stored: the first one's value in the file.
        expected: what it should be.
        itemsize: bytes per element; 1 where bytes were compared.
    """

    file: int
    address: int
    count: int
    num_bits: int
    stored: float
    expected: float
    itemsize: int


class ComparingBackend(ReferenceBackend):
    """Computes every result with the reference, and compares it with the bytes at its place.

    Coefficients and thresholds come from ``measuring``, which has to be the backend that the merge used: the last bits
    of a coefficient depend on it. The reference checks them within the tolerance of docs/numerics.md.

    Args:
        measuring: what measures.
        num_threads: tensors that are compared at a time.

    Attributes:
        differences: what was found, in no particular order.
        worst_gram_error: the largest deviation of a Gram matrix from the reference's, in units of the tolerance; above
            1 the kernels and the reference disagree.
        numel: elements that were compared.
    """

    name = "comparing"

    def __init__(self, measuring: Backend, num_threads: int) -> None:
        self._measuring = measuring
        self._num_threads = num_threads
        self.differences: list[Difference] = []
        self.worst_gram_error = 0.0
        self.numel = 0

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """Measure, and check the result against the reference's."""
        before = gram.copy()
        self._measuring.layer_gram(layer, gram)
        expected = np.zeros_like(gram)
        self._each(
            range(layer.num_tensors),
            lambda k: super(ComparingBackend, self).layer_gram(layer.take([k]), expected[k : k + 1]),
        )
        self._check_gram(gram - before, expected)

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        measured = self._measuring.column_gram(layer, columns, gram)
        if gram is None:
            for each, expected in zip(measured, super().column_gram(layer, columns), strict=True):
                self._check_gram(each, expected)
        return measured

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._measuring.layer_row_divergence(layer, columns)

    def layer_threshold(self, *arguments: Any) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._measuring.layer_threshold(*arguments)

    def layer_count_nonzero(self, *arguments: Any) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._measuring.layer_count_nonzero(*arguments)

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._measuring.layer_moments(layer, masks)

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """Compare the merged tensors; returns zeros."""
        merge = super().layer_merge
        return self._compared(layer, out, lambda k: merge(layer.take([k]), coefficients[k : k + 1], out.take([k])))

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """Compare the merged tensors; returns zeros."""
        merge = super().column_merge
        return self._compared(
            layer, out, lambda k: merge(layer.take([k]), columns[k : k + 1], [coefficients[k]], out.take([k]))
        )

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """Compare the merged tensors; returns zeros."""
        elect = super().layer_elect
        return self._compared(
            layer, out, lambda k: elect(layer.take([k]), _take(masks, k), _take(election, k), out.take([k]))
        )

    def compare(self, file: int, address: int, expected: reference.Raw, dtype: DType | None) -> None:
        """Compare bytes of the output with what they should be; as bytes, where ``dtype`` is None."""
        itemsize = 1 if dtype is None else dtype.itemsize
        self.numel += expected.size // itemsize
        stored = read_bytes(address, file, expected.nbytes)
        if np.array_equal(stored, expected):
            return
        pairs = [raw.reshape(-1, itemsize) for raw in (stored, expected)]
        differing = np.flatnonzero((pairs[0] != pairs[1]).any(axis=1))
        values = [_values(pair[differing].reshape(-1), dtype) for pair in pairs]
        is_real = ~(np.isnan(values[0]) & np.isnan(values[1]))  # which payload a NaN has is not specified
        differing = differing[is_real]
        if differing.size:
            bits = np.unpackbits(pairs[0][differing] ^ pairs[1][differing]).sum()
            first = address + int(differing[0]) * itemsize
            stored_value, expected_value = (float(each[is_real][0]) for each in values)
            self.differences.append(
                Difference(file, first, int(differing.size), int(bits), stored_value, expected_value, itemsize)
            )

    def _put(self, written: Written, k: int, out: OutputTable, raw: reference.Raw, dtype: DType) -> None:
        self.compare(int(out.files[k]), int(out.addresses[k]), raw, dtype)

    def _compared(self, layer: LayerTable, out: OutputTable, compare: Callable[[int], object]) -> Written:
        self._each(np.flatnonzero(out.files != SKIPPED).tolist(), compare)
        return Written.zeros(layer.num_tensors)

    def _each(self, tensors: Sequence[int], call: Callable[[int], object]) -> None:
        def call_one(k: int) -> None:
            with operand_errors_of([k]):
                call(k)

        with ThreadPoolExecutor(self._num_threads) as pool:
            list(pool.map(call_one, tensors))

    def _check_gram(self, measured: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
        norms = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
        scale = _GRAM_TOLERANCE * norms[:, :, None] * norms[:, None, :]
        error = np.abs(measured - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(error > 0, error / scale, 0.0)
        if ratios.size:
            self.worst_gram_error = max(self.worst_gram_error, float(ratios.max()))


class Places:
    """Finds the tensor that a place in the output belongs to.

    Args:
        places: per tensor the descriptor of its file and where its data begins.
    """

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        self._begins: dict[int, list[tuple[int, str]]] = {}
        for name, (file, begin) in places.items():
            self._begins.setdefault(file, []).append((begin, name))
        for begins in self._begins.values():
            begins.sort()

    def tensor_at(self, file: int, address: int) -> tuple[str, int]:
        """Return the tensor's name, and the byte within its data."""
        begins = self._begins[file]
        begin, name = begins[bisect.bisect_right(begins, address, key=lambda each: each[0]) - 1]
        return name, address - begin


def _values(raw: reference.Raw, dtype: DType | None) -> NDArray[np.float64]:
    return raw.astype(np.float64) if dtype is None else reference.to_float64(np.ascontiguousarray(raw), dtype)


def _take(table: _Table, k: int) -> _Table:
    """Return the table of one tensor."""
    columns = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    chosen: dict[str, Any] = {name: each[k : k + 1] for name, each in columns.items() if isinstance(each, np.ndarray)}
    return dataclasses.replace(table, **chosen)
