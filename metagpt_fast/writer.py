"""Crash-safe output: built beside its place, filled by the kernels, made durable, renamed when all is whole."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .build_folder import BuildFolder, changed_parts, how_to_continue
from .checksums import OutputChecksums
from .errors import MetagptFastError, OutputError
from .journal import Journal, Record
from .output_shards import OutputShard, OutputTensor, index_file_name, index_json, plan_shards
from .output_target import (
    check_replaceable,
    check_target,
    is_file_target,
    os_errors,
    publish_file,
    publish_folder,
    real_target,
    restore_record,
    side_file,
)
from .recorder import Recorder
from .shard_files import OutputSlot, ShardFiles

__all__ = [
    "CheckpointWriter",
    "OutputShard",
    "OutputSlot",
    "OutputTensor",
    "check_target",
    "is_file_target",
    "plan_shards",
]

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint; use it in a ``with`` block and call ``finish`` at its end.

    Leaving the block without ``finish``, by an exception or not, removes everything that was written, unless there is
    a ``job``, some of it is recorded as done, and what ended the block was an interrupt or a failing disk: then it is
    kept, and the exception says how to go on. At that point no thread may write to a slot any more: its descriptor is
    closed and may become another file's.

    Args:
        target: the output folder, or a file if the name ends in ``.safetensors`` (then exactly one shard).
        shards: the files, as ``plan_shards`` returns them.
        overwrite: replace a model that is already there, once the new one is whole.
        job: what is made, part by part, for JSON: only the same job may continue this one. None keeps no journal and
            does not wait for the disk.
        is_durable: whether to wait for the disk otherwise. Without, a power failure may lose what the journal says is
            there: the job has to tell one start of the system from another.
        resume: continue an interrupted job, if there is one; else one is refused.

    Attributes:
        records: what the run that is resumed told ``record``.
    """

    def __init__(
        self,
        target: Path,
        shards: Sequence[OutputShard],
        *,
        overwrite: bool = False,
        job: Mapping[str, Any] | None = None,
        resume: bool = False,
        is_durable: bool = True,
    ) -> None:
        if is_file_target(target) and len(shards) != 1:
            raise ValueError(f"{target} is one file, but {len(shards)} shards were given")
        self._target = real_target(target)
        self._shards = tuple(shards)
        self._overwrite = overwrite
        self._job = job
        self._resume = resume
        self._is_durable = is_durable and job is not None
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._checksums = OutputChecksums(self._shards)
        self.records: list[Record] = []

    def __enter__(self) -> CheckpointWriter:
        """Reserve the space of all shards and write their headers.

        Raises:
            OutputError: the target may not be replaced, or the files cannot be made at their full size; another
                process writes this output; an interrupted job is there and is not to be resumed, or is another one.
        """
        with os_errors(self._target, "cannot create the output"):
            self._build = BuildFolder(self._target)
        self._files = ShardFiles(self._paths(), self._shards, is_durable=self._is_durable)
        try:
            with os_errors(self._target, "cannot create the output"):
                self._open()
        except BaseException as error:
            keep = self._has_progress()
            self._leave(keep=keep)
            if keep and _is_interrupt(error):
                _tell(error, how_to_continue(self._build.path))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not finished, or keep it to be continued."""
        keep = False
        try:
            if error is not None and self._journal is not None and _is_worth_continuing(error):
                if self._recorder is not None:
                    with contextlib.suppress(OSError):  # what is recorded already counts
                        self._recorder.close()
                keep = self._has_progress() and not self._is_published()
        finally:
            self._leave(keep=keep or (error is not None and self._has_progress() and _is_interrupt(error)))
        if keep:
            _tell(error, how_to_continue(self._build.path))

    def slot(self, tensor_name: str) -> OutputSlot:
        """Return where the bytes of ``tensor_name`` go; those that are never written read as zeros."""
        return self._files.slot(tensor_name)

    def is_written(self, tensor_name: str) -> bool:
        """Return whether the tensor's bytes are in their file, by this run or by the one that it resumes."""
        return self._files.is_written(tensor_name)

    def wrote(self, tensor_name: str, first_byte: int, nbytes: int, crc: int) -> None:
        """Note the CRC32C of bytes that are now in the slot of ``tensor_name``, ``first_byte`` bytes from its start."""
        self._checksums.add(tensor_name, first_byte, nbytes, crc)

    def record(self, facts: Record, written: Sequence[str] = ()) -> None:
        """Keep ``facts`` in the journal, soon and in the background, for a run that resumes this one.

        Args:
            facts: for JSON; that run finds it in ``records``, with ``written``: the CRC32C by tensor name.
            written: tensors whose bytes are now all in their slots, as ``wrote`` was told. They are on the disk before
                the journal says so.

        Raises:
            OutputError: earlier records or tensors could not be written.
        """
        crcs = self._checksums.complete(written)
        is_full = self._files.written(written)
        if self._recorder is not None:
            with os_errors(self._target, "cannot write the output"):
                self._recorder.add({**facts, "written": crcs}, written, is_urgent=is_full)

    def output_record(self) -> dict[str, Any]:
        """Return what ``metagpt_fast.json`` says under ``output``, once all tensors are written: sizes and CRC32C."""
        return self._checksums.record()

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write an extra file into the output, or beside it as ``{stem}.{name}`` if the output is one file.

        Args:
            name: path within the output folder, such as ``config.json``; a missing subfolder is made.
            content: the bytes, or a file to copy.

        Raises:
            OutputError: the file cannot be read or written, or the output already has one of this name.
        """
        path = self._build.files / name
        if is_file_target(self._target):
            path = self._build.files / side_file(self._target, name).name
        with os_errors(self._target, f"cannot write {name} into the output"):
            if path in self._files.paths():
                raise FileExistsError(0, "a file of the weights exists under this name")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file)

    def finish(self) -> None:
        """Write the index, close all files, and give the output its name: only now it looks like a model.

        Raises:
            OutputError: one of these steps failed; an old output is still, or again, in its place.
        """
        with os_errors(self._target, "cannot write the output"):
            if self._recorder is not None:
                self._recorder.close()
            self._files.complete()
        if len(self._shards) > 1:
            self.add_file(index_file_name(self._shards), index_json(self._shards))
        with os_errors(self._target, "cannot close the output's files"):
            self._files.close()
            # Now, all at once, and not when each is written: the file system then commits all of them together.
            for folder, _, names in os.walk(self._build.files):
                for name in names:
                    self._files.sync_path(Path(folder) / name)
                self._files.sync_path(Path(folder))
        if self._journal is not None:
            with os_errors(self._target, "cannot write the journal"):
                self._journal.append({"publish": self._identity(self._build.files)})
        publish = publish_file if is_file_target(self._target) else publish_folder
        publish(self._build, self._target, overwrite=self._overwrite)
        with os_errors(self._target, "the output is whole, but may not survive a power failure"):
            self._files.sync_path(self._target.parent)
        self._leave(keep=False)

    def _open(self) -> None:
        """Make the files of a new job, or open those of an interrupted one."""
        if self._is_published():
            self._build.clear()  # the interrupted run had nothing left to do
        else:
            restore_record(self._build, self._target)
        records = self._build.records
        if self._has_progress():
            self._check_continuable(records[0].get("job"))
        is_publishing = bool(records) and "publish" in records[-1]
        check_replaceable(self._target, overwrite=self._overwrite, is_publishing=is_publishing)
        if not self._has_progress():
            self._build.clear()
        if self._job is not None:
            self._journal = Journal(self._build.journal_path, is_durable=self._is_durable)
            if self._journal.num_records == 0:
                self._journal.append({"job": self._job})
            self._recorder = Recorder(self._journal, self._files.begin, self._files.make_durable, self._files.recorded)
        self.records = [each for record in records[1:] for each in record.get("records", ())]
        for record in self.records:
            self._checksums.restore(record["written"])
        self._files.open({name for record in self.records for name in record["written"]})
        for folder in (self._build.files, self._build.path, self._target.parent):
            self._files.sync_path(folder)
        own = self._files.paths()
        for path in self._build.files.iterdir():
            if path not in own:  # a run that was killed while it finished had added it
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _check_continuable(self, before: Mapping[str, Any] | None) -> None:
        if self._job is None or not self._resume:
            raise OutputError(
                "an interrupted merge to this output is there",
                where=self._target,
                hint=how_to_continue(self._build.path),
            )
        if changes := changed_parts(before or {}, self._job):
            raise OutputError(
                "the interrupted merge cannot be resumed, because it was another one",
                where=self._build.path,
                got="; ".join(changes),
                hint="give the first command again, with its inputs as they were, or start over after: "
                f"rm -r {self._build.quoted_path}",
            )

    def _paths(self) -> dict[str, Path]:
        is_file = is_file_target(self._target)
        names = [shard.file_name for shard in self._shards]
        return {name: self._build.files / (self._target.name if is_file else name) for name in names}

    def _has_progress(self) -> bool:
        """Whether there is something to continue: a record behind the job's own."""
        return max(len(self._build.records), 0 if self._journal is None else self._journal.num_records) > 1

    def _identity(self, place: Path) -> list[int] | None:
        """Return device and inode of what is, or becomes, the output; None if there is nothing."""
        path = place / self._target.name if is_file_target(self._target) and place == self._build.files else place
        try:
            info = path.stat()
        except OSError:
            return None
        return [info.st_dev, info.st_ino]

    def _is_published(self) -> bool:
        """Whether the output got its name, perhaps by a run that was killed right after that."""
        last = self._build.records[-1] if self._build.records else {}
        if self._journal is not None:
            last = self._journal.last_record
        identity = last.get("publish")
        return identity is not None and identity == self._identity(self._target)

    def _leave(self, *, keep: bool) -> None:
        """Close everything, and remove the folder unless it is kept."""
        if self._recorder is not None:
            self._recorder.stop()
        while True:
            with contextlib.suppress(OSError):  # the descriptor is gone in any case
                self._files.close()
                break
        if self._journal is not None:
            self._journal.close()
        if keep:
            self._build.release()
        else:
            self._build.remove()


def _is_interrupt(error: BaseException) -> bool:
    return not isinstance(error, Exception)


def _is_worth_continuing(error: BaseException) -> bool:
    """Whether the same merge may succeed later: not if what is wrong is the inputs' data, or what was asked for."""
    is_about_inputs = isinstance(error, MetagptFastError) and not isinstance(error, OutputError)
    return not is_about_inputs or isinstance(error.__cause__, OSError)


def _tell(error: BaseException | None, hint: str) -> None:
    """Let the exception that ended a merge say how to go on."""
    if isinstance(error, MetagptFastError):
        error.add_hint(hint)
    elif isinstance(error, (KeyboardInterrupt, SystemExit)):
        error.args = (hint,)
    else:
        _logger.warning("%s", hint)
