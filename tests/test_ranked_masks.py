"""What masks of kind RANKED keep, element by element, against ranks from a sort and random numbers in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from metagpt_fast.backends.tables import LayerElection
from metagpt_fast.dtypes import F32
from metagpt_fast.reference_masks import KeyRule, MaskRule, masks_of

from .arrays import buffer_of, decode
from .kernel_calls import layer_table_of
from .sparse_calls import (
    CERTAIN,
    CPU,
    RANKED,
    Keys,
    empty_masks,
    every_setting,
    out_table_of,
)

SHAPES = [
    *((1, 1), (1, 70), (2, 333), (3, 1000), (5, 1), (5, 601), (63, 20), (64, 9), (65, 33)),
    *((130, 7), (2048, 3), (2047, 131), (5000, 2), (5003, 57), (300_001, 1), (270_000, 2)),
]
PROBABILITIES = [
    (int(0.35 * CERTAIN), int(0.65 * CERTAIN)),
    (int(0.65 * CERTAIN), int(0.35 * CERTAIN)),
    (0, CERTAIN),
    (CERTAIN, 0),
    (CERTAIN // 3, CERTAIN // 3),
    (CERTAIN // 2, CERTAIN),
    (CERTAIN, CERTAIN),
    (0, 0),
    (7, 8),
]


def deltas_of(kind: str, rng: np.random.Generator, numel: int) -> NDArray[np.float32]:
    """Return a task vector of one kind."""
    normal = rng.normal(0, 0.01, numel).astype(np.float32)
    if kind == "ties":
        return np.round(normal * 300)
    if kind == "equal":
        return np.full(numel, -0.25, np.float32)
    if kind == "zeros":
        return np.where(rng.random(numel) < 0.6, np.float32(0), normal)
    if kind == "outlier":
        normal[rng.integers(0, numel, 1 + numel // 900)] = 1e20
    if kind == "nan":
        normal[rng.integers(0, numel, 1 + numel // 900)] = np.nan
        normal[rng.integers(0, numel, 1 + numel // 900)] = np.inf
    if kind == "wide":
        normal = np.exp(rng.uniform(-80, 80, numel)).astype(np.float32)
    return normal


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "outlier", "nan", "wide"])
def test_what_is_kept_has_the_ranks_of_a_sort(columns, rows, kind):
    rng = np.random.default_rng(columns * 1000 + rows)
    zeros = np.zeros(columns * rows, np.float32)
    deltas = [deltas_of(kind, rng, zeros.size) for _ in PROBABILITIES]
    layer = [[buffer_of(values.view(np.uint8), F32) for values in (zeros, delta)] for delta in deltas]
    masks = empty_masks(layer, Keys(layer, columns=[columns] * len(layer)))
    masks.kinds[:] = RANKED
    masks.probabilities[:, 0] = PROBABILITIES
    masks.streams[:] = rng.integers(0, 2**64, masks.streams.shape, np.uint64)
    kept = [
        masks_of(delta[None], [MaskRule(kind=RANKED, probabilities=pair, stream=stream)], KeyRule(columns=columns))[0]
        for delta, pair, stream in zip(deltas, PROBABILITIES, masks.streams[:, 0].tolist(), strict=True)
    ]
    sums = sum_of_kept(len(layer))
    for setting in every_setting():
        moments = CPU.layer_moments(layer_table_of(layer), masks)
        assert moments[:, 0, 0].tolist() == [mask.sum() for mask in kept], setting
        out = [buffer_of(zeros.view(np.uint8), F32) for _ in layer]
        CPU.layer_elect(layer_table_of(layer), masks, sums, out_table_of(out))
        for delta, mask, buffer in zip(deltas, kept, out, strict=True):
            seen = np.isfinite(delta) & (delta != 0)
            np.testing.assert_array_equal((decode(buffer.raw, F32) != 0)[seen], mask[seen] > 0, err_msg=setting)


def sum_of_kept(num_tensors: int) -> LayerElection:
    """Return the election that adds what is kept of one model to the base."""
    ones, zeros = np.ones((num_tensors, 1)), np.zeros(num_tensors, np.uint8)
    return LayerElection(
        scales=ones,
        votes=ones,
        weights=ones,
        uniques=ones,
        lambdas=ones[:, 0].copy(),
        floors=np.zeros(num_tensors),
        elects=zeros,
        normalizes=zeros,
    )
