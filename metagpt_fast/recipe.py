"""What to merge and how, from the arguments of ``merge()``: every value checked before a file is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .dtypes import DType, parse_output_dtype
from .errors import RecipeError
from .methods import Method, SparseMethod, find_method, make_method
from .quantities import parse_nbytes

GRANULARITIES = ("model", "layer", "tensor")
MIN_MEMORY_NBYTES = 64 << 20


@dataclass(frozen=True)
class Recipe:
    """One merge, as asked for.

    Attributes:
        base: the base model's folder or file.
        models: the fine-tuned models', at least one.
        method: the method with its parameters.
        granularity: over what a Gram matrix is summed before solve: ``model``, ``layer`` or ``tensor``.
        out_dtype: dtype of every merged tensor; None keeps the base's, tensor by tensor.
        exclude: tensors whose names this finds are copied from the base and not measured.
        text: the recipe as it was written, if it came from a file; ``method`` is then the first tensor's.
    """

    base: Path
    models: tuple[Path, ...]
    method: Method
    granularity: str = "model"
    out_dtype: DType | None = None
    exclude: re.Pattern[str] | None = None
    text: str | None = None


def make_recipe(
    base: str | Path,
    models: Sequence[str | Path],
    *,
    method: str = "metagpt",
    granularity: str | None = None,
    exponent: float | None = None,
    coefficients: str | float | Sequence[float] | None = None,
    parameters: Mapping[str, object] | None = None,
    dtype: str = "keep",
    exclude: str | None = None,
) -> Recipe:
    """Return the recipe for these arguments, which are those of :func:`metagpt_fast.merge`.

    Raises:
        RecipeError: a value cannot be used, or a parameter is given twice.
    """
    if isinstance(models, (str, Path)):
        raise RecipeError("models", got=repr(str(models)), expected="a list of folders or files")
    if not models:
        raise RecipeError("no models were given", where="models", expected="at least one fine-tuned model")
    chosen: dict[str, object] = dict(parameters or {})
    # Numbers are the weights themselves, a text says where they come from.
    coefficients_name = "coefficients" if isinstance(coefficients, str) else "weight"
    for name, value in (("exponent", exponent), (coefficients_name, coefficients)):
        if value is None:
            continue
        if name in chosen:
            raise RecipeError("parameter is given twice", where=name, hint=f"leave {name} out of the parameters")
        chosen[name] = value
    if coefficients is not None and not isinstance(coefficients, str):
        _check_takes_coefficients(method)
    made = make_method(method, chosen)
    is_base_counted = made.base == "model"
    try:
        made.check_num_models(len(models) + is_base_counted)
    except RecipeError as error:
        if is_base_counted:
            error.add_hint("the base is one of them")
        raise
    granularity = check_granularity(made, granularity)
    return Recipe(
        base=Path(base),
        models=tuple(Path(model) for model in models),
        method=made,
        granularity=granularity,
        out_dtype=parse_output_dtype(dtype),
        exclude=parse_pattern(exclude),
    )


def _check_takes_coefficients(method: str) -> None:
    specs = find_method(method).specs()
    if "weight" not in specs or not specs["weight"].per_model:
        raise RecipeError(
            f"{method} takes no coefficients",
            where="coefficients",
            expected=f"the parameters of {method}: {', '.join(specs) or 'none'}",
            hint="metagpt solves for them; task_arithmetic and linear are given them" if method == "metagpt" else None,
        )


def check_granularity(method: Method, granularity: str | None) -> str:
    """Return over what the method's coefficients are solved; None takes the method's default.

    Raises:
        RecipeError: there is no such granularity, or the method solves for each tensor whatever is asked.
    """
    if granularity is None:
        return method.default_granularity
    if granularity not in GRANULARITIES:
        raise RecipeError(
            "unknown granularity",
            where="granularity",
            got=repr(granularity),
            expected=", ".join(GRANULARITIES),
        )
    is_fixed = isinstance(method, SparseMethod) and method.default_granularity == "tensor"
    if granularity != "tensor" and (is_fixed or method.axis is not None):
        raise RecipeError(
            f"{method.name} with these parameters works tensor by tensor",
            where="granularity",
            got=repr(granularity),
            expected="tensor",
            hint="leave the granularity out",
        )
    return granularity


def parse_pattern(exclude: str | None) -> re.Pattern[str] | None:
    """Compile the pattern of ``--exclude``; raises RecipeError for one that is no regular expression."""
    if exclude is None:
        return None
    try:
        return re.compile(exclude)
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"not a regular expression ({error})",
            where="exclude",
            got=repr(exclude),
            hint="Python's syntax, found anywhere in the tensor's name: 'lm_head|embed_tokens'",
        ) from error


def parse_memory(memory: str | int) -> int:
    """Return the bytes of ``--memory``; raises RecipeError for no size, or one below 64 MiB."""
    nbytes = parse_nbytes(memory, where="memory")
    if nbytes < MIN_MEMORY_NBYTES:
        raise RecipeError("too little memory", where="memory", got=f"{nbytes} bytes", expected="at least 64MiB")
    return nbytes
