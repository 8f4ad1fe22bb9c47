"""The pool's threads must not get in the way of a process that ends, forks or is spawned."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRELUDE = """
import multiprocessing, os, sys, threading, time
import numpy as np
from metagpt_fast import _native

DATA = np.random.default_rng(0).normal(size=(2, 1_200_011)).astype(np.float32)

def gram(_=None):
    result = np.zeros((1, 2, 2))
    _native.layer_gram(
        np.array([[row.ctypes.data for row in DATA]], np.uint64), np.full((1, 2), -1, np.int32),
        np.zeros((1, 2), np.uint8), np.array([DATA.shape[1]]), True, result)
    return result.tobytes()

def forever():
    while True:
        gram()
"""

# What a process does last, and its exit status.
ENDINGS = {
    "unused": ("", 0),
    "used": ("gram()", 0),
    "an exception": ("gram(); raise SystemExit(3)", 3),
    "os._exit": ("gram(); os._exit(4)", 4),
    "threads in kernels": (
        "for _ in range(3): threading.Thread(target=forever, daemon=True).start()\ntime.sleep(0.1); sys.exit(5)",
        5,
    ),
    "a kernel at exit": ("import atexit; atexit.register(gram); gram()", 0),
}


def run_script(text, folder, **options):
    script = folder / "script.py"  # a file, as multiprocessing's spawn imports it again
    script.write_text(PRELUDE + text)
    return subprocess.run([sys.executable, script], timeout=60, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_cleanly(ending, tmp_path):
    text, status = ENDINGS[ending]
    finished = run_script(f"_native.set_num_threads(4)\n{text}\n", tmp_path)
    assert (finished.returncode, finished.stderr) == (status, ""), finished


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    text = f"""
if __name__ == "__main__":
    _native.set_num_threads(3)
    expected = gram()
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert set(pool.map(gram, range(6))) == {{expected}}
    assert gram() == expected
"""
    finished = run_script(text, tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_idle_threads_use_no_processor_time(tmp_path):
    text = """
_native.set_num_threads(4)
gram()
before = time.process_time()
time.sleep(0.3)
assert time.process_time() - before < 0.1, time.process_time() - before
"""
    finished = run_script(text, tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_fewer_threads_than_asked_for_do_the_work(tmp_path):
    """A container's limit on threads slows a merge down; it does not end it."""
    text = """
import resource
if os.getuid() == 0:  # no limit applies to root
    os.setgid(65534)
    os.setuid(65534)
expected = gram()
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
_native.set_num_threads(64)
assert gram() == expected
print(len(os.listdir("/proc/self/task")))
"""
    finished = run_script(text, tmp_path, env={"METAGPT_FAST_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 6, finished.stdout
