"""sd-mecha: MetaGPT as merge methods, one per granularity, computed by this package's kernels.

    import sd_mecha
    from metagpt_fast.integrations.sd_mecha import metagpt

    base, a, b = (sd_mecha.model(f"{name}.safetensors") for name in ("base", "a", "b"))
    recipe = metagpt(base, a, b, exponent=2.0)
    sd_mecha.merge(recipe, output="merged.safetensors")

Importing the module registers ``metagpt``, ``metagpt_layer`` and ``metagpt_tensor`` with sd-mecha, so that recipes that
name them can be deserialized. sd-mecha hands over tensors in memory, those of one scope at a time: with ``metagpt``
that is the whole of every model, as sd-mecha casts it (``merge_dtype``).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any

from ..errors import IntegrationError
from ..plan import layer_of
from ..state_dicts import merge_state_dicts

SUPPORTED_SERIES = "1.1"

try:
    _version = metadata.version("sd-mecha")
except metadata.PackageNotFoundError as error:
    raise IntegrationError("sd-mecha is not installed", hint="pip install 'sd-mecha==1.1.*'") from error
if not _version.startswith(f"{SUPPORTED_SERIES}."):
    raise IntegrationError("this version of sd-mecha is not supported", got=_version, expected=f"{SUPPORTED_SERIES}.*")

from sd_mecha import Parameter, Return, StateDict, merge_method  # noqa: E402 (after the check)
from torch import Tensor  # noqa: E402

__all__ = ["metagpt", "metagpt_layer", "metagpt_tensor"]


def _make(identifier: str, granularity: str) -> Any:
    """Return sd-mecha's merge method for a granularity; its scopes are groups of keys that are merged together."""

    class MetaGPT:
        """θ₀ + Σ_t λ_t τ_t with λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p over the scope (arXiv 2406.11385, Eq. 15)."""

        @staticmethod
        def map_keys(b: Any) -> None:
            """Say which keys are read for which keys of the output."""
            # The builder (1.1.8) expects one configuration where *models has a tuple of them; all are the base's.
            b.input_configs["models"] = b.input_configs["base"]
            for keys in _groups(b.base.keys(), granularity):
                b[keys] = b.base.keys[keys] & b.models.keys[keys] & b.exponent.keys[keys]

        def __call__(self, base: Any, *models: Any, exponent: Any = 2.0, **context: Any) -> Any:
            """Merge the keys of one scope."""
            keys = context["key_relation"].outputs
            return merge_state_dicts(_read(base, keys), [_read(model, keys) for model in models], exponent=exponent)

    # sd-mecha reads objects here, which annotations in the source are not: they are texts in this module.
    weights = Parameter(StateDict[Tensor], "weight")
    returned = Return(StateDict[Tensor], "weight")
    hints = {"base": weights, "models": weights, "exponent": Parameter(float), "return": returned}
    MetaGPT.__call__.__annotations__ = hints
    return merge_method(MetaGPT, identifier=identifier)


def _groups(keys: Iterable[str], granularity: str) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        scope = {"model": "", "layer": layer_of(key), "tensor": key}[granularity]
        groups.setdefault(scope, []).append(key)
    return [tuple(group) for group in groups.values()]


def _read(state: Any, keys: Iterable[str]) -> dict[str, Any]:
    return {key: state[key].detach().contiguous() for key in keys}


metagpt = _make("metagpt", "model")
metagpt_layer = _make("metagpt_layer", "layer")
metagpt_tensor = _make("metagpt_tensor", "tensor")
