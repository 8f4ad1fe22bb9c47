"""How a command ends: one message and an exit status for everything that can be raised."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import MetagptFastError

EXIT_PROBLEM = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
EXIT_TERMINATED = 143  # 128 + SIGTERM

_JSON_KEY = "metagpt_fast.json"


class ReportingGroup(click.Group):
    """Turns what a command raises into one message on stderr and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, the main one first."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; METAGPT_FAST_DEBUG lets everything through as a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            is_debugging = os.environ.get("METAGPT_FAST_DEBUG", "0") not in {"", "0"}
            if is_debugging and isinstance(error, Exception):
                raise
            ctx.exit(_report(error, as_json=bool(ctx.meta.get(_JSON_KEY))))


def remember_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Keep the --json flag where an error's report finds it (a context's meta is shared with its parents)."""
    ctx.meta[_JSON_KEY] = value
    return value


def run_and_exit(command: Callable[[], object]) -> NoReturn:
    """Call ``command``, which ends by SystemExit, and leave with its status.

    SIGTERM leaves through the ``with`` blocks, which remove partial output. A reader of stdout that left,
    as ``| head`` does, is no error and gets no message at shutdown.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # λ and τ must not fail where the terminal's encoding has none
            reconfigure(errors="replace")
    try:
        command()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


def _report(error: BaseException, *, as_json: bool) -> int:
    """Print the message for ``error`` and return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted: no output was left behind", err=True)
        return EXIT_INTERRUPTED
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
