"""What a merge has done, in numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .measurement import Measurement

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class MergeReport:
    """The result of :func:`metagpt_fast.merge`; ``metagpt_fast.json`` in the output is its ``to_dict()``.

    Attributes:
        out: the output folder or file.
        base: the base's path, as given.
        models: the models' paths, as given, T of them.
        labels: a short, unique name of each model.
        method: the method's name.
        parameters: the method's parameters.
        granularity: ``model``, ``layer`` or ``tensor``.
        exclude: the pattern of tensors taken from the base, or None.
        recipe: the text of the recipe's file; None for a merge without one. ``parameters`` are then the first tensor's.
        out_dtype: ``keep``, or the dtype of the merged tensors as ``--dtype`` names it.
        scopes: what each row of ``coefficients`` is for: ``("model",)``, or names of layers or tensors.
        coefficients: float64 ``[S, T]``.
        norms: ‖τ_t‖ over the whole model, float64 ``[T]``; None if nothing was measured.
        cosines: between task vectors over the whole model, float64 ``[T, T]``; None if nothing was measured.
        base_norm: ‖θ₀‖; None if nothing was measured.
        warnings: sentences for the user.
        num_tensors: tensors of the output.
        num_copied: how many of them were copied from the base, excluded or unchanged in every model.
        num_parameters: elements of the output.
        nbytes_read: bytes of tensors read, each time they were read.
        nbytes_written: bytes of tensors written.
        seconds: wall time of the merge, plan and finish included.
        seconds_measure: wall time of the measuring steps.
        seconds_combine: wall time of the combining steps.
        backend: which backend ran.
        isa: the CPU instruction set in use.
        num_threads: threads used.
        io: ``mmap`` or ``pread``.
        measurement_reused: whether the Gram matrices came from a file.
        num_resumed: tensors that an interrupted run had written; bytes read and written are then those of the last run.
        fingerprints: per path, what identifies the input files.
        versions: of this package, Python and NumPy.
        shards: the names of the output's safetensors files.
        tool: what the tool that made the plan has recorded, plain values; None without one.
        device: where the kernels ran: ``cpu``, or a GPU with its name.
        device_reason: why there.
        measurement: what the coefficients are from, made by this merge or read from a file; None if nothing was
            measured that a later merge could use. It is not in ``to_dict()``.
    """

    out: Path
    base: str
    models: tuple[str, ...]
    labels: tuple[str, ...]
    method: str
    parameters: dict[str, Any]
    granularity: str
    exclude: str | None
    out_dtype: str
    scopes: tuple[str, ...]
    coefficients: FloatArray
    norms: FloatArray | None
    cosines: FloatArray | None
    base_norm: float | None
    warnings: tuple[str, ...]
    num_tensors: int
    num_copied: int
    num_parameters: int
    nbytes_read: int
    nbytes_written: int
    seconds: float
    seconds_measure: float
    seconds_combine: float
    backend: str
    isa: str
    num_threads: int
    io: str
    measurement_reused: bool
    fingerprints: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    shards: tuple[str, ...]
    recipe: str | None = None
    num_resumed: int = 0
    tool: dict[str, Any] | None = None
    device: str = "cpu"
    device_reason: str = "asked for"
    measurement: Measurement | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain Python values, for JSON."""
        result: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            if each.name == "measurement":
                continue
            value = getattr(self, each.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Path):
                value = str(value)
            elif hasattr(value, "tolist"):
                value = value.tolist()
            result[each.name] = value
        return result
