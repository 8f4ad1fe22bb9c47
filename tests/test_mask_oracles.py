"""What the oracles of selecting methods say about equal keys and near decisions, by examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from .mask_oracles import dare_ties, keep_ranks, row_divergence, sce, ties

KEYS = np.array([[3.0, -1.0, 1.0], [2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("first", "count", "kept", "tied"),
    [
        (0, 0, [], []),
        (0, 1, [0], []),
        (0, 2, [0, 3], []),
        (0, 3, [0, 1, 3], [1, 2, 4]),
        (0, 5, [0, 1, 2, 3, 4], []),
        (0, 6, [0, 1, 2, 3, 4, 5], []),
        (1, 2, [1, 3], [1, 2, 4]),
        (3, 1, [2], [1, 2, 4]),
        (4, 2, [4, 5], [1, 2, 4]),
    ],
)
def test_ranks_with_the_lowest_index_first_among_equals(first, count, kept, tied):
    selection = keep_ranks(KEYS, first, count)
    assert np.flatnonzero(selection.kept).tolist() == kept
    assert np.flatnonzero(selection.tied).tolist() == tied
    assert not selection.doubtful.any()


def test_keys_beside_a_threshold_are_doubtful():
    selection = keep_ranks(np.array([1.0, 1 + 2**-22, 2.0, 0.5]), 0, 2)
    assert np.flatnonzero(selection.kept).tolist() == [1, 2]
    assert np.flatnonzero(selection.doubtful).tolist() == [0, 1]


def test_an_election_near_zero_is_doubtful_and_zero_is_positive():
    base = np.zeros(3)
    models = [np.array([1.0, 1.0, 1.0]), np.array([-1.0, -2.0, 0.0])]
    merged = ties(base, models, weight=1.0)
    assert merged.result.tolist() == [1.0, -2.0, 1.0]
    assert merged.doubtful.tolist() == [True, False, False]


def test_rescaling_gives_the_norm_back():
    base = np.zeros(4)
    merged = dare_ties(base, [np.array([1.0, -2.0, 3.0, 4.0])], masks=[np.array([1, 1, 0, 0], bool)], weight=1.0)
    np.testing.assert_allclose(merged.result, [10 / 3, -20 / 3, 0, 0])


def test_sce_weighs_by_squared_norms():
    base = np.zeros(3)
    merged = sce(base, [np.array([1.0, 2.0, 1e-9]), np.array([3.0, -1.0, 1e-9])])
    np.testing.assert_allclose(merged.result, [(5 * 1 + 10 * 3) / 15, 2.0, 1e-9])


def test_divergence_of_rows_is_exact_where_it_is_small():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.02, (3, 500))
    change = rng.normal(0, 1e-6, (3, 500))
    # To second order KL is half the variance of the change under the softmax, a little less for what 1e-8 adds to it.
    p = np.exp(base) / np.exp(base).sum(axis=1, keepdims=True)
    variance = (p * change**2).sum(axis=1) - (p * change).sum(axis=1) ** 2
    np.testing.assert_allclose(row_divergence(base, base + change)[:, 0], variance / 2, rtol=1e-4)
