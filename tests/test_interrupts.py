"""Signals that come while Python's own locks are locked or unlocked: none of them may stay locked."""

from __future__ import annotations

import sys

from .tools import run_checked

# A timer's signal hits the with-statements of a Condition at random; another thread then looks whether it can lock it.
# Without postponing, four in ten leave it locked.
PROGRAM = """
import random, signal, threading
from metagpt_fast import cli_errors

interrupts = cli_errors._Interrupts()
interrupts.install()
ours = METHOD
signal.signal(signal.SIGPROF, lambda signum, frame: ours(signal.SIGINT, frame))
condition = threading.Condition()
left_locked = 0

def look():
    global condition, left_locked
    if condition.acquire(timeout=5):
        condition.release()
    else:
        left_locked += 1
        condition = threading.Condition()

random.seed(0)
for _ in range(NUM):
    try:
        signal.setitimer(signal.ITIMER_PROF, random.uniform(1e-5, 2e-4))
        while True:
            with condition:
                pass
            with condition:
                condition.notify()
    except KeyboardInterrupt:
        pass
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
print(left_locked, "left locked")
"""


def left_locked(method: str, num: int) -> int:
    program = PROGRAM.replace("METHOD", method).replace("NUM", str(num)).replace("timeout=5", f"timeout={50 / num}")
    return int(run_checked([sys.executable, "-c", program]).split()[0])


def test_an_interrupt_leaves_no_lock_locked():
    assert left_locked("interrupts._handle", 100) == 0


def test_the_default_does():
    """Or this proves nothing."""
    assert left_locked("signal.default_int_handler", 100) > 0
