"""``merge_method: metagpt`` inside mergekit."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..errors import IntegrationError
from ..methods.metagpt import MetaGPT
from .mergekit_config import GRANULARITY, check_version


def register() -> None:
    """Add ``metagpt`` to mergekit's merge methods, if it is not there yet.

    mergekit's own executor sees one tensor at a time, so there the method has the granularity ``tensor`` only. With
    :func:`~metagpt_fast.integrations.mergekit.run_merge` and ``patch`` it has all three.

    Raises:
        IntegrationError: mergekit is missing or of another version.
    """
    check_version()
    from mergekit import merge_methods

    if all(method.spec.name != MetaGPT.name for method in merge_methods.registered_methods()):
        merge_methods.register(_make_method())


def _make_method() -> Any:
    from mergekit.merge_methods import BasePolicy, GroupMergeMethod, InputContract, MergeMethodSpec, ParameterScope
    from mergekit.merge_methods.base import ParameterSpec

    class MetaGPTMethod(GroupMergeMethod):  # type: ignore[misc]
        """θ₀ + Σ_t λ_t τ_t with λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p (arXiv 2406.11385, Eq. 15)."""

        spec = MergeMethodSpec(
            name=MetaGPT.name,
            pretty_name="MetaGPT",
            reference_url="https://arxiv.org/abs/2406.11385",
            contract=InputContract(base=BasePolicy.REQUIRED),
            parameters=(
                ParameterSpec(
                    GRANULARITY, Literal["model", "layer", "tensor"], ParameterScope.SHARED, default=MetaGPT.granularity
                ),
                ParameterSpec("exponent", float, ParameterScope.SHARED, default=MetaGPT().exponent),
            ),
        )

        def merge_group(self, group: Any, /, **parameters: Any) -> Any:
            """Merge one tensor of all models; mergekit's executor calls it."""
            return merge_tensor(
                group.base.tensor, [entry.tensor for entry in group.non_base], group.metadata.name, **parameters
            )

    return MetaGPTMethod()


def merge_tensor(base: Any, models: list[Any], name: str | None, *, granularity: str, exponent: float) -> Any:
    """Return one merged tensor, of the base's dtype.

    Args:
        base: θ₀, a torch tensor on the CPU.
        models: θ_t of the same shape.
        name: the tensor's, for messages.
        granularity: has to be ``tensor``.
        exponent: p.

    Raises:
        IntegrationError: another granularity is asked for, which no single tensor can have.
    """
    if granularity != "tensor":
        raise IntegrationError(
            "mergekit's own executor sees one tensor at a time",
            where=f"metagpt, tensor {name}",
            got=f"granularity {granularity}",
            expected="granularity: tensor",
            hint="or merge with mergekit-yaml-fast, or within metagpt_fast.integrations.mergekit.patch()",
        )
    from .. import ops

    if not models:
        return base
    operands = [each.detach().cpu().contiguous() for each in (base, *models)]
    gram = ops.layer_gram([operands[0]], [[each] for each in operands[1:]])
    coefficients = MetaGPT(exponent=exponent).solve(np.asarray(gram[0]), has_base=True)
    (merged,) = ops.layer_merge([operands[0]], [[each] for each in operands[1:]], coefficients)
    return merged.to(base.device)
