"""A process that runs merges in children of its own, each with its fault, without starting Python again.

Reads cases as JSON from stdin, one a line, and answers each with a line: how the child ended, and how many calls were
counted. Runs under LD_PRELOAD of io_faults.c.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from metagpt_fast import merging, progress, recorder, tables  # noqa: F401 - so that no child imports them
from metagpt_fast.cli import main

MODES = ("off", "error", "error from then on", "short", "kill", "power loss", "unsupported")


def run(case: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _be_child(case, write_end)
    os.close(write_end)
    if "seconds" in case:
        time.sleep(case["seconds"])
        os.kill(child, case.get("signal", signal.SIGKILL))
    with os.fdopen(read_end, "rb") as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "calls": int(counted or 0)}


def _be_child(case: dict[str, Any], pipe: int) -> None:
    status = 1
    try:
        output = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        merging._MAX_WINDOW_NBYTES = case.get("window", merging._MAX_WINDOW_NBYTES)
        recorder.RECORD_SECONDS = case.get("record_seconds", recorder.RECORD_SECONDS)
        shim = ctypes.CDLL(None)
        below = os.fsencode(case["below"])
        mode = MODES.index(case.get("mode", "off"))
        shim.fault_arm(below, mode, ctypes.c_long(case.get("call", 0)), case.get("errno", 0))
        sys.argv = ["metagpt-fast", *case["arguments"]]
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        os.write(pipe, b"%d" % shim.fault_num_calls())
        shim.fault_arm(below, 0, ctypes.c_long(0), 0)
    finally:
        os._exit(status)


if __name__ == "__main__":
    assert threading.active_count() == 1  # a child has no other
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
