"""FusionBench: an algorithm that merges a pool of models with any method of this package.

In a configuration of ``fusion_bench``:

    method:
      _target_: metagpt_fast.integrations.fusion_bench.MetagptFastAlgorithm
      method: ties
      coefficients: metagpt
      parameters: {density: 0.5}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import metadata
from typing import Any

from ..errors import IntegrationError
from ..state_dicts import merge_state_dicts

SUPPORTED_SERIES = "0.2"

try:
    _version = metadata.version("fusion-bench")
except metadata.PackageNotFoundError as error:
    raise IntegrationError("FusionBench is not installed", hint="pip install 'fusion-bench==0.2.*'") from error
if not _version.startswith(f"{SUPPORTED_SERIES}."):
    raise IntegrationError(
        "this version of FusionBench is not supported", got=_version, expected=f"{SUPPORTED_SERIES}.*"
    )

from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, auto_register_config  # noqa: E402

__all__ = ["MetagptFastAlgorithm"]


@auto_register_config
class MetagptFastAlgorithm(BaseAlgorithm):  # type: ignore[misc]
    """Merge the models of a pool into its pretrained one; the arguments are those of ``mf.merge_state_dicts``.

    Attributes:
        method: ``metagpt``, ``task_arithmetic``, ``ties``, ... (``metagpt-fast methods``).
        granularity: ``model``, ``layer`` or ``tensor``; None for the method's own.
        exponent: p of metagpt.
        coefficients: numbers, one or one per model in the pool's order; or ``metagpt`` for methods that prune.
        parameters: further parameters of the method.
        exclude: regular expression; tensors that it finds stay the pretrained model's.
        threads: threads for the kernels; None for all processors.
        inplace: whether the pretrained model itself is changed, and not a copy of it.
    """

    def __init__(
        self,
        method: str = "metagpt",
        granularity: str | None = None,
        exponent: float | None = None,
        coefficients: str | float | Sequence[float] | None = None,
        parameters: Mapping[str, object] | None = None,
        exclude: str | None = None,
        threads: int | None = None,
        inplace: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> Any:
        """Return the merged model: the pool's pretrained one, or a copy, with the merged weights.

        Args:
            modelpool: a pool with a model ``_pretrained_``; its models are modules or lazily loaded state dicts.

        Raises:
            MetagptFastError: as :func:`metagpt_fast.merge_state_dicts`.
            IntegrationError: the pool has no pretrained model.
        """
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(modelpool)
        if not modelpool.has_pretrained:
            raise IntegrationError("the pool has no pretrained model", expected="a model named _pretrained_")
        pretrained = modelpool.load_model("_pretrained_")
        names = list(modelpool.model_names)
        given = self.coefficients
        coefficients = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else given
        merged = merge_state_dicts(
            _state(pretrained),
            [_state(modelpool.load_model(name)) for name in names],
            method=self.method,
            granularity=self.granularity,
            exponent=self.exponent,
            coefficients=coefficients,
            parameters=dict(self.parameters or {}),
            exclude=self.exclude,
            threads=self.threads,
        )
        return _loaded(pretrained, merged, inplace=self.inplace)


def _state(model: Any) -> dict[str, Any]:
    """Return a model's tensors in CPU memory, as the kernels take them; nothing is copied that is there already."""
    state = model if isinstance(model, LazyStateDict) else model.state_dict()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _loaded(pretrained: Any, state: Mapping[str, Any], *, inplace: bool) -> Any:
    if isinstance(pretrained, LazyStateDict):
        if pretrained.meta_module is None:
            return dict(state)
        model = deepcopy(pretrained.meta_module).to_empty(device="cpu")
    else:
        model = pretrained if inplace else deepcopy(pretrained)
    model.load_state_dict(state)
    return model
