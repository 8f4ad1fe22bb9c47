"""layer_threshold through a device: pieces of a tensor add to counts, and the host finds the ranks in them.

Three passes over the tensor: how many keys have each value of their upper 16 bits; how many of those that share the
rank's have each value of the lower 15; how many in every span are above the key that is now known, and equal to it.
Counts are integers, so pieces may come in any size and order. The one span that has the element is then looked at on
the CPU, which selects it by its rank in the span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import _native
from ..errors import BackendError
from ..quantities import format_nbytes
from . import sparse_tables
from .cpu import CpuBackend
from .launch_tables import SPAN_NUMEL
from .slice_launches import prepare
from .slices import NUM_PARTS, Extras, cut_into_slices, reads_of
from .sparse_tables import EQUAL, LOWER_BINS, LOWER_BITS, LOWER_KEY_BITS, NONZERO, UPPER_BINS, UPPER_BITS
from .streaming import Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device_results import DeviceResults
    from .streamed_keys import DeviceKeys, KeyRule, KeyStream
    from .streaming import Pipeline
    from .tables import LayerTable

# The counts of a smaller tensor are more bytes than the tensor: the CPU selects from it.
_LEAST_COUNTED = SPAN_NUMEL
_NO_KEY = 0xFFFFFFFF


class ThresholdStream:
    """Finds elements by their ranks.

    Args:
        pipeline: what brings slices to the device; its scratch memory holds the counts.
        results: the way of counts to the device and back.
        keys: the way of what elements are ranked by.
    """

    def __init__(self, pipeline: Pipeline, results: DeviceResults, keys: KeyStream) -> None:
        self._pipeline = pipeline
        self._results = results
        self._keys = keys

    def threshold(
        self, layer: LayerTable, rule: KeyRule, ranks: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`.

        Raises:
            BackendError: the counts of one tensor do not fit the device memory.
            InputChangedError: passes met different values.
        """
        keys, indices = np.full(ranks.shape, _NO_KEY, np.uint32), np.full(ranks.shape, -1, np.int64)
        is_counted = layer.numels >= _LEAST_COUNTED
        small = np.flatnonzero(~is_counted)
        if small.size:
            with _native.operand_errors_of(small):
                keys[small], indices[small] = CpuBackend().layer_threshold(
                    layer.take(small), *rule.take(small).arguments, np.ascontiguousarray(ranks[small])
                )
        for members in self._groups(np.flatnonzero(is_counted), ranks.shape):
            with _native.operand_errors_of(members):
                keys[members], indices[members] = self._find(layer.take(members), rule.take(members), ranks[members])
        return keys, indices

    def count_nonzero(self, layer: LayerTable, rule: KeyRule, num_keys: int) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        above_zero = np.zeros((layer.num_tensors, num_keys, 1), np.uint32)
        counts = np.zeros((layer.num_tensors, num_keys, 2), np.int64)
        keys = self._keys.load(layer, rule)
        self._count(layer, keys, NONZERO, above_zero, counts, np.arange(layer.num_tensors))
        return np.ascontiguousarray(counts[..., 0])

    def _groups(self, members: NDArray[np.int64], shape: tuple[int, ...]) -> Iterator[NDArray[np.int64]]:
        """Yield runs of tensors whose counts fit the scratch memory."""
        nbytes = 8 * shape[1] * max(UPPER_BINS, shape[2] * LOWER_BINS)
        size = self._pipeline.scratch_nbytes // nbytes
        if members.size and size == 0:
            raise BackendError(
                "too little device memory to count the keys of a tensor",
                where="device_memory",
                got=f"{format_nbytes(self._pipeline.scratch_nbytes)} for counts",
                expected=format_nbytes(nbytes),
                hint=f"give --device-memory {-(-(nbytes + 256) * NUM_PARTS // 2**20)}MiB",
            )
        for start in range(0, members.size, max(size, 1)):
            yield members[start : start + size]

    def _find(
        self, layer: LayerTable, rule: KeyRule, ranks: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        num_tensors, num_keys, num_ranks = ranks.shape
        rows = np.arange(num_tensors)
        ranked_by = self._keys.load(layer, rule)
        keys = np.full(ranks.shape, _NO_KEY, np.uint32)
        # Of every element that is looked for: the bits of its key, its rank among those that share them.
        left = ranks.copy()
        upper = np.zeros((num_tensors, num_keys, UPPER_BINS), np.int64)
        self._count(layer, ranked_by, UPPER_BITS, keys[..., :1], upper, rows)
        for place in _wanted(ranks):
            keys[place], left[place] = _bin_of(upper[place[:2]], int(ranks[place]))
        lower = np.zeros((*ranks.shape, LOWER_BINS), np.int64)
        self._count(layer, ranked_by, LOWER_BITS, keys, lower, rows)
        for place in _wanted(ranks):
            low, left[place] = _bin_of(lower[place], int(left[place]))
            keys[place] = keys[place] << LOWER_KEY_BITS | np.uint32(low)
        num_spans = -(-layer.numels // SPAN_NUMEL)
        first_spans = np.cumsum(num_spans) - num_spans
        spans = np.zeros((int(num_spans.sum()), num_keys, num_ranks, 2), np.int64)
        self._count(layer, ranked_by, EQUAL, keys, spans, first_spans, in_scratch=False)
        return keys, self._indices(layer, rule, ranks, keys, left, np.split(spans, first_spans[1:]))

    def _indices(
        self,
        layer: LayerTable,
        rule: KeyRule,
        ranks: NDArray[np.int64],
        keys: NDArray[np.uint32],
        left: NDArray[np.int64],
        spans: Sequence[NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        """Return the elements' indices: each is selected in its span, by its rank there."""
        pieces: dict[tuple[int, int], NDArray[np.int64]] = {}
        where = {}
        for k, j, r in _wanted(ranks):
            above, equal = spans[k][:, j, r].T
            ends = np.cumsum(equal)
            span = int(np.searchsorted(ends, left[k, j, r], side="right"))
            if span == len(ends) or above.sum() + left[k, j, r] != ranks[k, j, r]:
                raise _changed()
            where[k, j, r] = span
            own = pieces.setdefault((k, span), np.full(ranks.shape[1:], -1, np.int64))
            own[j, r] = above[span] + left[k, j, r] - (ends[span] - equal[span])
        indices = np.full(ranks.shape, -1, np.int64)
        if not pieces:
            return indices
        parts = rule.of_pieces(layer, list(pieces), SPAN_NUMEL)
        with _native.operand_errors_of([k for k, _ in pieces]):
            found, places = CpuBackend().layer_threshold(
                parts.layer, *parts.rule.arguments, np.stack(list(pieces.values()))
            )
        numbers = {piece: number for number, piece in enumerate(pieces)}
        for (k, j, r), span in where.items():
            number = numbers[k, span]
            if found[number, j, r] != keys[k, j, r]:
                raise _changed()
            indices[k, j, r] = span * SPAN_NUMEL + places[number, j, r]
        return indices

    def _count(
        self,
        layer: LayerTable,
        keys: DeviceKeys,
        what: int,
        wanted: NDArray[np.uint32],
        counts: NDArray[np.int64],
        rows: NDArray[np.int64],
        *,
        in_scratch: bool = True,
    ) -> None:
        """Add to ``counts``: of which the rows begin at ``rows``, int64 ``[K]``; of EQUAL a row is a span."""
        pipeline, (num_keys, num_ranks) = self._pipeline, wanted.shape[1:]
        nbytes = sparse_tables.wanted_nbytes(num_keys * num_ranks)
        slices = list(cut_into_slices(layer, None, pipeline.limits(0), Extras.none(layer.num_tensors, nbytes)))
        is_small = what == NONZERO or not in_scratch
        address = self._results.load(counts, None if is_small else pipeline.scratch)
        steps = SPAN_NUMEL if what == EQUAL else np.iinfo(np.int64).max
        job = Job(
            lambda part, slot, output: prepare(
                layer,
                None,
                part,
                slot,
                output,
                [sparse_tables.wanted_section(keys.section(part), wanted[part.tensors])],
                rows=rows[part.tensors] + part.firsts // steps,
                keys=keys,
                num_keys=num_keys,
                num_ranks=num_ranks,
            ),
            lambda part: reads_of(part, layer),
            lambda part: [],
            lambda stream, launch: pipeline.device.count_keys(stream, launch, what, address),
        )
        pipeline.run(slices, job)
        self._results.store(counts)


def _wanted(ranks: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield the places of the ranks that are asked for."""
    yield from map(tuple, np.argwhere(ranks >= 0).tolist())


def _bin_of(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return the bin that has the element of a rank, counted from the last bin down, and its rank in the bin."""
    ends = np.cumsum(counts[::-1])
    number = int(np.searchsorted(ends, rank, side="right"))
    if number == len(ends):
        raise _changed()
    return len(ends) - 1 - number, rank - (int(ends[number - 1]) if number else 0)


def _changed() -> RuntimeError:
    return _native.InputChangedError("a second pass over a tensor met other values than the first")
