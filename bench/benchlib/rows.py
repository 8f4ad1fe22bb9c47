"""The form of every result: rows of metrics with their spread, and the JSON around them.

A row is one thing that was measured; a metric is one number of it over n repetitions. What a metric means, its unit
and which direction is better stand in one table, which the tables and the comparison read.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a metric is.

    Attributes:
        unit: as it is printed behind the number.
        better: the direction of improvement; None for conditions, which are never judged.
        is_portable: whether results of two different machines may be compared.
    """

    unit: str
    better: Literal["lower", "higher"] | None
    is_portable: bool = False


METRICS: dict[str, Meaning] = {
    "seconds": Meaning("s", "lower"),
    "user_seconds": Meaning("s", "lower"),
    "system_seconds": Meaning("s", "lower"),
    "gb_per_s": Meaning("GB/s", "higher"),
    "ceiling_gb_per_s": Meaning("GB/s", None),
    "percent_of_ceiling": Meaning("%", "higher", is_portable=True),
    "speedup_numpy": Meaning("x", "higher", is_portable=True),
    "speedup_cpu": Meaning("x", "higher", is_portable=True),
    "speedup_torch": Meaning("x", "higher", is_portable=True),
    "speedup_torch_compile": Meaning("x", "higher", is_portable=True),
    "speedup_mergekit": Meaning("x", "higher", is_portable=True),
    "speedup_mergekit_fast": Meaning("x", "higher", is_portable=True),
    "ratio_to_reference": Meaning("x", "lower", is_portable=True),
    "peak_anonymous_mb": Meaning("MB", "lower", is_portable=True),
    "peak_resident_mb": Meaning("MB", "lower", is_portable=True),
    "seconds_after_planning": Meaning("s", "lower"),
    "speedup_after_planning": Meaning("x", "higher", is_portable=True),
    "peak_above_imports_mb": Meaning("MB", "lower", is_portable=True),
    "gflop_per_s": Meaning("GFLOP/s", None),
    "percent_cached": Meaning("%", None),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric over n repetitions."""

    median: float
    min: float
    max: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        return cls(statistics.median(values), min(values), max(values), fifths[0], fifths[-1], len(values))

    @property
    def interval(self) -> tuple[float, float]:
        """Return what a repetition of the run should lie in: min to max, from 10 values on p20 to p80.

        The extremes of many values only widen, and tell of the worst neighbour on the machine.
        """
        return (self.p20, self.p80) if self.n >= 10 else (self.min, self.max)


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        suite: ``kernels``, ``ceilings``, ``io``, ``merge``, ``methods``, ``mergekit``, ``startup`` or ``scale``.
        name: unique within the suite; the same in every result, so that two can be compared.
        parameters: what the name stands for, as plain values.
        metrics: by name in ``METRICS``.
        formula: how many bytes the work moves at least, in words; "" where bytes are not the measure.
        nbytes: the same as a number; 0 where bytes are not the measure.
        notes: sentences about the conditions, for readers.
    """

    suite: str
    name: str
    parameters: dict[str, Any]
    metrics: dict[str, Spread]
    formula: str = ""
    nbytes: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = self.metrics.keys() - METRICS.keys()
        if unknown:
            raise ValueError(f"row {self.name!r}: got metrics {sorted(unknown)}, expected some of {sorted(METRICS)}")

    @property
    def key(self) -> tuple[str, str]:
        """Return what identifies the row in any result."""
        return self.suite, self.name

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self) | {"notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Return the row that ``to_dict`` described."""
        metrics = {name: Spread(**spread) for name, spread in values["metrics"].items()}
        return cls(**{**values, "metrics": metrics, "notes": tuple(values["notes"])})


@dataclass(frozen=True)
class Result:
    """A run of the benchmarks: the rows and what they were measured on."""

    created: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    schema: int = field(default=SCHEMA)

    def row(self, suite: str, name: str) -> Row | None:
        """Return the row of this suite and name, if there is one."""
        return next((row for row in self.rows if row.key == (suite, name)), None)

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name) for name in ("schema", "created", "commit", "machine", "versions")}
        values |= {"settings": self.settings, "rows": [row.to_dict() for row in self.rows]}
        path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read the JSON; raises ValueError if it is another schema or not a result."""
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            got = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}: not a result of these benchmarks: got schema {got!r}, expected {SCHEMA}")
        return cls(**{**values, "rows": tuple(Row.from_dict(row) for row in values["rows"])})


def save_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows alone, for the process that collects them."""
    path.write_text(json.dumps([row.to_dict() for row in rows], ensure_ascii=False), encoding="utf-8")


def save_or_print(rows: Sequence[Row], path: Path | None) -> None:
    """End a benchmark: write its rows for ``run.py``, or print them for people."""
    if path is not None:
        save_rows(rows, path)
        return
    from .show import print_rows  # imports rich, and this module

    print_rows(rows)


def load_rows(path: Path) -> list[Row]:
    """Read what ``save_rows`` wrote."""
    return [Row.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def gram_nbytes(numel: int, itemsize: int, num_models: int) -> int:
    """Return the bytes that layer_gram has to move: (1+T)·n·itemsize, every input read once."""
    return (1 + num_models) * numel * itemsize


def merge_nbytes(numel: int, itemsize: int, num_models: int) -> int:
    """Return the bytes that layer_merge has to move: (2+T)·n·itemsize, inputs read once, the output written once."""
    return (2 + num_models) * numel * itemsize
