"""Runs a process and measures it: wall time, CPU time, peak memory by kind."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.005
_KIB = 1024
_LAST_WORDS_NBYTES = 4000


class ProcessError(Exception):
    """A measured process failed; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process took. Memory is None where /proc does not tell."""

    seconds: float
    user_seconds: float
    system_seconds: float
    peak_anonymous_nbytes: int | None
    peak_resident_nbytes: int | None


class MemorySampler:
    """Watches a process's memory from a thread, every 5 ms, until ``stop``.

    Anonymous memory (RssAnon) is what the process asked for; resident memory includes the pages of mapped files, which
    the kernel may take back. RssAnon has no peak of its own in /proc, hence the samples; the resident peak is the
    kernel's own (VmHWM) at the last sample. Not ru_maxrss: after fork and exec it starts from the parent's size.
    """

    def __init__(self, pid: int) -> None:
        self.peak_anonymous_nbytes: int | None = None
        self.peak_resident_nbytes: int | None = None
        self._path = Path(f"/proc/{pid}/status")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; the peaks are final after this."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        is_watching = True
        while is_watching and not self._stopping.is_set():
            is_watching = self._sample()
            self._stopping.wait(_SAMPLE_SECONDS)

    def _sample(self) -> bool:
        """Take one sample; False once the process has gone."""
        try:
            text = self._path.read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name == "RssAnon":
                nbytes = int(value.split()[0]) * _KIB
                self.peak_anonymous_nbytes = max(nbytes, self.peak_anonymous_nbytes or 0)
            elif name == "VmHWM":
                nbytes = int(value.split()[0]) * _KIB
                self.peak_resident_nbytes = max(nbytes, self.peak_resident_nbytes or 0)
        return True


def run_measured(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    samples_memory: bool = True,
) -> Usage:
    """Run a command to its end and return what it took.

    Args:
        command: program and arguments; its standard output is thrown away.
        folder: where it runs.
        environment: all variables it sees; default this process's.
        samples_memory: whether to watch its memory; not for programs that take milliseconds.

    Raises:
        ProcessError: it could not be started, or ended with another status than 0.
    """
    # A file, not a pipe: nobody reads a pipe while the clock runs.
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        except OSError as error:
            raise ProcessError(f"cannot run {command[0]}: {error.strerror}") from error
        sampler = MemorySampler(process.pid) if samples_memory else None
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if sampler is not None:
            sampler.stop()
        if process.returncode != 0:
            errors.seek(0)
            words = errors.read()[-_LAST_WORDS_NBYTES:].decode("utf-8", errors="replace").strip()
            raise ProcessError(f"exit status {process.returncode} from: {shlex.join(command)}\n{words}")
    return Usage(
        seconds=seconds,
        user_seconds=used.ru_utime,
        system_seconds=used.ru_stime,
        peak_anonymous_nbytes=sampler.peak_anonymous_nbytes if sampler else None,
        peak_resident_nbytes=sampler.peak_resident_nbytes if sampler else None,
    )


def clean_environment() -> dict[str, str]:
    """Return this process's variables without those that change what is measured.

    METAGPT_FAST_*, numbers of threads and a forced OpenBLAS kernel, which would slow NumPy and flatter us; and
    PYTHONDONTWRITEBYTECODE, with which every start compiles what an installed package has compiled once.
    """
    dropped = ("METAGPT_FAST_", "OPENBLAS_", "OMP_", "MKL_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
