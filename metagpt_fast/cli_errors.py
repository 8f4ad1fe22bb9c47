"""How a command ends: one message and an exit status for everything that can be raised."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import MetagptFastError

EXIT_PROBLEM = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

_STDERR = 2
_JSON_KEY = "metagpt_fast.json"
# Methods of threading's classes that lock, or unlock, and return.
_LOCKING = frozenset({"__enter__", "__exit__", "_acquire_restore", "_release_save"})
_POSTPONE_SECONDS = 0.001


class ReportingCommand(click.Command):
    """Turns what a command raises into one message on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; METAGPT_FAST_DEBUG lets everything through as a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError, StdoutError):
            raise
        except (Exception, KeyboardInterrupt, Terminated) as error:
            is_debugging = os.environ.get("METAGPT_FAST_DEBUG", "0") not in {"", "0"}
            if is_debugging and isinstance(error, Exception):
                raise
            ctx.exit(_report(error, as_json=bool(ctx.meta.get(_JSON_KEY))))


class ReportingGroup(ReportingCommand, click.Group):
    """The same for a group of commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, the main one first."""
        return list(self.commands)


def remember_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Keep the --json flag where an error's report finds it (a context's meta is shared with its parents)."""
    ctx.meta[_JSON_KEY] = value
    return value


def run_and_exit(command: Callable[[], object]) -> NoReturn:
    """Call ``command``, which ends by SystemExit, and leave with its status.

    SIGTERM and SIGHUP leave through the ``with`` blocks, which remove partial output, or say how to go on with it. A
    reader of stdout that left, as ``| head`` does, is no error and gets no message at shutdown.
    """
    _open_standard_streams()
    _Interrupts().install()
    # λ and τ must not fail where the terminal's encoding has none.
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_terminal = sys.stdout.isatty()
        encoding = sys.stdout.encoding
        sys.stdout = _Stdout(sys.stdout.detach(), encoding, "replace", line_buffering=is_terminal)
    try:
        command()
    except StdoutError as error:
        _fail_on_stdout(error)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _give_up_stdout()
        except StdoutError as error:
            _fail_on_stdout(error)
    sys.exit(0)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has come; ``code`` is the status that a shell expects."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.code: int = 128 + signum
        self.args = ()  # what a merge has to say about it


class StdoutError(OSError):
    """Results cannot be printed; the work may be done all the same."""


class _Stdout(io.TextIOWrapper):
    """Standard output that tells its own failures from those of other files."""

    def write(self, text: str) -> int:
        with _as_stdout_error():
            return super().write(text)

    def flush(self) -> None:
        with _as_stdout_error():
            super().flush()


@contextmanager
def _as_stdout_error() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(error.errno, error.strerror) from error


def _fail_on_stdout(error: StdoutError) -> NoReturn:
    _give_up_stdout()
    click.echo(f"error: stdout: the result cannot be printed ({error.strerror})", err=True)
    sys.exit(EXIT_PROBLEM)


def _give_up_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Open what the caller closed, so that no file gets its number: what is printed would land in that file."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


class _Interrupts:
    """Raises what a signal means; a moment later where that would be between a lock and the block that unlocks it.

    ``threading`` has with-statements whose ``__enter__`` and ``__exit__`` are in Python. An exception in there leaves
    the lock locked, and then a thread waits for it, and the end of the merge for the thread, for ever.
    """

    def __init__(self) -> None:
        self._postponed: int = signal.SIGINT

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(signal.SIGHUP, self._handle)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGALRM, self._handle_postponed)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name in _LOCKING:
            self._postponed = signum
            signal.setitimer(signal.ITIMER_REAL, _POSTPONE_SECONDS)
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(signum)

    def _handle_postponed(self, signum: int, frame: FrameType | None) -> None:
        self._handle(self._postponed, frame)


def _report(error: BaseException, *, as_json: bool) -> int:
    """Print the message for ``error`` and return the exit status."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        what, status = "interrupted", EXIT_INTERRUPTED
        if isinstance(error, Terminated):
            what, status = f"stopped by {signal.Signals(error.code - 128).name}", error.code
        left = error.args[0] if error.args else "this run left no unfinished output behind"
        click.echo(f"{what}: {left}", err=True)
        return status
    from .console import print_error, print_json, print_message

    if isinstance(error, MetagptFastError):
        print_error(error)
        details: dict[str, str | None] = error.to_dict()
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        print_message(f"unexpected error: {message} (set METAGPT_FAST_DEBUG=1 to see where it comes from)")
        details = {"error": type(error).__name__, "message": str(error)}
    if as_json:
        print_json(details)
    return EXIT_PROBLEM
