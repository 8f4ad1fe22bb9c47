"""Gram matrices of base and task vectors: what the first pass finds out, and what a later merge can reuse."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trust
from .errors import CheckpointError, MeasurementError
from .methods import MetaGPT
from .untrusted import brief, open_regular, parse_json_object, read_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

FORMAT = "metagpt_fast.measurement"
VERSION = 1
MAX_FILE_NBYTES = 1 << 30
Fingerprint = list[dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """The Gram matrix of ``[θ₀, τ_1 ... τ_T]`` for every merged tensor; τ_t = θ_t − θ₀.

    Attributes:
        base: the base's path, as given.
        models: the models' paths, as given.
        labels: a short, unique name of each model.
        names: the tensors' names, N of them.
        numels: elements per tensor, int64 ``[N]``.
        layers: the layer of each tensor (its own name if it is in none), N of them.
        gram: float64 ``[N, T+1, T+1]``.
        fingerprints: per checkpoint, the base's first, what identifies its files.
    """

    base: str
    models: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    numels: NDArray[np.int64]
    layers: tuple[str, ...]
    gram: FloatArray
    fingerprints: tuple[Fingerprint, ...]

    @property
    def total(self) -> FloatArray:
        """Return the Gram matrix of the whole model, float64 ``[T+1, T+1]``."""
        total: FloatArray = self.gram.sum(axis=0)
        return total

    @property
    def norms(self) -> FloatArray:
        """Return ‖τ_t‖ of each model, float64 ``[T]``."""
        return norms_of(self.total)

    @property
    def base_norm(self) -> float:
        """Return ‖θ₀‖."""
        return float(np.sqrt(self.total[0, 0]))

    @property
    def cosines(self) -> FloatArray:
        """Return the cosines between task vectors, float64 ``[T, T]``; 0 where one of them is zero."""
        return cosines_of(self.total)

    def coefficients(self, exponent: float = 2.0) -> FloatArray:
        """Return MetaGPT's λ over the whole model, float64 ``[T]`` (arXiv 2406.11385, Eq. 15 for exponent 2)."""
        return MetaGPT(exponent=exponent).solve(self.total, True)

    def warnings(self) -> tuple[str, ...]:
        """Return what a user should know before trusting a merge of these models."""
        return (
            *trust.task_vector_warnings(self.labels, self.norms, self.cosines, self.base_norm),
            *trust.share_warnings(self.labels, self.coefficients()[None, :], "MetaGPT's"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything that ``save`` writes, and norms, cosines and coefficients to read."""
        num_vectors = self.gram.shape[1]
        upper = np.triu_indices(num_vectors)
        return {
            "format": FORMAT,
            "version": VERSION,
            "base": self.base,
            "models": list(self.models),
            "labels": list(self.labels),
            "base_norm": self.base_norm,
            "norms": self.norms.tolist(),
            "cosines": self.cosines.tolist(),
            "metagpt_coefficients": self.coefficients().tolist(),
            "warnings": list(self.warnings()),
            "fingerprints": list(self.fingerprints),
            "tensors": [
                {"name": name, "layer": layer, "numel": int(numel), "gram": gram[upper].tolist()}
                for name, layer, numel, gram in zip(self.names, self.layers, self.numels, self.gram, strict=True)
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the measurement as JSON, whole or not at all.

        Raises:
            MeasurementError: the file cannot be written.
        """
        path = Path(path)
        check_writable(path)
        staging = _staging(path)
        try:
            with staging.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.to_dict(), indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except OSError as error:
            raise MeasurementError(f"cannot write the measurement ({error.strerror})", where=path) from error
        finally:
            staging.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a measurement that ``save`` has written.

        Raises:
            MeasurementError: the file cannot be read, or is not such a measurement.
        """
        return _load(Path(path))

    def select(
        self,
        base: Fingerprint,
        models: Sequence[Fingerprint],
        names: Sequence[str],
        *,
        where: object,
        labels: Sequence[str] = (),
    ) -> FloatArray:
        """Return the Gram matrices for these checkpoints and tensors, float64 ``[len(names), T+1, T+1]``.

        The checkpoints may be a subset of the measured ones, in any order: they are found by fingerprint. ``labels``
        are what an error calls the models.

        Raises:
            MeasurementError: a checkpoint or a tensor was not measured, or has changed since.
        """
        if self.fingerprints[0] != base:
            raise _stale("the base", self.base, where, is_known=True)
        columns = [0]
        for model, fingerprint in enumerate(models, start=1):
            if fingerprint not in self.fingerprints[1:]:
                label = labels[model - 1] if labels else f"number {model}"
                raise _stale(f"model {label}", ", ".join(self.models), where, is_known=label in self.models)
            columns.append(1 + self.fingerprints[1:].index(fingerprint))
        rows = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in rows]
        if missing:
            raise MeasurementError(
                f"tensor {brief(missing[0])} was not measured",
                where=where,
                hint="it was excluded then; delete the file, and it is measured again",
            )
        chosen = self.gram[[rows[name] for name in names]]
        selected: FloatArray = chosen[:, columns][:, :, columns]
        return selected


def check_writable(path: str | Path, nbytes: int = 0) -> None:
    """Raise MeasurementError unless a measurement of this size can be saved under this name."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        problem, hint = "it is a folder", "give the name of a file"
    elif not folder.is_dir():
        problem, hint = f"there is no folder {folder}", "make the folder first"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem, hint = f"no permission to write in {folder}", "choose another place"
    elif os.path.lexists(path) and not _may_be_replaced(path):
        problem, hint = "it exists and is not a measurement", "choose another name"
    elif (error := _try_to_write(path, nbytes)) is not None:
        problem, hint = str(error.strerror), "choose another place"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = f"free some space, or {hint}"
    else:
        return
    raise MeasurementError(f"cannot write the measurement ({problem})", where=path, hint=hint)


def _try_to_write(path: Path, nbytes: int) -> OSError | None:
    """Make a file of this size beside ``path`` and delete it again: only that shows a full disk or quota."""
    probe = _staging(path)
    try:
        with probe.open("xb") as file:
            if nbytes:
                file.write(bytes(nbytes))  # not posix_fallocate, which not all file systems have
                file.flush()
                os.fsync(file.fileno())  # some know only now
    except OSError as error:
        return error
    finally:
        probe.unlink(missing_ok=True)
    return None


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is a measurement or empty: a mistyped name must not cost the user a checkpoint."""
    try:
        with open_regular(path) as (fd, info):
            return info.st_size == 0 or FORMAT.encode() in read_at(fd, 256, 0)
    except CheckpointError:
        return False


def norms_of(gram: FloatArray) -> FloatArray:
    """Return ‖τ_t‖, float64 ``[T]``, from the Gram matrix of ``[θ₀, τ_1 ... τ_T]``."""
    norms: FloatArray = np.sqrt(np.diagonal(gram)[1:])
    return norms


def cosines_of(gram: FloatArray) -> FloatArray:
    """Return the cosines between task vectors, float64 ``[T, T]``; 0 where one of them is zero."""
    norms = norms_of(gram)
    products = norms[:, None] * norms[None, :]
    cosines = np.divide(gram[1:, 1:], products, out=np.zeros_like(products), where=products > 0)
    return np.clip(cosines, -1.0, 1.0)


def _stale(which: str, measured: str, where: object, *, is_known: bool) -> MeasurementError:
    reason = "is another one now, or has changed since" if is_known else "is not among the measured ones"
    return MeasurementError(
        f"the measurement belongs to other files: {which} {reason}",
        where=where,
        got=f"a measurement of {measured}",
        hint="delete the file, and it is measured again",
    )


def _load(path: Path) -> Measurement:
    try:
        with open_regular(path) as (fd, info):
            if info.st_size > MAX_FILE_NBYTES:
                raise MeasurementError("too large for a measurement", where=path, expected="at most 1 GiB")
            raw = read_at(fd, info.st_size, 0)
        content = parse_json_object(raw, path, "measurement")
    except CheckpointError as error:
        raise MeasurementError(f"no measurement: {error.what}", where=path, got=error.got) from error
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise MeasurementError(
            "not a measurement of this version",
            where=path,
            got=f"format {brief(content.get('format'))}, version {brief(content.get('version'))}",
            expected=f"{FORMAT} {VERSION}",
        )
    try:
        return _from_dict(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MeasurementError(
            f"the measurement is broken ({type(error).__name__}: {brief(str(error))[1:-1]})",
            where=path,
            hint="delete the file, and it is measured again",
        ) from error


def _from_dict(content: dict[str, Any]) -> Measurement:
    models = _strings(content["models"])
    tensors = content["tensors"]
    fingerprints = content["fingerprints"]
    num_vectors = 1 + len(models)
    num_packed = num_vectors * (num_vectors + 1) // 2
    packed = np.array([tensor["gram"] for tensor in tensors], np.float64)
    if packed.shape != (len(tensors), num_packed) or not tensors:
        raise ValueError(f"gram: expected {num_packed} numbers per tensor")
    upper = np.triu_indices(num_vectors)  # only now: it is as large as a Gram matrix of this many models
    numels = np.array([tensor["numel"] for tensor in tensors], np.int64)
    if numels.ndim != 1 or (numels < 0).any():
        raise ValueError("numel: expected one count per tensor")
    names = _strings([tensor["name"] for tensor in tensors])
    if len(set(names)) != len(names):
        raise ValueError("name: expected every tensor once")
    gram = np.zeros((len(tensors), num_vectors, num_vectors))
    gram[:, upper[0], upper[1]] = packed
    gram[:, upper[1], upper[0]] = packed
    if not np.isfinite(gram).all() or (np.diagonal(gram, axis1=1, axis2=2) < 0).any():
        raise ValueError("gram: expected finite numbers with squares on the diagonal")
    if len(fingerprints) != num_vectors or not all(isinstance(f, list) for f in fingerprints):
        raise ValueError("fingerprints: expected one list per checkpoint")
    labels = _strings(content["labels"])
    if len(labels) != len(models):
        raise ValueError("labels: expected one per model")
    return Measurement(
        base=_strings([content["base"]])[0],
        models=models,
        labels=labels,
        names=names,
        numels=numels,
        layers=_strings([tensor["layer"] for tensor in tensors]),
        gram=gram,
        fingerprints=tuple(fingerprints),
    )


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("expected a list of strings")
    return tuple(values)
