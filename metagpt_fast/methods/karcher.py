"""Karcher: the mean of directions on the sphere, with the mean norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import DataError
from .angles import UNRESOLVED
from .base import BaseUse, Method, of_models
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray

_NO_MOVE = 1e-15


@dataclass(frozen=True)
class Karcher(Method):
    """θ = (mean of ‖θ_t‖) · μ, μ the Riemannian mean of the directions θ_t/‖θ_t‖ on the unit sphere.

    arXiv 2603.04972, as in mergekit: the base is one of the models, all have the same weight, and models whose norm is
    at most ``tol`` take no part in μ (if none is left, the result is 0). The iteration starts at the normalized mean of
    the directions, or at the first one where that mean is 0, and ends after ``max_iter`` steps or with one shorter than
    ``tol``.

    mergekit leaves a direction that is within ``tol`` of μ out of a step. Here it takes part: the difference is at most
    ``tol``, whereas angles that the Gram matrix cannot tell from 0 would be left out by chance.
    """

    name: ClassVar[str] = "karcher"
    equation: ClassVar[str] = "w_t of the Riemannian mean of θ_t/‖θ_t‖ on the sphere, times the mean norm"
    base: ClassVar[BaseUse] = "model"

    max_iter: int = parameter(10, "most steps of the iteration", minimum=0)
    tol: float = parameter(1e-5, "length of a step that ends it, and norm of a model that counts as 0", minimum=0)

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the coefficients, float64 ``[T]``.

        Raises:
            DataError: a model points in the direction opposite to the mean, from where no direction leads to it.
        """
        gram = of_models(gram, has_base)
        norms = np.sqrt(gram.diagonal())
        coefficients = np.zeros_like(norms)
        counted = norms > self.tol
        if len(norms) == 1:
            return np.ones(1)
        if counted.any():
            units = norms[counted]
            chords = 1 - gram[np.ix_(counted, counted)] / units[:, None] / units
            np.fill_diagonal(chords, 0.0)
            coefficients[counted] = norms.mean() * self._mean(chords) / units
        return coefficients

    def _mean(self, chords: FloatArray) -> FloatArray:
        """Return μ = Σ_i x_i u_i as x, float64 ``[U]``.

        ``chords`` is 1 − ⟨u_i, u_j⟩. Everything is a smooth function of it, near 0 as well: θ/sin θ and the exponential
        map are power series in θ², lengths come from differences that are small themselves. So coefficients are as
        exact as the Gram matrix, although the angles between models of one base are not.

        Args:
            chords: float64 ``[U, U]``, 0 on the diagonal.
        """

        def square(x: FloatArray) -> float:
            return max(float(x.sum() ** 2 - x @ chords @ x), 0.0)

        num_units = len(chords)
        share = 1 / num_units
        mean = np.full(num_units, share)
        if square(mean) < max(self.tol**2, UNRESOLVED):
            mean = np.zeros(num_units)
            mean[0] = 1.0
        mean /= np.sqrt(square(mean))
        for _ in range(self.max_iter):
            cosines = np.clip(mean.sum() - chords @ mean, -1, 1)
            if cosines.min() < -1 + UNRESOLVED:
                raise DataError(
                    "a model points in the direction opposite to the mean, which has no shortest way to it",
                    where=self.name,
                    expected="models that do not point in opposite directions",
                    hint="leave a model out, or use another method for this tensor",
                )
            angles = np.arccos(cosines)
            pulls = share / np.sinc(angles / np.pi)  # θ/sin θ, 1 at 0
            tangent = pulls - (pulls @ cosines) * mean
            length = np.sqrt(square(tangent))
            if length < max(self.tol, _NO_MOVE):
                break
            mean = np.cos(length) * mean + np.sin(length) / length * tangent
            mean /= np.sqrt(square(mean))
        return mean
