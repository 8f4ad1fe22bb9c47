"""From mergekit's planned tasks to a plan of ours: which tensors the engine takes, with which method and parameters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import Checkpoint, TensorSource
from ..dtypes import F32, F64, DType, is_integer, parse_output_dtype
from ..errors import PlanError, RecipeError
from ..methods import METHODS, Method
from ..methods.passthrough import Passthrough
from ..plan import MergePlan, TensorPlan, layer_of, sort_by_layer
from ..plan_checks import unique_labels
from ..recipe import GRANULARITIES, Recipe, check_granularity
from ..untrusted import brief
from .mergekit_config import GRANULARITY, Extras
from .mergekit_sources import NotPlain, Sources

# Parameters that mergekit's methods accept and do not use.
_WITHOUT_EFFECT: Mapping[str, frozenset[str]] = {"task_arithmetic": frozenset({"rescale", "density"})}
_NEVER_USED = frozenset({"int8_mask"})
_NUMBER = re.compile(r"\d+")


@dataclass
class Split:
    """The tensors of a merge, by who makes them.

    Attributes:
        tensors: those of the engine.
        inputs: mergekit's names of each tensor's inputs and their checkpoints, a base first, by the tensor's name.
        rest: ``SaveTensor`` tasks that mergekit carries out, each with the reason.
        granularities: values of the parameter that tasks have.
        warnings: sentences for the user.
    """

    tensors: list[TensorPlan] = field(default_factory=list)
    inputs: dict[str, tuple[tuple[Any, Checkpoint], ...]] = field(default_factory=dict)
    rest: list[tuple[Any, str]] = field(default_factory=list)
    granularities: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def split_tasks(saves: Sequence[Any], sources: Sources, extras: Extras, seed: int | None) -> Split:
    """Return which of mergekit's ``SaveTensor`` tasks the engine takes, as tensors of a plan, and which not.

    Args:
        saves: the tasks, in the output's order.
        sources: where tensors are.
        extras: settings that mergekit does not know.
        seed: of random masks; None for the method's own.

    Raises:
        PlanError: the inputs do not fit each other.
    """
    split = Split()
    maker = _Maker(extras, seed)
    for save in saves:
        try:
            tensor, inputs = _tensor(save, sources, maker)
        except NotPlain as reason:
            split.rest.append((save, str(reason)))
            continue
        split.tensors.append(tensor)
        split.inputs[tensor.name] = inputs
        split.granularities |= {
            value for name, value in save.tensor_task.parameters.items() if name == GRANULARITY and value is not None
        }
    split.warnings += _left_out(saves, sources)
    return split


def _tensor(save: Any, sources: Sources, maker: _Maker) -> tuple[TensorPlan, tuple[tuple[Any, Checkpoint], ...]]:
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    task = save.tensor_task
    if not isinstance(task, ExecuteMergeMethodTask):
        raise NotPlain(f"made by a {type(task).__name__}")
    cls = METHODS.get(task.method_name)
    if cls is None:
        raise NotPlain(f"the engine has no method {task.method_name}")
    order = tuple(task.model_order)
    base, models = _roles(cls, task.base_model, order)
    found = dict(zip(order, sources.of(task.gather_tensors, order), strict=True))
    places = {model: source for model, (_, source, _) in found.items()}
    for source in places.values():
        if is_integer(source.dtype):
            raise NotPlain("integers, which are compared and copied")
        if not source.dtype.is_mergeable:
            raise NotPlain(f"dtype {source.dtype.name}")
    tensor = TensorPlan(
        name=save.tensor_name,
        shape=next(iter(places.values())).shape,
        layer=layer_of(save.tensor_name),
        base=None if base is None else places[base],
        models=tuple(places[model] for model in models),
        out_dtype=_out_dtype(save.dtype or next(dtype for _, _, dtype in found.values()), places.values()),
        action="merge",
        method=maker.method(cls, task, models),
    )
    return tensor, tuple((model, found[model][0]) for model in (models if base is None else (base, *models)))


def _roles(cls: type[Method], base: Any, order: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the base that task vectors are added to, if there is one, and what is combined."""
    if base not in order or cls.base == "ignored":
        if cls.base == "required":
            raise NotPlain("no base where the method needs one")
        return None, order
    others = tuple(model for model in order if model != base)
    return (None, (base, *others)) if cls.base == "model" else (base, others)


def _out_dtype(name: str | None, sources: Iterable[TensorSource]) -> DType:
    """Return the configured dtype, else the least one that has every input's values."""
    if name is None:
        dtypes = {source.dtype for source in sources}
        return dtypes.pop() if len(dtypes) == 1 else F64 if F64 in dtypes else F32
    try:
        dtype = parse_output_dtype(name.removeprefix("torch."))
    except RecipeError as error:
        raise NotPlain(f"dtype {name}") from error
    assert dtype is not None  # mergekit knows no keep
    return dtype


