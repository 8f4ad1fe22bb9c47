"""merge(): plan → measure → solve → combine → finish. The function to read first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import trust
from .artifacts import model_card, output_files, report_json
from .buffers import check_buffers
from .checkpoint import ShardFile, open_checkpoint
from .devices import DEFAULT_DEVICE_MEMORY, open_backend, use_threads
from .input_files import InputFiles, check_io
from .jobs import check_unchanged, fingerprints_of, job_of, load_gram, measurement_nbytes, measurement_of
from .layer_pass import LayerPass, Progress
from .measurement import Measurement, check_writable
from .plan import MergePlan, input_paths, make_plan
from .quantities import parse_nbytes
from .recipe import Recipe, make_recipe, parse_memory
from .report import MergeReport
from .reporting import make_report
from .writer import CheckpointWriter, OutputShard, check_target, is_file_target, plan_shards

DEFAULT_MEMORY = "1GiB"
DEFAULT_SHARD_SIZE = "5GB"
# Batches larger than this gain no speed, and with smaller ones the disk is asked for the next batch earlier.
_MAX_WINDOW_NBYTES = 256 << 20


def merge(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "metagpt",
    granularity: str | None = None,
    exponent: float | None = None,
    coefficients: str | float | Sequence[float] | None = None,
    parameters: Mapping[str, object] | None = None,
    dtype: str = "keep",
    backend: str = "auto",
    device: str = "auto",
    device_memory: str | int = DEFAULT_DEVICE_MEMORY,
    threads: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    io: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    exclude: str | None = None,
    measurement: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    sync: bool = True,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge checkpoints that were fine-tuned from one base, and write the result.

    With the default method, MetaGPT (Zhou et al., EMNLP 2024, arXiv 2406.11385, Eq. 2 and 15):

        θ = θ₀ + Σ_t λ_t (θ_t − θ₀),   λ_t = ‖θ_t − θ₀‖² / Σ_k ‖θ_k − θ₀‖²

    Inputs are only read. The output appears under its name when it is whole.

    Args:
        base: folder of the base model (Hugging Face layout), or a bare ``.safetensors`` file.
        models: folders or files of the T fine-tuned models, with the base's tensors.
        out: the output folder; a name that ends in ``.safetensors`` writes one bare file.
        method: ``metagpt``, or another that ``metagpt-fast methods`` lists.
        granularity: over what norms are summed: ``model`` (the paper; two passes over the files), ``layer`` or
            ``tensor`` (one pass).
        exponent: p of λ_t ∝ ‖τ_t‖^p, for ``metagpt``; default 2.
        coefficients: given λ (``task_arithmetic``, default 0.3) or weights (``linear``, default equal): one number,
            or one per model.
        parameters: further parameters of the method, by name.
        dtype: of merged tensors: ``keep`` (the base's), ``bf16``, ``f16``, ``f32``, ``f64``.
        backend: ``auto``, ``cpu``, or ``reference`` (NumPy, slow).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. The output's bytes do not depend on it.
        device_memory: memory to take on a GPU, in bytes or as ``"128MiB"``.
        threads: threads for the kernels; default all processors. The result does not depend on it.
        memory: bound of the memory that mapped files may take, in bytes or as ``"1GiB"``; at least 64 MiB.
        io: ``mmap``, ``pread``, or ``auto`` (pread on network file systems).
        max_shard_size: size of an output file, in bytes or as ``"5GB"``.
        exclude: regular expression; tensors whose name it finds are taken from the base.
        measurement: file that keeps the Gram matrices: read if it exists (a stale one is refused), else written.
        overwrite: replace a model that is already at ``out``, once the new one is whole.
        resume: go on with the same merge to ``out`` where it was interrupted, if it was; the result has the same bytes.
        sync: whether to wait until the output is on the disk. Without, a merge that is killed can still be resumed, and
            one that loses power cannot.
        allow_nonfinite: merge NaN and Inf as they are, with a warning, where the method measures nothing.
        copy_code: copy the base's ``*.py`` files, which loading the output with ``trust_remote_code`` would run.
        progress: object with ``start(phase, total_nbytes)``, ``advance(nbytes)`` and ``finish()``.

    Returns:
        What was done: coefficients ``[S, T]``, norms ``[T]``, cosines ``[T, T]``, warnings, times.

    Raises:
        CheckpointError: an input is missing or broken.
        PlanError: the inputs do not fit each other.
        RecipeError: an argument cannot be used.
        MeasurementError: the measurement file is stale or broken.
        DataError: the weights hold NaN or Inf, or no model differs from the base.
        OutputError: the output cannot be written.
        BackendError: the backend cannot be used.
    """
    started = time.perf_counter()
    plan = plan_merge(
        base,
        models,
        method=method,
        granularity=granularity,
        exponent=exponent,
        coefficients=coefficients,
        parameters=parameters,
        dtype=dtype,
        exclude=exclude,
    )
    return carry_out(
        plan,
        out,
        started=started,
        backend=backend,
        device=device,
        device_memory=device_memory,
        threads=threads,
        memory=memory,
        io=io,
        max_shard_size=max_shard_size,
        measurement=measurement,
        overwrite=overwrite,
        resume=resume,
        sync=sync,
        allow_nonfinite=allow_nonfinite,
        copy_code=copy_code,
        progress=progress,
    )


