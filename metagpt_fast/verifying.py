"""verify(): checksums → header and index → inputs → tensors recomputed. Whether an output is what the merge wrote."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from . import _native
from .backends import make_backend
from .backends.comparing import ComparingBackend, Difference
from .buffers import check_buffers
from .checkpoint import Checkpoint, open_checkpoint
from .checksums import consecutive_crc32c, join_crc32c
from .errors import CheckpointError, MetagptFastError
from .input_files import check_io
from .layer_pass import LayerPass, Progress
from .merging import DEFAULT_MEMORY
from .ops import threads_for_call
from .plan import MergePlan, TensorPlan
from .recipe import parse_memory
from .recomputing import ComparingFiles, ComparingPass, OutputSlots, Phases
from .record import Record, ShardRecord, read_record
from .recorded_merge import (
    RecordedMethod,
    check_inputs,
    needs_whole_scopes,
    recorded_inputs,
    recorded_plan,
    recorded_row,
    with_recorded_coefficients,
)
from .untrusted import brief, open_regular
from .verify_report import InputCheck, Problem, ShardCheck, VerifyReport
from .writer import CheckpointWriter, is_file_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Without --full: as many tensors as this, and no more elements.
_SAMPLE_NUM_TENSORS = 32
_SAMPLE_NUMEL = 1 << 25
# The reference needs some 30 bytes per element of what it works on.
_MAX_WINDOW_NBYTES = 64 << 20
# Coefficients may differ by what a measurement of more models, or of another backend, makes of the last digits.
_COEFFICIENT_TOLERANCE = 1e-4


def verify(
    out: str | Path,
    *,
    inputs: bool = False,
    full: bool = False,
    threads: int | None = None,
    memory: str | int = DEFAULT_MEMORY,
    io: str = "auto",
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that an output is what a merge wrote: checksums, header and index, and tensors recomputed from the inputs.

    Every file is read once, and the CRC32C of its header and of each tensor compared with ``metagpt_fast.json``. If the
    inputs are still where they were, and have the fingerprints that were recorded, a sample of tensors, and every
    tensor whose CRC32C differs, is computed again by the NumPy reference and compared to the bit.

    Args:
        out: the output folder, or the bare file.
        inputs: compare the inputs' fingerprints too; one that is missing or changed is then a problem.
        full: recompute every tensor, and the coefficients; slow. Inputs that cannot be used are then a problem.
        threads: threads; default all processors.
        memory: bound of the memory that mapped inputs may take.
        io: how inputs are read: ``mmap``, ``pread``, or ``auto``.
        progress: object with ``start(phase, total_nbytes)``, ``advance(nbytes)`` and ``finish()``.

    Returns:
        What was found; ``ok`` says whether that is nothing.

    Raises:
        CheckpointError: there is no record of a merge, or it cannot be read.
        RecipeError: an argument cannot be used.
    """
    started = time.perf_counter()
    out = Path(out)
    window_nbytes = min(parse_memory(memory) // 4, _MAX_WINDOW_NBYTES)
    check_io(io)
    with threads_for_call(threads):
        verification = _Verification(out, read_record(out), Phases(progress), is_full=full, wants_inputs=inputs)
        verification.check_shards()
        checkpoint = verification.open_output()
        plan = verification.find_inputs()
        if checkpoint is not None and plan is not None:
            verification.recompute(checkpoint, plan, window_nbytes, io)
    return verification.report(time.perf_counter() - started)


class _Verification:
    def __init__(self, out: Path, record: Record, progress: Phases, *, is_full: bool, wants_inputs: bool) -> None:
        self._out = out
        self._record = record
        self._progress = progress
        self._is_full = is_full
        self._wants_inputs = wants_inputs
        self._problems: list[Problem] = []
        self._notes: list[str] = []
        self._shards: list[ShardCheck] = []
        self._inputs: list[InputCheck] = []
        self._damaged: set[str] = set()  # tensors
        self._num_tensors = self._num_recomputed = self._numel_recomputed = self._nbytes_checked = 0

    def report(self, seconds: float) -> VerifyReport:
        return VerifyReport(
            out=self._out,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            shards=tuple(self._shards),
            inputs=tuple(self._inputs),
            num_tensors=self._num_tensors,
            num_recomputed=self._num_recomputed,
            numel_recomputed=self._numel_recomputed,
            is_full=self._is_full,
            nbytes_checked=self._nbytes_checked,
            seconds=seconds,
        )

    def check_shards(self) -> None:
        """Compare every file with its recorded size and checksums."""
        if not self._record.has_checksums:
            self._notes.append(
                f"{self._record.path} holds no checksums: a flipped bit is found only where it is recomputed"
            )
        paths = {shard.name: self._path_of(shard.name) for shard in self._record.shards}
        sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
        readable = [s for s in self._record.shards if s.crc32c is not None and sizes.get(s.name) == s.nbytes]
        is_same: dict[str, bool] = {}
        if readable:
            self._nbytes_checked = sum(sizes[shard.name] for shard in readable)
            with self._progress.phase("checksum", self._nbytes_checked):
                is_same = {shard.name: self._check_content(shard, paths[shard.name]) for shard in readable}
        for shard in self._record.shards:
            where, nbytes = str(paths[shard.name]), sizes.get(shard.name)
            if nbytes is None:
                self._shards.append(ShardCheck(shard.name, 0, "missing"))
                self._problem("shard", where, "is missing")
            elif shard.crc32c is None:
                self._shards.append(ShardCheck(shard.name, nbytes, "no checksum"))
            else:
                self._shards.append(ShardCheck(shard.name, nbytes, "same" if is_same.get(shard.name) else "damaged"))
                if nbytes != shard.nbytes:
                    self._problem("shard", where, f"has {nbytes} bytes, and {shard.nbytes} were written")

    def _check_content(self, shard: ShardRecord, path: Path) -> bool:
        """Compare a file's header and tensors with their checksums; return whether they are the same."""
        with open_regular(path) as (fd, _):
            header, *found = consecutive_crc32c(fd, shard.sizes, self._progress.advance)
        expected = [tensor.crc32c for tensor in shard.tensors]
        is_header_same = join_crc32c([header, *expected], shard.sizes) == shard.crc32c
        if not is_header_same:
            self._problem("header", str(path), "the header is not the one that was written (CRC32C differs)")
        damaged = [t.name for t, crc in zip(shard.tensors, found, strict=True) if crc != t.crc32c]
        for name in damaged:
            self._problem("tensor", str(path), "its bytes are not those that were written (CRC32C differs)", name)
        self._damaged.update(damaged)
        return is_header_same and not damaged

    def open_output(self) -> Checkpoint | None:
        """Check header and index, and that they are of the files in the record."""
        try:
            checkpoint = open_checkpoint(self._out)
        except CheckpointError as error:
            self._problem("header", error.where or str(self._out), _without_where(error))
            return None
        self._num_tensors = len(checkpoint.tensors)
        recorded = {self._path_of(shard.name) for shard in self._record.shards}
        for path in sorted({shard.path for shard in checkpoint.shards} ^ recorded):
            what = "is not one of the files that were written" if path not in recorded else "is not part of the model"
            self._problem("header", str(path), what)
        return checkpoint

    def find_inputs(self) -> MergePlan | None:
        """Return the merge's plan if its inputs are there and unchanged."""
        unusable = ""
        plan: MergePlan | None = None
        try:
            if self._record.is_of_tool:
                checkpoints, folder = recorded_inputs(self._record, self._out)
            else:
                plan, folder = recorded_plan(self._record, self._out)
                checkpoints = list(plan.checkpoints)
            self._inputs = check_inputs(self._record, checkpoints, folder)
            unusable = "; ".join(f"{each.path}: {each.what}" for each in self._inputs if each.state == "changed")
        except MetagptFastError as error:
            unusable = str(error)
            self._inputs = []
        if not unusable and plan is None:
            what = "no tensor was recomputed: another tool had made the merge's plan"
            if self._is_full:
                self._problem("record", str(self._record.path), what)
            else:
                self._notes.append(what)
        if not unusable:
            return plan
        if self._is_full or self._wants_inputs:
            self._problem("input", str(self._record.path), f"the inputs are not those that were merged ({unusable})")
        else:
            self._notes.append(
                f"no tensor was recomputed, because the inputs are not those that were merged: {unusable}"
            )
        return None

    def recompute(self, checkpoint: Checkpoint, plan: MergePlan, window_nbytes: int, io: str) -> None:
        """Compute tensors again and compare them with the output's."""
        outputs = self._matching_outputs(checkpoint, plan)
        # The CUDA kernels have the bits of the CPU's, and the machine that verifies may have no GPU.
        measured_by = "cpu" if self._record.backend == "cuda" else self._record.backend
        wanted = set(self._choose(outputs))
        chosen = _with_scopes(plan, wanted) if needs_whole_scopes(plan) else wanted
        subset = replace(plan, tensors=tuple(tensor for tensor in plan.tensors if tensor.name in chosen))
        try:
            subset = with_recorded_coefficients(subset, self._record)
            measuring = make_backend(measured_by)
        except MetagptFastError as error:
            self._problem("record", str(self._record.path), str(error))
            return
        backend = ComparingBackend(measuring, _native.num_threads())
        with ExitStack() as stack:
            files = stack.enter_context(ComparingFiles([s for c in plan.checkpoints for s in c.shards], io, backend))
            slots = stack.enter_context(OutputSlots(checkpoint, wanted))
            if self._is_full:
                check_buffers(plan, files)
            layers = ComparingPass(subset, files, backend, window_nbytes=window_nbytes, progress=self._progress)
            writer = cast("CheckpointWriter", slots)  # a pass asks for slots only
            layers.copy(writer)
            layers.merge(writer)
            self._report_differences(backend.differences, slots, checkpoint)
        self._num_recomputed = len(wanted)
        self._numel_recomputed = sum(tensor.numel for tensor in plan.tensors if tensor.name in wanted)
        if backend.worst_gram_error > 1:
            self._problem(
                "coefficients",
                str(self._record.path),
                "this machine's kernels measure other norms "
                "than the reference: the instruction set's kernels are broken",
            )
        if self._is_full:
            self._check_coefficients(subset, layers)

    def _matching_outputs(self, checkpoint: Checkpoint, plan: MergePlan) -> list[TensorPlan]:
        """Return the plan's tensors that the output has as planned; others are problems."""
        matching = []
        for tensor in plan.tensors:
            source = checkpoint.tensors.get(tensor.name)
            if source is None:
                self._problem("tensor", str(self._out), "is missing", tensor.name)
            elif (source.dtype, source.shape) != (tensor.out_dtype, tensor.shape):
                got = f"{source.dtype.name} {list(source.shape)}"
                what = f"is {got}, and {tensor.out_dtype.name} {list(tensor.shape)} was written"
                self._problem("tensor", str(source.path), what, tensor.name)
            else:
                matching.append(tensor)
        planned = {tensor.name for tensor in plan.tensors}
        for name, source in checkpoint.tensors.items():
            if name not in planned:
                self._problem("tensor", str(source.path), "is not part of the merge", name)
        return matching

    def _choose(self, tensors: Sequence[TensorPlan]) -> Iterator[str]:
        """Yield the tensors to compare: all of them, or the damaged ones and a sample of the others."""
        numel = count = 0
        # In an order that looks random and is the same every time.
        for tensor in sorted(tensors, key=lambda tensor: hashlib.sha256(tensor.name.encode()).digest()):
            if self._is_full or tensor.name in self._damaged:
                yield tensor.name
            elif count < _SAMPLE_NUM_TENSORS and numel + tensor.numel <= _SAMPLE_NUMEL:
                numel, count = numel + tensor.numel, count + 1
                yield tensor.name

    def _report_differences(
        self, differences: Sequence[Difference], slots: OutputSlots, checkpoint: Checkpoint
    ) -> None:
        by_tensor: dict[str, list[tuple[int, Difference]]] = {}
        for each in differences:
            name, position = slots.places.tensor_at(each.file, each.address)
            by_tensor.setdefault(name, []).append((position, each))
        # Which elements differ says more than that the checksum does.
        self._problems = [problem for problem in self._problems if problem.tensor not in by_tensor]
        for name, found in by_tensor.items():
            position, first = min(found, key=lambda pair: pair[0])
            count, num_bits = sum(each.count for _, each in found), sum(each.num_bits for _, each in found)
            unit = "byte" if first.itemsize == 1 else "element"
            bits = "one flipped bit" if num_bits == 1 else f"{num_bits} bits"
            what = (
                f"{count} {unit}{'s' if count > 1 else ''} differ{'' if count > 1 else 's'} from what the inputs give "
                f"({bits}), the first at index {position // first.itemsize}: {first.stored:.9g}, "
                f"expected {first.expected:.9g}"
            )
            self._problem("tensor", str(checkpoint.tensors[name].path), what, name)

    def _check_coefficients(self, plan: MergePlan, layers: LayerPass) -> None:
        for row, tensor in enumerate(plan.merged):
            assert tensor.method is not None
            solved = layers.coefficients[row, : len(tensor.columns)]
            if isinstance(tensor.method, RecordedMethod):
                solved = cast("NDArray[np.float64]", tensor.method.solved)
            try:
                recorded = recorded_row(self._record, tensor)
            except CheckpointError:
                continue
            if not np.allclose(solved, recorded, rtol=_COEFFICIENT_TOLERANCE, atol=_COEFFICIENT_TOLERANCE):
                what = f"are {_numbers(recorded)}, and the inputs give {_numbers(solved)}"
                self._problem(
                    "coefficients", str(self._record.path), f"the coefficients of {brief(tensor.name)} {what}"
                )
                return

    def _problem(self, kind: str, where: str, what: str, tensor: str | None = None) -> None:
        place = where if tensor is None else f"{where}, tensor {brief(tensor)}"
        self._problems.append(Problem(kind, place, what, tensor))

    def _path_of(self, shard: str) -> Path:
        return self._out if is_file_target(self._out) and not self._out.is_dir() else self._out / shard


def _with_scopes(plan: MergePlan, wanted: set[str]) -> set[str]:
    """Return the wanted tensors, and all others that are solved together with one of them."""
    names = set(wanted)
    for scope in plan.scopes:
        members = {tensor.name for tensor in scope.tensors}
        if members & wanted:
            names |= members
    return names


def _without_where(error: MetagptFastError) -> str:
    text = str(error)
    return text.removeprefix(f"{error.where}: ")


def _numbers(values: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:.7g}" for value in values) + "]"
