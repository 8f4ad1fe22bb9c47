"""Kernels of sparse methods as functions of buffers, on the CPU and by the reference, and random rules for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metagpt_fast import _native
from metagpt_fast.backends import make_backend
from metagpt_fast.backends.tables import LayerElection, MaskTable, OutputTable, output_table

from .arrays import FloatArray, buffer_of
from .kernel_calls import BufferLayer, HasAddress, kernels, layer_table_of

CPU = make_backend("cpu")
REFERENCE = make_backend("reference")
ISAS = _native.supported_isas()
THREADS = (1, 2, 3)
MAGNITUDE, VARIANCE, IMPORTANCE = range(3)
ALL, BAND, RANDOM, RANKED, NEAR = range(5)
CERTAIN = 1 << 32


def every_setting() -> Iterator[str]:
    """Set each ISA with each number of threads in turn; yield what was set."""
    for isa, num_threads in itertools.product(ISAS, THREADS):
        with kernels(isa=isa, num_threads=num_threads):
            yield f"{isa=} {num_threads=}"


def out_table_of(out: Sequence[HasAddress]) -> OutputTable:
    """Return the table of results."""
    return output_table([(b.address, b.descriptor, b.dtype.code) for b in out])


class Keys:
    """What the elements of a layer are ranked by; owns the row factors: keep it while masks or calls use them."""

    def __init__(
        self, layer: BufferLayer, kind: int = MAGNITUDE, columns: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        numels = [tensor[0].numel for tensor in layer]
        self.kind = kind
        self.num = 1 if kind == VARIANCE else len(layer[0]) - 1
        self.columns = np.array([divisor_near(n, 100) for n in numels] if columns is None else columns, np.int64)
        self.factors = [
            rng.choice([0.0, 0.5, 3.7, 1e-3, 2e4], n // c if c else 0)
            for n, c in zip(numels, self.columns.tolist(), strict=True)
        ]

    @property
    def arguments(self) -> tuple[NDArray[np.int64], NDArray[np.uint64], int]:
        """Return columns, row factors and key kind."""
        return self.columns, np.array([f.ctypes.data for f in self.factors], np.uint64), self.kind


def divisor_near(numel: int, most: int) -> int:
    """Return the largest divisor up to ``most``, at least 1."""
    return next((c for c in range(min(most, numel), 0, -1) if numel % c == 0), 1)


def random_ranks(rng: np.random.Generator, layer: BufferLayer, keys: Keys, num: int = 3) -> NDArray[np.int64]:
    """Return ranks ``[K, J, num]``, the first, the last and none among them."""
    ranks = np.full((len(layer), keys.num, num), -1, np.int64)
    for k, tensor in enumerate(layer):
        numel = tensor[0].numel
        if numel:
            ranks[k] = rng.integers(0, numel, ranks[k].shape)
            ends = rng.random(ranks[k].shape)
            ranks[k][ends < 0.2] = 0
            ranks[k][(ends > 0.2) & (ends < 0.4)] = numel - 1
            ranks[k][ends > 0.9] = -1
    return ranks


def empty_masks(layer: BufferLayer, keys: Keys) -> MaskTable:
    """Return masks of kind ALL."""
    shape = (len(layer), len(layer[0]) - 1)
    columns, factors, kind = keys.arguments
    return MaskTable(
        key_kind=kind,
        kinds=np.zeros(shape, np.uint8),
        keys=np.zeros((*shape, 2), np.uint32),
        indices=np.zeros((*shape, 2), np.int64),
        probabilities=np.zeros((*shape, 2), np.uint64),
        streams=np.zeros(shape, np.uint64),
        values=np.zeros(shape, np.float64),
        row_factors=factors,
        columns=columns,
        bits=np.zeros(shape, np.uint64),
    )


def random_masks(rng: np.random.Generator, layer: BufferLayer, keys: Keys, kinds: Sequence[int]) -> MaskTable:
    """Return masks of these kinds, drawn anew for each tensor and model. Bands end at elements of random rank."""
    masks = empty_masks(layer, keys)
    masks.kinds[:] = rng.choice(kinds, masks.kinds.shape)
    ranks = np.sort(random_ranks(rng, layer, keys, 2), axis=2)
    found, where = REFERENCE.layer_threshold(layer_table_of(layer), *keys.arguments, ranks)
    masks.keys[:], masks.indices[:] = found, where  # one row of a variance serves every model
    empty = rng.random(masks.kinds.shape) < 0.1
    masks.keys[empty], masks.indices[empty] = masks.keys[empty][:, ::-1], masks.indices[empty][:, ::-1]
    ends = np.sort(rng.integers(0, CERTAIN + 1, masks.probabilities.shape), axis=2)
    certain = rng.random(masks.kinds.shape)
    ends[certain < 0.1] = CERTAIN
    ends[certain > 0.9] = 0
    masks.probabilities[:] = np.where(rng.random(masks.kinds.shape)[..., None] < 0.3, ends[..., ::-1], ends)
    masks.streams[:] = rng.integers(0, 2**64, masks.streams.shape, np.uint64)
    masks.values[:] = rng.choice([0.0, 1e-3, 2e-3, 1.0], masks.values.shape)
    return masks


def random_election(rng: np.random.Generator, layer: BufferLayer, *, plain: bool = False) -> LayerElection:
    """Return an election of random factors; ``plain``: as DARE's, without election and divisor."""
    num_tensors, shape = len(layer), (len(layer), len(layer[0]) - 1)
    scales = rng.normal(0.5, 1.0, shape)
    own_votes = rng.random(num_tensors) < 0.5
    flags = np.zeros((2, num_tensors), np.uint8) if plain else rng.integers(0, 2, (2, num_tensors)).astype(np.uint8)
    return LayerElection(
        scales=scales,
        votes=np.where(own_votes[:, None], rng.normal(0.5, 1.0, shape), scales),
        weights=np.where(rng.random(shape) < 0.2, 0.0, rng.uniform(0.0, 1.0, shape)),
        uniques=np.where(rng.random(num_tensors)[:, None] < 0.5, 1.0, rng.uniform(1.0, 2.0, shape)),
        lambdas=rng.choice([1.0, 0.7, 0.0, -1.3], num_tensors),
        floors=rng.choice([0.0, 1e-6, 0.5], num_tensors),
        elects=flags[0],
        normalizes=flags[1],
    )


def part(layer: BufferLayer, numel: int) -> list[list[Any]]:
    """Return the first elements of every tensor."""
    return [[buffer_of(b.raw[: numel * b.dtype.itemsize], b.dtype) for b in tensor] for tensor in layer]


def alone(table: Any, k: int) -> Any:
    """Return the table of tensor ``k`` alone."""
    rows = {name: value[k : k + 1] for name, value in vars(table).items() if isinstance(value, np.ndarray)}
    return replace(table, **rows)


def moments_scale(expected: FloatArray) -> FloatArray:
    """Return what errors of moments are relative to: every sum is of numbers that are not negative."""
    return np.maximum(np.abs(expected), np.finfo(np.float64).tiny)