def run(
    recipe: str | Path,
    out: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    device_memory: str | int = DEFAULT_DEVICE_MEMORY,
    threads: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    io: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
    sync: bool = True,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge what a recipe says: a YAML file in mergekit's configuration language (docs/recipes.md).

    Args:
        recipe: the file.
        out: as for :func:`merge`, and so are the others.
        backend: ``auto``, ``cpu``, or ``reference`` (NumPy, slow).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. The output's bytes do not depend on it.
        device_memory: memory to take on a GPU, in bytes or as ``"128MiB"``.
        threads: threads for the kernels; default all processors.
        memory: bound of the memory that mapped files may take.
        io: ``mmap``, ``pread``, or ``auto``.
        max_shard_size: size of an output file.
        overwrite: replace a model that is already at ``out``, once the new one is whole.
        resume: go on with the same merge to ``out`` where it was interrupted, if it was; the result has the same bytes.
        sync: whether to wait until the output is on the disk, as for :func:`merge`.
        allow_nonfinite: merge NaN and Inf as they are, with a warning, where the method measures nothing.
        copy_code: copy the base's ``*.py`` files, which loading the output with ``trust_remote_code`` would run.
        progress: object with ``start(phase, total_nbytes)``, ``advance(nbytes)`` and ``finish()``.

    Returns:
        What was done.

    Raises:
        RecipeError: the recipe cannot be read, or asks for what there is not; it names the line.
        CheckpointError, PlanError, DataError, OutputError, BackendError: as :func:`merge`.
    """
    from .recipe_plan import plan_recipe

    started = time.perf_counter()
    return carry_out(
        plan_recipe(recipe),
        out,
        started=started,
        backend=backend,
        device=device,
        device_memory=device_memory,
        threads=threads,
        memory=memory,
        io=io,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
        sync=sync,
        allow_nonfinite=allow_nonfinite,
        copy_code=copy_code,
        progress=progress,
    )


def carry_out(  # noqa: D417 (arguments that merge() has, too)
    plan: MergePlan,
    out: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    device_memory: str | int = DEFAULT_DEVICE_MEMORY,
    threads: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    io: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    measurement: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    sync: bool = True,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    progress: Progress | None = None,
    started: float | None = None,
) -> MergeReport:
    """Measure, solve, combine and finish: merge what a plan says, that of another tool too (docs/integrating.md).

    Args:
        plan: made by :func:`plan_merge`, by ``plan_recipe``, or by the tool.
        out: as for :func:`merge`, and so are the others.
        started: ``time.perf_counter()`` when the merge began, for the report; default now.

    Raises:
        MetagptFastError: as :func:`merge`.
    """
    started = time.perf_counter() if started is None else started
    target = Path(out)
    shards = plan_output(plan, target, max_shard_size, overwrite=overwrite)
    companions = _companions(plan, target, copy_code)
    fingerprints = fingerprints_of(plan)
    gram = load_gram(plan, measurement, fingerprints)

    window_nbytes = _window_nbytes(memory)
    methods = [tensor.method for tensor in plan.merged if tensor.method is not None]
    with (
        use_threads(threads),
        open_backend(device, backend, methods, device_memory) as chosen,
        InputFiles(_shards(plan), check_io(io)) as files,
    ):
        check_buffers(plan, files)
        layers = LayerPass(
            plan,
            files,
            chosen.backend,
            window_nbytes=max(window_nbytes, min(parse_memory(memory) // 2, chosen.batch_nbytes)),
            gram=gram,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        job = job_of(plan, shards, fingerprints, gram, chosen.backend.name, is_durable=sync)
        with CheckpointWriter(target, shards, overwrite=overwrite, job=job, resume=resume, is_durable=sync) as writer:
            layers.resume(writer)
            layers.copy(writer)
            layers.merge(writer)
            check_unchanged(plan, fingerprints)
            report = make_report(
                plan, target, shards, layers, files, chosen, fingerprints, gram is not None, copy_code, started
            )
            for name, content in companions:
                writer.add_file(name, content)
            if not is_file_target(target) and plan.tool is None:
                writer.add_file("README.md", model_card(report).encode())
            writer.add_file("metagpt_fast.json", report_json(report, writer.output_record()).encode())
            writer.finish()
    if measurement is not None and gram is None and layers.gram is not None:
        measurement_of(plan, layers.gram, fingerprints).save(measurement)
    return report


def _companions(plan: MergePlan, target: Path, copy_code: bool) -> Sequence[tuple[str, bytes | Path]]:
    """Return the output's files beside the weights, without those that the merge itself writes."""
    if is_file_target(target):
        return ()
    if plan.tool is not None:
        return plan.tool.files
    return output_files(plan.base, plan.recipe.out_dtype, plan.config_layers, copy_code=copy_code)


def plan_merge(
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
) -> MergePlan:
    """Return what :func:`merge` with these arguments will do. Reads headers only, writes nothing.

    Raises:
        CheckpointError, PlanError, RecipeError: as :func:`merge`.
    """
    recipe = make_recipe(
        base,
        models,
        method=method,
        granularity=granularity,
        exponent=exponent,
        coefficients=coefficients,
        parameters=parameters,
        dtype=dtype,
        exclude=exclude,
    )
    return _open_and_plan(recipe)


def plan_output(
    plan: MergePlan, target: Path, max_shard_size: str | int = DEFAULT_SHARD_SIZE, *, overwrite: bool = False
) -> tuple[OutputShard, ...]:
    """Return the files that the output will have, after checking that it can be written.

    Raises:
        OutputError: the target exists, is an input, is not writable, or has too little free space.
        RecipeError: ``max_shard_size`` is no size.
    """
    limit = parse_nbytes(max_shard_size, where="max_shard_size")
    if is_file_target(target):
        limit = 2**63 - 1
    shards = plan_shards([tensor.output for tensor in plan.tensors], limit)
    check_target(
        target,
        nbytes_needed=sum(shard.nbytes for shard in shards),
        inputs=input_paths(plan),
        overwrite=overwrite,
    )
    return shards


def measure(
    base: str | Path,
    models: Sequence[str | Path],
    *,
    exclude: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    device_memory: str | int = DEFAULT_DEVICE_MEMORY,
    threads: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    io: str = "auto",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure task vectors: one read of base and models.

    For the arguments see :func:`merge`; ``out`` is a file to save the measurement to, and that it can be written is
    found out before the work begins.

    Returns:
        The Gram matrix of ``[θ₀, τ_1 ... τ_T]`` per tensor, with norms, cosines and MetaGPT's coefficients; ``save``
        makes the file that :func:`merge` takes as ``measurement``.

    Raises:
        CheckpointError, PlanError, RecipeError, DataError, BackendError: as :func:`merge`.
        MeasurementError: ``out`` cannot be written.
    """
    plan = _open_and_plan(make_recipe(base, models, exclude=exclude))
    fingerprints = fingerprints_of(plan)
    if out is not None:
        check_writable(out, measurement_nbytes(plan, fingerprints))
    with (
        use_threads(threads),
        open_backend(device, backend, (), device_memory) as chosen,
        InputFiles(_shards(plan), check_io(io)) as files,
    ):
        window_nbytes = max(_window_nbytes(memory), min(parse_memory(memory) // 2, chosen.batch_nbytes))
        layers = LayerPass(plan, files, chosen.backend, window_nbytes=window_nbytes, progress=progress)
        layers.measure()
    assert layers.gram is not None  # it has just been measured
    trust.sum_of(layers.gram, plan.base.path)
    check_unchanged(plan, fingerprints)
    measurement = measurement_of(plan, layers.gram, fingerprints)
    if out is not None:
        measurement.save(out)
    return measurement


def _open_and_plan(recipe: Recipe) -> MergePlan:
    return make_plan(recipe, open_checkpoint(recipe.base), [open_checkpoint(path) for path in recipe.models])


def _shards(plan: MergePlan) -> Iterator[ShardFile]:
    for checkpoint in plan.checkpoints:
        yield from checkpoint.shards


def _window_nbytes(memory: str | int) -> int:
    # Half of the bound: the kernel maps whole folios, up to some MiB around what a batch touches.
    return min(parse_memory(memory) // 2, _MAX_WINDOW_NBYTES)
