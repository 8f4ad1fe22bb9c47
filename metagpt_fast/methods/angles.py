"""Angles from Gram matrices: what the spherical methods share, and how much of an angle a Gram matrix can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import FloatArray

UNRESOLVED = 1e-6
"""A cosine nearer to −1 than this may be −1, and a square of this share of the squares that cancel in it may be 0.

Inner products are sums in fp32 lanes, with errors of 1e-7 to 1e-6 of the product of the norms (docs/numerics.md).
"""


def spherical_weights(cosines: FloatArray, t: float, straight: NDArray[np.bool_]) -> FloatArray:
    """Return sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω, float64 ``[..., 2]``; where ``straight``, 1−t and t instead.

    Near Ω = 0, where models of one base lie, nothing is lost although cos Ω there says little about Ω: both ratios are
    smooth functions of Ω², that is of the cosine, so that an error of 1e-7 in the cosine is one of some 1e-7 in them,
    and sine and arc use the same Ω. Near Ω = π they grow like 1/sin Ω: the callers say what is straight there.

    Args:
        cosines: cos Ω, float64 ``[...]``, from −1 to 1.
        t: the place between the two vectors.
        straight: where to interpolate linearly, bool ``[...]``.
    """
    angles = np.arccos(np.where(straight, 0.0, cosines))  # any angle whose sine is not 0 will do where straight
    sines = np.sin(angles)
    first = np.where(straight, 1 - t, np.sin((1 - t) * angles) / sines)
    second = np.where(straight, t, np.sin(t * angles) / sines)
    return np.stack([first, second], axis=-1)
