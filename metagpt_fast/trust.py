"""When to doubt a merge: the sentences that tell the user, and the thresholds behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

# One model with more than this share of the weight all but decides the result.
DOMINANT_SHARE = 0.9
# Property 6 of the MetaGPT paper takes task vectors for orthogonal; its models have cosines below 0.1.
NOTABLE_COSINE = 0.3
# Fine-tunes are some percent of the base's norm away from it; weights of another training about 140 %.
DISTANT_RATIO = 0.5


def task_vector_warnings(labels: Sequence[str], norms: FloatArray, cosines: FloatArray, base_norm: float) -> list[str]:
    """Return a sentence for each task vector that is zero or as long as the base, and for pairs far from orthogonal.

    Args:
        labels: the models' names, T of them.
        norms: ‖τ_t‖, float64 ``[T]``.
        cosines: between task vectors, float64 ``[T, T]``.
        base_norm: ‖θ₀‖.
    """
    warnings = [
        f"{label} equals the base: its task vector is zero and it adds nothing to the merge"
        for label, norm in zip(labels, norms, strict=True)
        if norm == 0
    ]
    warnings += [
        f"{label} is {norm / base_norm:.0%} of the base's norm away from it, and fine-tunes are some percent: is it "
        "a fine-tune of this base?"
        for label, norm in zip(labels, norms, strict=True)
        if norm > DISTANT_RATIO * base_norm > 0
    ]
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            cosine = float(cosines[i, j])
            if abs(cosine) <= NOTABLE_COSINE:
                continue
            reason = "they share what they learnt" if cosine > 0 else "they undo each other"
            warnings.append(
                f"the task vectors of {labels[i]} and {labels[j]} are far from orthogonal "
                f"(cosine {cosine:.2f}: {reason}); MetaGPT's bound assumes cosines near 0"
            )
    return warnings


def share_warnings(labels: Sequence[str], coefficients: FloatArray, whose: str = "the") -> list[str]:
    """Return a sentence if one model takes nearly all the weight, and one for coefficients outside [0, 1].

    Args:
        labels: the models' names, T of them.
        coefficients: float64 ``[S, T]``, one row per scope.
        whose: begins the sentence about coefficients outside [0, 1].
    """
    import numpy as np

    warnings = []
    totals = np.abs(coefficients).sum(axis=1)
    is_solved = totals > 0
    if len(labels) > 1 and is_solved.any():
        shares = np.abs(coefficients[is_solved]) / totals[is_solved, None]
        mean_shares = shares.mean(axis=0)
        dominant = int(mean_shares.argmax())
        if mean_shares[dominant] > DOMINANT_SHARE:
            warnings.append(
                f"{labels[dominant]} takes {mean_shares[dominant]:.1%} of the weight: the result is close to that "
                "model alone"
            )
    outside = (coefficients < 0) | (coefficients > 1)
    if outside.any():
        scope, worst = divmod(int(np.abs(coefficients - 0.5).argmax()), len(labels))
        warnings.append(
            f"{whose} coefficients leave [0, 1] ({labels[worst]}: {coefficients[scope, worst]:.3g}): "
            "the merge extrapolates beyond the models"
        )
    return warnings


def sum_of(gram: FloatArray, where: object) -> FloatArray:
    """Return the sum of Gram matrices, float64 ``[N, V, V]`` to ``[V, V]``; raises DataError if a norm overflows."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        total: FloatArray = gram.sum(axis=0)
    if not np.isfinite(np.diagonal(total)).all():
        raise DataError("the squared norm over several tensors overflows float64", where=where)
    return total


def check_any_change(labels: Sequence[str], norms: FloatArray, base: object) -> None:
    """Raise DataError if every task vector is zero."""
    if not norms.any():
        raise DataError(
            "every model equals the base, there is nothing to merge",
            where=base,
            got=f"‖θ_t − θ₀‖ = 0 for {', '.join(labels)}",
            expected="at least one model that was fine-tuned",
            hint="check that the models' paths are not copies of the base",
        )
