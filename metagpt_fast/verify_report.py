"""What a verification has found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ShardState = Literal["same", "damaged", "missing", "no checksum"]
InputState = Literal["same", "touched", "changed", "missing"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as the merge left it.

    Attributes:
        kind: ``record``, ``shard``, ``header``, ``tensor``, ``coefficients`` or ``input``.
        where: the file, and the tensor where it is about one.
        what: what is wrong with it.
        tensor: the tensor's name, or None.
    """

    kind: str
    where: str
    what: str
    tensor: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """One file of the output: whether its bytes have the checksums that the merge recorded."""

    name: str
    nbytes: int
    state: ShardState


@dataclass(frozen=True, slots=True)
class InputCheck:
    """One input: whether its files have the fingerprints that the merge recorded.

    ``touched``: size, header and sampled content are the same, the time of the last change is not.
    """

    path: str
    state: InputState
    what: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """The result of :func:`metagpt_fast.verify`.

    Attributes:
        out: the output.
        problems: what is wrong; none if everything that was checked is as the merge left it.
        notes: what was not checked, and why.
        shards: the files of the output.
        inputs: the inputs, the base first; empty where they were not looked for.
        num_tensors: tensors of the output.
        num_recomputed: how many of them were recomputed from the inputs and compared.
        numel_recomputed: how many elements these have.
        is_full: whether every tensor was to be recomputed.
        nbytes_checked: bytes of the files that were compared with their checksums.
        seconds: wall time.
    """

    out: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    shards: tuple[ShardCheck, ...]
    inputs: tuple[InputCheck, ...]
    num_tensors: int
    num_recomputed: int
    numel_recomputed: int
    is_full: bool
    nbytes_checked: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Return whether no problem was found."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain Python values, for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self), "out": str(self.out)}
