"""The folder beside an output in which it is built: one process has it at a time, and a later one can go on in it.

``.OUT.partial/`` holds ``lock``, ``journal`` and ``files/``, which becomes the output.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import OutputError
from .journal import Record, read_records
from .untrusted import brief

_logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{32,}")


def build_path(target: Path) -> Path:
    """Return the folder in which ``target``, as ``real_target`` returns it, is built."""
    return target.with_name(f".{target.name}.partial")


def was_publishing(target: Path) -> bool:
    """Return whether a merge to ``target`` was interrupted while it moved its files to their place."""
    records = read_records(build_path(target) / "journal")
    return bool(records) and "publish" in records[-1]


def nbytes_allocated(folder: Path) -> int:
    """Return the bytes that the files below ``folder`` take on the disk; 0 if there is no such folder."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).lstat().st_blocks * 512
    return total


class BuildFolder:
    """The folder, locked by this process.

    Args:
        target: the output, as ``real_target`` returns it.

    Attributes:
        path: the folder.
        files: the folder in it that becomes the output.
        journal_path: the journal in it.
        replaced: where an old output is put while the new one takes its place.
        replaced_record: the same for the record beside a bare file.
        records: what the journal of an interrupted run holds, whose files are still here; else nothing.

    Raises:
        OutputError: another process is writing this output.
        OSError: the folder cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.path = build_path(target)
        self.files = self.path / "files"
        self.journal_path = self.path / "journal"
        self.replaced = self.path / "replaced"
        self.replaced_record = self.path / "replaced_record"
        self._target = target
        self._lock_fd = self._lock()
        try:
            if self.replaced.is_dir() and not os.path.lexists(target):
                self.replaced.rename(target)  # killed between the two renames of ``publish_folder``
            self.records: list[Record] = read_records(self.journal_path) if self.files.is_dir() else []
        except BaseException:
            self.release()
            raise

    @property
    def quoted_path(self) -> str:
        """Return the folder as a shell takes it."""
        return shlex.quote(str(self.path))

    def clear(self) -> None:
        """Remove what an earlier run left, and begin anew."""
        for path in (self.journal_path, self.files, self.replaced, self.replaced_record):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.files.mkdir()
        self.records = []

    def release(self) -> None:
        """Unlock the folder and leave it there; a second time does nothing."""
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            os.close(fd)

    def remove(self) -> None:
        """Remove the folder and unlock it. What cannot be removed is told to the log."""
        # Renamed first: another process that comes now makes a folder of its own, which is not touched.
        trash = self.path.with_name(f".{self._target.name}.removing-{secrets.token_hex(4)}")
        try:
            self.path.rename(trash)
        except FileNotFoundError:
            return self.release()
        except OSError:
            trash = self.path
        self.release()
        try:
            shutil.rmtree(trash)
        except OSError as error:
            if not trash.exists():  # another process swept it up
                return
            _logger.warning("%s: could not be deleted (%s); delete it yourself", trash, error)

    def _lock(self) -> int:
        for leftover in self._target.parent.glob(f".{glob.escape(self._target.name)}.removing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        while True:
            with contextlib.suppress(FileExistsError):  # not exist_ok, which looks again whether it still exists
                self.path.mkdir()
            try:
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its owner has just removed the folder
                continue
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.rmdir()  # unless it is somebody's
                raise
            try:
                self._lock_file(fd)
                if self._is_current(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock_file(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 200, 0).decode("ascii", "replace")
            raise OutputError(
                "another merge is writing this output",
                where=self._target,
                got=f"{self.path} in use" + (f" by {owner}" if owner.isprintable() and owner else ""),
                hint="wait for it, or choose another output",
            ) from error
        except OSError as error:
            _logger.warning(
                "%s: the output cannot be locked (%s): do not start a second merge to this output",
                self._target.parent,
                error.strerror,
            )
        with contextlib.suppress(OSError):  # a courtesy to whoever meets the lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {ascii(os.uname().nodename)[1:-1]}".encode(), 0)

    def _is_current(self, fd: int) -> bool:
        """Whether the file that was locked is still the one that others would lock."""
        try:
            there = (self.path / "lock").stat()
        except OSError:
            return False
        return os.path.samestat(os.fstat(fd), there)


def changed_parts(before: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> list[str]:
    """Return what differs between two jobs: ``parameters.density: was 0.5, now 0.6``, one sentence per part."""
    changes = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += changed_parts(old, new, f"{name}{key}: ")
        elif old != new:
            is_digest = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new))
            told = ": not the same" if is_digest else f" was {brief(old)}, now {brief(new)}"
            changes.append(f"{name}{key}{told}")
    return changes


def how_to_continue(folder: Path) -> str:
    """Return what to tell the user whose merge stopped and left ``folder``."""
    return (
        f"what is done is kept in {folder}: the same command with --resume goes on from there; "
        f"to give it up: rm -r {shlex.quote(str(folder))}"
    )
