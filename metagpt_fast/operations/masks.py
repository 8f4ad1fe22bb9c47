"""Masks as the kernels take them: rules turned into thresholds, probabilities and streams of random numbers."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .._native import operand_errors_of
from ..backends.tables import MaskTable
from ..methods import rules
from ..methods.sparse import SparseMethod
from .base import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends import Backend
    from ..backends.tables import LayerTable

    FloatArray = NDArray[np.float64]

_ALL_KEYS = 0xFFFFFFFF  # above every key
_LAST_INDEX = np.iinfo(np.int64).max
_CERTAIN = 1 << 32  # a probability of 1
_QUARTILES = (0.25, 0.5, 0.75)
# Kept elements are remembered from measuring to combining, a bit each, for as many tensors as fit in here.
_MOST_BITS_NBYTES = 1 << 26


class KeyKind(enum.IntEnum):
    """What elements are ranked by; one per kernel call."""

    MAGNITUDE = 0
    VARIANCE = 1
    IMPORTANCE = 2


class _Kind(enum.IntEnum):
    ALL = 0
    BAND = 1
    RANDOM = 2
    RANKED = 3
    NEAR = 4


_MADE_OF_BITS = (_Kind.BAND, _Kind.RANDOM, _Kind.RANKED)


class Masks:
    """The masks of all rows: kernels' numbers where they are known, thresholds filled in by ``measure``."""

    def __init__(self, rows: Sequence[Row], num_models: int) -> None:
        self._rows = rows
        shape = (len(rows), num_models)
        self._kinds = np.zeros(shape, np.uint8)
        self._keys = np.zeros((*shape, 2), np.uint32)
        self._indices = np.zeros((*shape, 2), np.int64)
        self._probabilities = np.zeros((*shape, 2), np.uint64)
        self._streams = np.zeros(shape, np.uint64)
        self._values = np.zeros(shape, np.float64)
        self._factors: dict[int, FloatArray] = {}  # KL per row, of KeepImportant
        self._bits: dict[int, NDArray[np.uint64]] = {}  # [T, words] of a row
        self._bits_nbytes = 0
        self._rules: list[list[rules.Rule]] = []
        for number, row in enumerate(rows):
            method = cast("SparseMethod", row.method)
            each = [method.rule(t, row.numel, row.num_models) for t in range(row.num_models)]
            self._rules.append(each)
            for t, rule in enumerate(each):
                self._enter(number, t, rule)

    @property
    def needs_thresholds(self) -> bool:
        """Return whether some rule says something about the other elements of the tensor."""
        return any(_needs_threshold(rule) for each in self._rules for rule in each)

    @property
    def rank_rows(self) -> bool:
        """Return whether some mask depends on the ranks within rows, which kernels look at whenever they need it."""
        return any(isinstance(rule, rules.KeepByRank) for each in self._rules for rule in each)

    def key_kind(self, number: int) -> KeyKind:
        """Return what the row's elements are ranked by."""
        rule = self._rules[number][0]
        if isinstance(rule, rules.KeepVariable):
            return KeyKind.VARIANCE
        return KeyKind.IMPORTANCE if isinstance(rule, rules.KeepImportant) else KeyKind.MAGNITUDE

    def measure(self, backend: Backend, layer: LayerTable, rows: Sequence[int]) -> None:
        """Find the thresholds of a layer's tensors."""
        wanted: dict[KeyKind, list[int]] = {}
        for k, number in enumerate(rows):
            if any(_needs_threshold(rule) for rule in self._rules[number]):
                wanted.setdefault(self.key_kind(number), []).append(k)
        for key_kind, members in wanted.items():
            part, chosen = layer.take(members), [rows[k] for k in members]
            with operand_errors_of(members):
                if key_kind is KeyKind.MAGNITUDE:
                    self._measure_magnitudes(backend, part, chosen)
                elif key_kind is KeyKind.VARIANCE:
                    self._measure_variances(backend, part, chosen)
                else:
                    self._measure_importances(backend, part, chosen)

    def remember(self, rows: Sequence[int]) -> None:
        """Make room for the bits of what these rows keep, as far as there is any."""
        for number in rows:
            row = self._rows[number]
            shape = (row.num_models, -(-row.numel // 64))
            nbytes = 8 * shape[0] * shape[1]
            is_made_of_bits = np.isin(self._kinds[number, : row.num_models], _MADE_OF_BITS)
            if number in self._bits or not is_made_of_bits.any() or self._bits_nbytes + nbytes > _MOST_BITS_NBYTES:
                continue
            self._bits[number] = np.empty(shape, np.uint64)
            self._bits_nbytes += nbytes

    def table(self, rows: Sequence[int], num_models: int, key_kind: KeyKind) -> MaskTable:
        """Return the kernels' table for these rows, which rank by the same keys."""

        def part(table: NDArray[np.generic]) -> NDArray[np.generic]:
            return np.ascontiguousarray(table[rows, :num_models])

        return MaskTable(
            key_kind=int(key_kind),
            kinds=cast("NDArray[np.uint8]", part(self._kinds)),
            keys=cast("NDArray[np.uint32]", part(self._keys)),
            indices=cast("NDArray[np.int64]", part(self._indices)),
            probabilities=cast("NDArray[np.uint64]", part(self._probabilities)),
            streams=cast("NDArray[np.uint64]", part(self._streams)),
            values=cast("NDArray[np.float64]", part(self._values)),
            row_factors=self._factor_addresses(rows),
            columns=self._columns(rows),
            bits=self._bit_addresses(rows, num_models),
        )

    def forget(self, rows: Sequence[int]) -> None:
        """Free what is large, once the rows are combined."""
        for number in rows:
            self._factors.pop(number, None)
            bits = self._bits.pop(number, None)
            self._bits_nbytes -= 0 if bits is None else bits.nbytes

    def state(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return what ``measure`` has found out about these rows, by the name of what the kernels call it."""
        return {"kinds": self._kinds[rows], "keys": self._keys[rows], "indices": self._indices[rows]}

    def restore(self, rows: Sequence[int], state: dict[str, NDArray[Any]]) -> None:
        """Take the place of ``measure``."""
        self._kinds[rows] = state["kinds"]
        self._keys[rows] = state["keys"]
        self._indices[rows] = state["indices"]

    def is_restorable(self, number: int) -> bool:
        """Return whether ``state`` has all of the row: divergences of every row of a matrix are too large to keep."""
        return not any(isinstance(rule, rules.KeepImportant) for rule in self._rules[number])

    def _enter(self, number: int, t: int, rule: rules.Rule) -> None:
        if isinstance(rule, rules.KeepAll):
            self._kinds[number, t] = _Kind.ALL
        elif isinstance(rule, rules.KeepNone):
            self._set_band(number, t, (0, _LAST_INDEX), (_ALL_KEYS, 0))
        elif isinstance(rule, rules.KeepAbove):
            self._set_band(number, t, (_ALL_KEYS, 0), (_key_above(rule.magnitude, including=False), _LAST_INDEX))
        elif isinstance(rule, rules.KeepNear):
            self._kinds[number, t] = _Kind.NEAR
            self._values[number, t] = rule.t
        elif isinstance(rule, rules.KeepRandomly):
            self._set_random(number, t, _Kind.RANDOM, (rule.probability, rule.probability), rule.seed)
        elif isinstance(rule, rules.KeepByRank):
            self._set_random(number, t, _Kind.RANKED, (rule.low, rule.high), rule.seed)

    def _set_band(self, number: int, t: int, upper: tuple[int, int], lower: tuple[int, int]) -> None:
        self._kinds[number, t] = _Kind.BAND
        self._keys[number, t] = (upper[0], lower[0])
        self._indices[number, t] = (upper[1], lower[1])

    def _set_random(self, number: int, t: int, kind: _Kind, ends: tuple[float, float], seed: int) -> None:
        self._kinds[number, t] = kind
        self._probabilities[number, t] = [round(end * _CERTAIN) for end in ends]
        self._streams[number, t] = random_stream(seed, self._rows[number].name, t)

    def _measure_magnitudes(self, backend: Backend, layer: LayerTable, rows: Sequence[int]) -> None:
        ranks = np.full((len(rows), layer.num_operands - 1, 2), -1, np.int64)
        for k, number in enumerate(rows):
            for t, rule in enumerate(self._rules[number]):
                if isinstance(rule, rules.KeepRanks):
                    # From rank 0 on there is no upper end to look for.
                    ranks[k, t] = (rule.first or -1, rule.first + rule.count - 1)
        keys, indices = self._thresholds(backend, layer, rows, KeyKind.MAGNITUDE, ranks)
        for k, number in enumerate(rows):
            for t, rule in enumerate(self._rules[number]):
                if isinstance(rule, rules.KeepRanks):
                    upper, lower = zip(keys[k, t].tolist(), indices[k, t].tolist(), strict=True)
                    self._set_band(number, t, upper, lower)

    def _measure_variances(self, backend: Backend, layer: LayerTable, rows: Sequence[int]) -> None:
        factors = self._factor_addresses(rows)
        nonzero = backend.layer_count_nonzero(layer, self._columns(rows), factors, int(KeyKind.VARIANCE))
        fractions = [cast("rules.KeepVariable", self._rules[number][0]).fraction for number in rows]
        counts = [int(fraction * n) for fraction, n in zip(fractions, nonzero[:, 0].tolist(), strict=True)]
        ranks = np.array(counts, np.int64).reshape(-1, 1, 1) - 1
        keys, indices = self._thresholds(backend, layer, rows, KeyKind.VARIANCE, ranks)
        for k, number in enumerate(rows):
            for t in range(layer.num_operands - 1):
                # With a rank of −1 the kernel answers with a key above all: nothing is kept.
                self._set_band(number, t, (_ALL_KEYS, 0), (int(keys[k, 0, 0]), int(indices[k, 0, 0])))

    def _measure_importances(self, backend: Backend, layer: LayerTable, rows: Sequence[int]) -> None:
        for number, factors in zip(rows, backend.layer_row_divergence(layer, self._columns(rows)), strict=True):
            self._factors[number] = factors
        numels = [self._rows[number].numel for number in rows]
        ranks = np.array([[[n - 1 - int(q * (n - 1)) for q in _QUARTILES]] for n in numels], np.int64)
        keys, _ = self._thresholds(backend, layer, rows, KeyKind.IMPORTANCE, ranks)
        quartiles = keys[:, 0].view(np.float32).astype(np.float64)
        thresholds = quartiles[:, 1] + 1.5 * (quartiles[:, 2] - quartiles[:, 0])
        for number, threshold in zip(rows, thresholds.tolist(), strict=True):
            self._set_band(number, 0, (_ALL_KEYS, 0), (_key_above(threshold, including=True), _LAST_INDEX))

    def _thresholds(
        self, backend: Backend, layer: LayerTable, rows: Sequence[int], key_kind: KeyKind, ranks: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        return backend.layer_threshold(
            layer, self._columns(rows), self._factor_addresses(rows), int(key_kind), np.ascontiguousarray(ranks)
        )

    def _bit_addresses(self, rows: Sequence[int], num_models: int) -> NDArray[np.uint64]:
        addresses = np.zeros((len(rows), num_models), np.uint64)
        for k, number in enumerate(rows):
            for t, bits in enumerate(self._bits.get(number, ())):
                if self._kinds[number, t] in _MADE_OF_BITS:
                    addresses[k, t] = bits.ctypes.data
        return addresses

    def _columns(self, rows: Sequence[int]) -> NDArray[np.int64]:
        return np.array([self._rows[number].num_columns for number in rows], np.int64)

    def _factor_addresses(self, rows: Sequence[int]) -> NDArray[np.uint64]:
        addresses = [self._factors[n].ctypes.data if n in self._factors else 0 for n in rows]
        return np.array(addresses, np.uint64)


def random_stream(seed: int, tensor: str, model: int) -> int:
    """Return the 64-bit key of a mask's random numbers: one for each seed, tensor and model."""
    text = f"{seed}\0{tensor}\0{model}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _needs_threshold(rule: rules.Rule) -> bool:
    return isinstance(rule, (rules.KeepRanks, rules.KeepVariable, rules.KeepImportant))


def _key_above(magnitude: float, *, including: bool) -> int:
    """Return the least key, the bits of a float32, whose value is above ``magnitude`` (or equal to it)."""
    with np.errstate(over="ignore"):
        nearest = np.float32(magnitude)
    value = float(nearest)
    if value < magnitude or (value == magnitude and not including):
        nearest = np.nextafter(nearest, np.float32(np.inf))
    return int(nearest.view(np.uint32))
