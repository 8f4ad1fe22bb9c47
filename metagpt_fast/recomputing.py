"""The parts of a layer pass that compares with an output instead of writing one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends.comparing import SKIPPED, ComparingBackend, Places
from .checkpoint import Checkpoint, ShardFile, TensorSource
from .errors import CheckpointError
from .input_files import InputFiles
from .layer_pass import LayerPass, Progress
from .writer import OutputSlot

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COMPARE_NBYTES = 4 << 20


class Phases:
    """Progress with other names of the phases, that threads may report to; or none."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, total_nbytes: int) -> Iterator[None]:
        """A phase of ``total_nbytes`` bytes."""
        self.start(name, total_nbytes)
        try:
            yield
        finally:
            self.finish()

    def start(self, phase: str, total_nbytes: int) -> None:
        """A phase begins; a layer pass's is called what it does here."""
        if self._progress is not None:
            names = {"combine": "recompute", "measure and combine": "recompute"}
            self._progress.start(names.get(phase, phase), total_nbytes)

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more bytes are done."""
        if self._progress is not None:
            with self._lock:
                self._progress.advance(nbytes)

    def finish(self) -> None:
        """The phase is over."""
        if self._progress is not None:
            self._progress.finish()


class ComparingFiles(InputFiles):
    """Input files whose tensors are compared where they would be copied."""

    def __init__(self, shards: Iterable[ShardFile], io: str, backend: ComparingBackend) -> None:
        super().__init__(shards, io)
        self._backend = backend

    def copy(self, source: TensorSource, out_fd: int, out_offset: int) -> int:
        """Compare a tensor's bytes with those of the output; returns 0."""
        if out_fd == SKIPPED:
            return 0
        for first in range(0, source.nbytes, _COMPARE_NBYTES):
            count = min(_COMPARE_NBYTES, source.nbytes - first)
            expected = np.frombuffer(self.read(source, first, count), np.uint8)
            self._backend.compare(out_fd, out_offset + first, expected, None)
        return 0


class OutputSlots:
    """Where the tensors of an existing output are, as a layer pass asks its writer; use it in a ``with`` block.

    Args:
        output: the output.
        wanted: the tensors to compare.

    Attributes:
        places: finds the tensor at a place.
    """

    def __init__(self, output: Checkpoint, wanted: set[str]) -> None:
        self._output = output
        self._wanted = wanted
        self._fds: dict[str, int] = {}
        self.places = Places({})

    def __enter__(self) -> OutputSlots:
        for shard in self._output.shards:
            try:
                self._fds[str(shard.path)] = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.__exit__(None, None, None)
                raise CheckpointError(f"cannot open the file ({error.strerror})", where=shard.path) from error
        sources = {name: source for name, source in self._output.tensors.items() if source.nbytes > 0}
        self.places = Places({name: (self._fds[str(s.path)], s.data_offset) for name, s in sources.items()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def slot(self, tensor_name: str) -> OutputSlot:
        """Return where the tensor's bytes are; no file, if it is not to be compared."""
        source = self._output.tensors.get(tensor_name)
        if source is None or tensor_name not in self._wanted:
            return OutputSlot(SKIPPED, 0, self._output.path)
        return OutputSlot(self._fds[str(source.path)], source.data_offset, source.path)

    def is_written(self, tensor_name: str) -> bool:
        """Return False: every tensor is to be worked on."""
        return False

    def wrote(self, tensor_name: str, first_byte: int, nbytes: int, crc: int) -> None:
        """Nothing: nothing is written."""

    def record(self, facts: Mapping[str, Any], written: Sequence[str] = ()) -> None:
        """Nothing: a verification is not resumed."""


class ComparingPass(LayerPass):
    """A layer pass over some of the tensors of a merge."""

    def _check_total(self, total: NDArray[np.float64]) -> None:
        """Nothing: the tensors of a sample may all be the base's."""