class _Maker:
    """Methods for tensors: equal parameters give one and the same instance."""

    def __init__(self, extras: Extras, seed: int | None) -> None:
        self._extras = extras
        self._seed = seed
        self._made: dict[tuple[Any, ...], Method] = {}

    def method(self, cls: type[Method], task: Any, models: Sequence[Any]) -> Method:
        specs = cls.specs()
        values: dict[str, Any] = {}
        unknown = []
        for name, value in task.parameters.items():
            if name in specs:
                values[specs[name].field] = value
            elif name != GRANULARITY and name not in _NEVER_USED | _WITHOUT_EFFECT.get(cls.name, frozenset()):
                unknown.append(name)
        if models:
            for name in task.input_parameters[models[0]].keys():  # noqa: SIM118 (no plain dict)
                if name in specs:
                    own = tuple(task.input_parameters[model][name] for model in models)
                    values[specs[name].field] = own[:1] if len(set(own)) == 1 else own
                elif name not in _WITHOUT_EFFECT.get(cls.name, frozenset()):
                    unknown.append(name)
        if unknown:
            raise NotPlain(f"{cls.name} has no parameter {', '.join(unknown)} in the engine")
        if self._seed is not None and "seed" in specs:
            values["seed"] = self._seed
        values |= {specs[name].field: value for name, value in self._extras.parameters.items()}
        key = (cls.name, len(models), *values.items())
        if key not in self._made:
            try:
                method = cls(**values)
                method.check_num_models(len(models))
            except RecipeError as error:
                if self._extras.parameters:
                    raise  # mergekit would do something else
                raise NotPlain(f"parameters that the engine does not take: {error}") from error
            self._made[key] = method
        return self._made[key]


def make_plan(
    config: Any, split: Split, sources: Sources, extras: Extras, computed: Checkpoint | None, text: str
) -> MergePlan:
    """Return the plan of the output: what the engine merges, and what mergekit has computed.

    Args:
        config: mergekit's ``MergeConfiguration``.
        split: who makes which tensor.
        sources: where tensors are.
        extras: settings that mergekit does not know.
        computed: the tensors that mergekit has made, if there are any.
        text: the configuration as it was written.

    Raises:
        RecipeError: granularities cannot be used, or differ.
        PlanError: there are no tensors.
    """
    tensors, models = _with_columns(split)
    if computed is not None:
        tensors += [
            TensorPlan(source.name, source.shape, layer_of(source.name), source, (), source.dtype, "copy")
            for source in computed.tensors.values()
        ]
    base = _donor(config, split, sources) or computed
    if base is None:
        raise PlanError("there is nothing to merge", where="mergekit", got="no tensors in the output")
    methods = list(dict.fromkeys(tensor.method for tensor in tensors if tensor.method is not None))
    checkpoints = list(models.values())
    dtype = config.out_dtype or config.dtype
    return MergePlan(
        recipe=Recipe(
            base=base.path,
            models=tuple(each.path for each in checkpoints),
            method=methods[0] if methods else _stand_in(config.merge_method),
            granularity=_granularity(methods, split, extras),
            out_dtype=None if dtype is None else parse_output_dtype(dtype.removeprefix("torch.")),
            text=text,
        ),
        base=base,
        models=tuple(checkpoints),
        labels=unique_labels(checkpoints),
        tensors=sort_by_layer(_in_file_order(tensors, base)),
        buffers=(),
        warnings=tuple(split.warnings),
    )


def _with_columns(split: Split) -> tuple[list[TensorPlan], dict[Any, Checkpoint]]:
    """Return the tensors with their columns, and the models that these are, in the order of the configuration."""
    models: dict[Any, Checkpoint] = {}
    combined = {tensor.name: split.inputs[tensor.name][0 if tensor.base is None else 1 :] for tensor in split.tensors}
    for inputs in combined.values():
        models.update(inputs)
    columns = {model: column for column, model in enumerate(models)}
    tensors = [
        replace(tensor, columns=tuple(columns[model] for model, _ in combined[tensor.name])) for tensor in split.tensors
    ]
    return tensors, models


def _donor(config: Any, split: Split, sources: Sources) -> Checkpoint | None:
    """Return the checkpoint that stands for the base in reports: mergekit's, else the first model's."""
    candidates = [] if config.base_model is None else [config.base_model]
    candidates += [model for inputs in split.inputs.values() for model, _ in inputs[:1]]
    candidates += [model for save, _ in split.rest for model in getattr(save.tensor_task, "model_order", ())]
    for model in dict.fromkeys(candidates):
        with contextlib.suppress(NotPlain):
            return sources.checkpoint(model)
    return None


def _in_file_order(tensors: list[TensorPlan], base: Checkpoint) -> list[TensorPlan]:
    """Return the tensors as ``metagpt-fast run`` orders them, where they are the base's; sums depend on the order."""
    places = {name: place for place, name in enumerate(base.tensors)}
    if any(tensor.name not in places for tensor in tensors):
        return tensors
    return sorted(tensors, key=lambda tensor: places[tensor.name])


def _granularity(methods: Sequence[Method], split: Split, extras: Extras) -> str:
    given = {*split.granularities, *([] if extras.granularity is None else [extras.granularity])}
    if len(given) > 1:
        raise RecipeError("several granularities", where=GRANULARITY, got=", ".join(sorted(given)), expected="one")
    granularity = next(iter(given), None)
    wanted = {check_granularity(method, granularity) for method in methods}
    # Methods whose parameters differ by tensor may differ in what they need: the widest scope has them all.
    return next((each for each in GRANULARITIES if each in wanted), "tensor")


def _stand_in(name: str) -> Method:
    """Return a method of this name, for a plan that merges nothing: mergekit has computed everything."""
    made: Method = type("ComputedElsewhere", (Passthrough,), {"name": name})()
    return made


def _left_out(saves: Sequence[Any], sources: Sources) -> list[str]:
    """Return a sentence for each model with tensors that are in no layer of the output: mergekit does not know them."""
    outputs = {save.tensor_name for save in saves}
    warnings = []
    for checkpoint in sources.opened:
        used = {_NUMBER.sub("*", name) for name in (*sources.used.get(id(checkpoint), ()), *outputs)}
        lost = [name for name in checkpoint.tensors if _NUMBER.sub("*", name) not in used]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            warnings.append(
                f"{checkpoint.label}: {brief(lost[0])}{more} not in mergekit's list of this architecture's tensors, "
                "so not in the output"
            )
    return warnings
