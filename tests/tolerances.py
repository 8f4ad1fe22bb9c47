"""How far results may be from the float64 reference, and why. A merge has no tolerance: it is bit-exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_NUMEL = 4096  # elements that fp32 lanes sum before fp64 takes over
NUM_LANES = 16
UNIT_ROUNDOFF_F32 = 2.0**-24

# What holds for every input whose sums stay in the range of fp32 (the kernels redo other blocks in fp64).
# Per entry: each of the two deltas is rounded once (2 u); a lane adds 4096 / 16 = 256 products with an fma,
# which rounds partial sums that Σ|v_i v_j| bounds (256 u); at most 4 more roundings if the 16 lanes are added
# in fp32; everything across blocks is fp64 and free at this scale. By Cauchy-Schwarz
# Σ|v_i v_j| <= sqrt(G_ii G_jj), so relative to that the error is at most 262 u, and 1 % for the terms in u².
GRAM_BOUND = (2 + BLOCK_NUMEL // NUM_LANES + 4) * UNIT_ROUNDOFF_F32 * 1.01

# What the contract promises for weights: there the 256 roundings of a lane have random signs, and lanes and
# blocks average them further: random tensors stay below 5e-7 (bf16; 1.5e-7 in fp32). Equal values, whose
# roundings all go the same way, reach 3.1e-6.
GRAM_RANDOM = 1e-6

# F64 among the operands: deltas and sums are fp64. Additions one after the other are bounded by 4096 · 2^-53
# = 5e-13 in a block and about as much across blocks; random signs leave far less.
GRAM_F64 = 1e-12

# layer_row_divergence. p and q are each wrong by a few roundings: |t| 2^-53 from the argument of exp (|t| <= 20
# matters, below that the 1e-8 covers it), 1.5 units each from exp, scaling and adding 1e-8. A relative error h of p or
# q changes the sum of the terms p log(p/q) − p + q by at most h Σ p |log(p/q)| + h Σ |p − q|, which is below
# h (KL + 2 sqrt(2 KL)) (Pinsker), and by h² where both rows are equal. The terms themselves are right to 1e-14.
DIVERGENCE_NOISE = 2.0**-49  # weights, |t| < 1
DIVERGENCE_NOISE_WIDE = 2.0**-47

# The reference sums terms of either sign in long double; on x86 it has 64 bits.
LONG_DOUBLE = float(np.finfo(np.longdouble).eps)


def divergence_bound(
    expected: NDArray[np.float64], noise: float = DIVERGENCE_NOISE, reference: float = 64 * LONG_DOUBLE
) -> NDArray[np.float64]:
    """Return how far a divergence may be from the expected one, which is itself right to ``reference``."""
    true = np.abs(expected) + reference
    bound: NDArray[np.float64] = noise * np.sqrt(2 * true) + 1e-14 * true + noise**2 + reference
    return bound


def gram_scale(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sqrt(G_ii G_jj), what errors are relative to; roots first, as the products may overflow."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale: NDArray[np.float64] = norms[..., :, None] * norms[..., None, :]
    return scale


def gram_error(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return the largest error of the finite entries relative to sqrt(G_ii G_jj); 0 where both are 0."""
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected)
        relative = np.where(error == 0, 0.0, error / gram_scale(expected))
    return float(np.max(relative[np.isfinite(expected)], initial=0.0))


# layer_moments: sums in fp64 of terms that are not negative, one rounding each for the magnitude, its weight and its
# square. 256 additions in a lane, 4 in the tree, up to 64 blocks and some spans: below 400 · 2^-53.
MOMENTS = 400 * 2.0**-53
